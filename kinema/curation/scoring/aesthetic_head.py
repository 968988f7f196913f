"""The aesthetic predictor's own weights: a chain of linear layers over a CLIP embedding.

Imports torch: the stage imports it when it opens.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema.config.errors import KinemaError

LAYER = re.compile(r"(?:layers\.(\d+)\.)?(weight|bias)")


class AestheticHead:
    """LAION's improved aesthetic predictor (christophschuhmann/improved-aesthetic-predictor): five
    linear layers, 768 -> 1024 -> 128 -> 64 -> 16 -> 1, with dropout between them in training and
    no activation; it takes CLIP ViT-L/14 image embeddings of norm 1. The older predictor
    (`sa_0_4_vit_l_14_linear.pth`) is one such layer. Sizes are the file's.
    """

    def __init__(self, file: Path) -> None:
        """
        Raises:
            KinemaError: a damaged file, or one that holds anything else.
        """
        self.file = file
        self._layers = _layers(_tensors(file), str(file))

    @property
    def width(self) -> int:
        """Channels of the embeddings it takes."""
        return self._layers[0][0].shape[1]

    @torch.no_grad()
    def __call__(self, embeddings: Tensor) -> Tensor:
        """
        Args:
            embeddings: float32 `[N, D]` of norm 1.

        Returns:
            float32 `[N]`, about 1 (bad) to 10 (good).
        """
        x = embeddings
        for weight, bias in self._layers:
            x = torch.nn.functional.linear(x, weight, bias)
        return x[:, 0]


def _layers(state: dict[str, Any], where: str) -> list[tuple[Tensor, Tensor]]:
    places: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        found = LAYER.fullmatch(name)
        if found is None or not isinstance(tensor, Tensor):
            raise KinemaError(
                f"is not an aesthetic predictor: it holds {name!r}",
                where=where,
                hint="sac+logos+ava1-l14-linearMSE.pth of improved-aesthetic-predictor is one",
            )
        places.setdefault(int(found[1] or 0), {})[found[2]] = tensor.float()
    layers = [(p.get("weight"), p.get("bias")) for _, p in sorted(places.items())]
    width = None
    chain = []
    for weight, bias in layers:
        if (
            weight is None
            or bias is None
            or weight.ndim != 2
            or bias.shape != weight.shape[:1]
            or (width is not None and weight.shape[1] != width)
        ):
            break
        width = weight.shape[0]
        chain.append((weight, bias))
    if not chain or len(chain) < len(layers) or width != 1:
        sizes = ", ".join("none" if w is None else "x".join(map(str, w.shape)) for w, _ in layers)
        raise KinemaError(
            f"is not an aesthetic predictor: its linear layers ({sizes or 'none'}) do not lead to "
            "one value",
            where=where,
        )
    return chain


def _tensors(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise KinemaError(f"is damaged: {error}", where=str(file)) from None
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise KinemaError(
            "holds more than tensors, or is damaged; it is not read, as that could run its code",
            where=str(file),
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise KinemaError(f"is damaged: {reason}", where=str(file)) from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise KinemaError("is not a table of tensors", where=str(file))
    return content
