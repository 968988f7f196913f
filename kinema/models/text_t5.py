"""The encoder of T5 v1.1, from a local folder of published weights."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kinema.config.errors import KinemaError
from kinema.models.config_text import T5TextConfig
from kinema.models.pretrained import (
    PretrainedFolder,
    quiet_imports,
    require_transformers,
    return_freed_memory,
)
from kinema.models.text import TextEncoder, TextFeatures
from kinema.models.text_cleaning import prepare_caption

TOKENIZERS = (("tokenizer.json",), ("spiece.model",))
EXAMPLE = "DeepFloyd/t5-v1_1-xxl"
DECODER = ("decoder.", "lm_head.")
"""Beginnings of weights in files of a whole T5 that encoding has no use for."""
_EMBEDDING = "shared.weight"
_EMBEDDING_AGAIN = "encoder.embed_tokens.weight"  # a second name of the same weights
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}


class T5TextEncoder(TextEncoder):
    """Last hidden states of T5's encoder: what Open-Sora 1.x and PixArt condition on.

    The originals pad every caption to `max_tokens` and mask the padding away. Here each caption
    is encoded at its own length: its features are the same, do not depend on its neighbours, and
    short captions cost little. Null features for guidance are the transformer's own.
    """

    config: T5TextConfig

    def __init__(self, config: T5TextConfig, weights: Path | None) -> None:
        """
        Args:
            weights: folder with `config.json`, `tokenizer.json` or `spiece.model`, and weights as
                safetensors or PyTorch files, whole or in shards.

        Raises:
            KinemaError: missing packages or files, weights of another model or width.
        """
        self.config = config
        transformers = require_transformers("T5", "T5Config", "T5Tokenizer")
        self._folder = PretrainedFolder.find(weights, "T5", tokenizers=TOKENIZERS, example=EXAMPLE)
        self._check(self._folder.config)
        self._settings = transformers.T5Config.from_dict(self._folder.config)
        try:
            self._tokenizer: Any = transformers.T5Tokenizer.from_pretrained(
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
        if found.get("model_type") != "t5":
            raise KinemaError(f"describes a {found.get('model_type')!r} model, not T5", where=where)
        if found.get("d_model") != self.config.dim:
            raise KinemaError(
                f"this T5 gives {found.get('d_model')} channels (d_model), "
                f"the settings say {self.config.dim} (text.dim)",
                where=where,
                hint=f"use weights of that width; {EXAMPLE} has 4096",
            )

    @property
    def weights_id(self) -> str | None:
        if self._weights_id is None:
            self._weights_id = self._folder.fingerprint()
        return self._weights_id

    @property
    def memory_bytes(self) -> int:
        network = self._empty()
        size = sum(p.numel() for p in network.parameters()) * _dtype(self.config).itemsize
        if self.config.precision == "int8":
            for module in network.modules():
                if isinstance(module, nn.Linear):  # 1 byte a weight; scale and zero point per row
                    size -= module.weight.numel() - 5 * module.out_features
        return size

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """See `TextEncoder.encode`. y `[B, 1, max_tokens, D]`, zero at padding."""
        captions = [self._read(text) for text in texts]
        tokens = {c: self._tokens(c) for c in dict.fromkeys(captions)}
        found = dict(zip(tokens, self._states(list(tokens.values())), strict=True))
        y = torch.zeros(len(texts), 1, self.config.max_tokens, self.config.dim)
        mask = torch.zeros(len(texts), self.config.max_tokens, dtype=torch.bool)
        for row, caption in enumerate(captions):
            states = found[caption]
            y[row, 0, : len(states)] = states
            mask[row, : len(states)] = True
        return TextFeatures(y, mask)

    def lost(self, text: str) -> str:
        """See `TextEncoder.lost`; counted in tokens, of which the end marker takes one."""
        caption = self._read(text)
        found = self._tokenizer(caption, return_offsets_mapping=True, verbose=False)
        if len(found["input_ids"]) <= self.config.max_tokens:
            return ""
        start, _ = found["offset_mapping"][self.config.max_tokens - 1]
        return caption[start:].strip()

    def to(self, device: torch.device | str) -> None:
        """See `TextEncoder.to`. Weights not read yet will be read straight onto the device."""
        self._device = torch.device(device)
        if self._network is not None:
            self._network.to(self._device)

    def free(self) -> None:
        """See `TextEncoder.free`."""
        self._network = None
        gc.collect()  # transformers' modules know one another in circles
        return_freed_memory()

    def _read(self, text: str) -> str:
        return prepare_caption(text, clean=self.config.clean_caption)

    def _tokens(self, caption: str) -> list[int]:
        ids: list[int] = self._tokenizer(
            caption, max_length=self.config.max_tokens, truncation=True, verbose=False
        )["input_ids"]
        return ids

    def _states(self, captions: list[list[int]]) -> list[Tensor]:
        """float32 `[tokens, D]` of each, on the CPU."""
        if self._network is None:
            self._network = self._load()
        # Nothing here waits for the device until all captions are on their way to it.
        given = (torch.tensor([ids]).to(self._device, non_blocking=True) for ids in captions)
        states = [self._network(ids).last_hidden_state[0] for ids in given]
        return [of_one.float().cpu() for of_one in states]

    def _empty(self) -> Any:
        """The network on the meta device."""
        transformers = require_transformers("T5", "T5EncoderModel")
        with torch.device("meta"):
            return transformers.T5EncoderModel(self._settings)

    def _load(self) -> Any:
        """The network with its weights, which go to the device one after the other: at no time
        is there more than one of them twice, or in full precision."""
        network = self._empty()
        quantize = _quantizer() if self.config.precision == "int8" else None
        wanted = {name for name in network.state_dict() if name != _EMBEDDING_AGAIN}
        missing, unknown = set(wanted), []
        for name, tensor in self._folder.tensors():
            name = _EMBEDDING if name == _EMBEDDING_AGAIN else name
            if name.startswith(DECODER):
                continue
            if name not in wanted:
                unknown.append(name)
            elif name in missing:
                missing.remove(name)
                self._place(network, name, tensor, quantize)
        if missing or unknown:
            raise KinemaError(
                f"these are not the weights of the T5 encoder that config.json describes: "
                f"{_some(sorted(missing))} missing, {_some(sorted(unknown))} unknown",
                where=str(self._folder.path),
            )
        return network.eval().requires_grad_(False)

    def _place(self, network: Any, name: str, tensor: Tensor, quantize: Any) -> None:
        owner, _, attribute = name.rpartition(".")
        module = network.get_submodule(owner)
        shape = getattr(module, attribute).shape
        if tensor.shape != shape:
            raise KinemaError(
                f"{name} is {tuple(tensor.shape)}, config.json asks for {tuple(shape)}",
                where=str(self._folder.path),
            )
        # A copy even where nothing changes: the tensor is a view of the file.
        values = tensor.to(self._device, _dtype(self.config), copy=True)
        weight = nn.Parameter(values, requires_grad=False)
        setattr(module, attribute, weight)
        if name == _EMBEDDING:
            network.encoder.embed_tokens.weight = weight
        elif quantize is not None and isinstance(module, nn.Linear):
            quantize(module)
            del weight, values
            return_freed_memory()  # the weight in 16 bits, and torchao's copies of it


def _dtype(config: T5TextConfig) -> torch.dtype:
    return _DTYPES[config.precision]


def _quantizer() -> Any:
    """Turns the weight of a Linear into 8 bits, one scale per row."""
    try:
        with quiet_imports():
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise KinemaError(
            "8-bit weights need torchao, which is not installed",
            where="text.precision",
            hint="pip install 'kinema[pretrained]'",
        ) from None
    # Its compiler settings are for the whole process, and nothing is compiled here.
    config = Int8WeightOnlyConfig(set_inductor_config=False)
    return lambda module: quantize_(module, config)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} ({shown})" if names else "0"
