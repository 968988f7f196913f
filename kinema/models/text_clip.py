"""CLIP's text encoder, from a local folder of published weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema.config.errors import KinemaError
from kinema.models.config_text import CLIPTextConfig
from kinema.models.pretrained import PretrainedFolder, require_transformers
from kinema.models.text import TextEncoder, TextFeatures

TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
EXAMPLE = "openai/clip-vit-base-patch32"


class CLIPTextEncoder(TextEncoder):
    """One vector per caption: CLIP's normalised state of the end marker, before the projection
    into the space that text and images share (transformers' `pooler_output`).

    Open-Sora 1.0 trained DiT and Latte with it. Captions are not cleaned. The encoder is small
    (63M parameters in ViT-B/32), so it stays in float32.
    """

    config: CLIPTextConfig

    def __init__(self, config: CLIPTextConfig, weights: Path | None) -> None:
        """
        Args:
            weights: folder of a CLIP model or of its text side, with its tokenizer.

        Raises:
            KinemaError: missing packages or files, weights of another model or width.
        """
        self.config = config
        self._transformers: Any = require_transformers("CLIP", "CLIPTextModel")
        self._folder = PretrainedFolder.find(
            weights, "CLIP", tokenizers=TOKENIZERS, example=EXAMPLE
        )
        self._check(self._folder.config)
        try:
            self._tokenizer: Any = self._transformers.CLIPTokenizer.from_pretrained(
                self._folder.path, local_files_only=True
            )
        except Exception as error:  # the readers of these files raise whatever they like
            raise KinemaError(
                f"the tokenizer cannot be read: {error}",
                where=str(self._folder.path / self._folder.tokenizer[0]),
                hint=f"copy it again from {EXAMPLE}",
            ) from None
        self._device = torch.device("cpu")
        self._network: Any = None
        self._weights_id: str | None = None

    def _check(self, found: dict[str, Any]) -> None:
        where = str(self._folder.path / "config.json")
        if found.get("model_type") not in ("clip", "clip_text_model"):
            kind = found.get("model_type")
            raise KinemaError(f"describes a {kind!r} model, not CLIP", where=where)
        text = found.get("text_config", found)
        # config.json leaves out what has the class's own value.
        defaults = self._transformers.CLIPTextConfig()
        width = text.get("hidden_size", defaults.hidden_size)
        places = text.get("max_position_embeddings", defaults.max_position_embeddings)
        if width != self.config.dim:
            raise KinemaError(
                f"this CLIP gives {width} channels (hidden_size), "
                f"the settings say {self.config.dim} (text.dim)",
                where=where,
                hint="ViT-B/32 gives 512, ViT-L/14 gives 768",
            )
        if self.config.max_tokens > places:
            raise KinemaError(
                f"this CLIP takes {places} tokens, the settings say {self.config.max_tokens} "
                "(text.max_tokens)",
                where=where,
            )

    @property
    def weights_id(self) -> str | None:
        if self._weights_id is None:
            self._weights_id = self._folder.fingerprint()
        return self._weights_id

    @property
    def memory_bytes(self) -> int:
        settings = self._transformers.CLIPTextConfig.from_pretrained(self._folder.path)
        with torch.device("meta"):
            network = self._transformers.CLIPTextModel(settings)
        return sum(p.numel() * 4 for p in network.parameters())

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """See `TextEncoder.encode`. y `[B, 1, D]`."""
        found = {text: self._pooled(text) for text in dict.fromkeys(texts)}
        y = torch.zeros(len(texts), 1, self.config.dim)
        for row, text in enumerate(texts):
            y[row, 0] = found[text]
        return TextFeatures(y, None)

    def lost(self, text: str) -> str:
        """See `TextEncoder.lost`; counted in tokens, of which begin and end take one each."""
        found = self._tokenizer(text, return_offsets_mapping=True, verbose=False)
        if len(found["input_ids"]) <= self.config.max_tokens:
            return ""
        start, _ = found["offset_mapping"][self.config.max_tokens - 1]
        return text[start:].strip()

    def to(self, device: torch.device | str) -> None:
        """See `TextEncoder.to`."""
        self._device = torch.device(device)
        if self._network is not None:
            self._network.to(self._device)

    def free(self) -> None:
        """See `TextEncoder.free`."""
        self._network = None

    def _pooled(self, text: str) -> Tensor:
        """float32 `[D]` on the CPU. Without padding: every token sees only those before it."""
        if self._network is None:
            self._network = self._load().to(self._device)
        ids = self._tokenizer(
            text, max_length=self.config.max_tokens, truncation=True, verbose=False
        )["input_ids"]
        found: Tensor = self._network(torch.tensor([ids], device=self._device)).pooler_output
        return found[0].float().cpu()

    def _load(self) -> Any:
        logger = logging.getLogger("transformers.modeling_utils")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it would list the image side as unexpected
        try:
            # Building the network draws initial values from PyTorch's own generator.
            with torch.random.fork_rng(devices=[]):
                network, report = self._transformers.CLIPTextModel.from_pretrained(
                    self._folder.path,
                    local_files_only=True,
                    dtype=torch.float32,
                    weights_only=True,
                    output_loading_info=True,
                )
        except Exception as error:  # the readers of these files raise whatever they like
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise KinemaError(
                f"the weights cannot be read: {reason}", where=str(self._folder.path)
            ) from None
        finally:
            logger.setLevel(level)
        if report["missing_keys"] or report["mismatched_keys"]:
            raise KinemaError(
                f"these are not the weights of the CLIP that config.json describes: "
                f"{len(report['missing_keys'])} missing, {len(report['mismatched_keys'])} of "
                "another shape",
                where=str(self._folder.path),
            )
        return network.eval().requires_grad_(False)
