"""Class numbers in place of captions, for models that were trained on labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kinema.config.errors import KinemaError
from kinema.models.config_text import ClassTextConfig
from kinema.models.text import TextEncoder, TextFeatures


class ClassTextEncoder(TextEncoder):
    """Reads a prompt as the number of a class, counted from 0."""

    config: ClassTextConfig

    def __init__(self, config: ClassTextConfig) -> None:
        self.config = config

    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """See `TextEncoder.encode`. y is int64 `[B]`.

        Raises:
            KinemaError: not a whole number, or out of range.
        """
        return TextFeatures(torch.tensor([self._number(t) for t in texts], dtype=torch.int64), None)

    def lost(self, text: str) -> str:
        """Nothing: a number is read whole."""
        return ""

    def _number(self, text: str) -> int:
        last = self.config.num_classes - 1
        try:
            number = int(text)
        except ValueError:
            raise KinemaError(
                f"{text!r} is not the number of a class",
                where="prompt",
                hint=f"this model knows classes, not captions: a number from 0 to {last}",
            ) from None
        if not 0 <= number <= last:
            raise KinemaError(f"class {number} is out of range: 0 to {last}", where="prompt")
        return number
