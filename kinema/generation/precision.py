"""Precisions and attention kernels by name, and what float32 means on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import get_args

import torch

from kinema.config.errors import KinemaError
from kinema.generation.config import PipelineConfig
from kinema.models.config import AttentionBackend, T5Precision, T5TextConfig

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""What weights are kept in. `tf32` has float32 weights and lets NVIDIA GPUs round the operands of
matrix products and convolutions to 10 bits; `fp32` never does."""


def check_dtype(name: str) -> str:
    """The name of a precision, if it is one.

    Raises:
        KinemaError: it is none.
    """
    if name not in DTYPES:
        raise KinemaError(f"dtype is {name!r}", hint=f"one of {', '.join(DTYPES)}")
    return name


def usual_dtype(device: torch.device) -> str:
    """The precision where none is asked for: bf16 on a GPU that computes in it, as the originals
    were run, float32 anywhere else."""
    # Older GPUs only imitate it, slower than float32.
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp32"


def check_attention(name: str) -> AttentionBackend:
    """The name of an attention kernel, if it is one.

    Raises:
        KinemaError: it is none.
    """
    known: tuple[AttentionBackend, ...] = get_args(AttentionBackend)
    for kernel in known:
        if kernel == name:
            return kernel
    raise KinemaError(f"attention is {name!r}", hint=f"one of {', '.join(known)}")


def with_attention(config: PipelineConfig, name: str) -> PipelineConfig:
    """The settings with another attention kernel in the transformer.

    Raises:
        KinemaError: there is no such kernel.
    """
    return replace(config, model=replace(config.model, attention=check_attention(name)))


def with_text_dtype(config: PipelineConfig, name: str) -> PipelineConfig:
    """The settings with another precision of T5's weights.

    Raises:
        KinemaError: no such precision, or a text encoder that has no choice.
    """
    text = config.text.config
    if not isinstance(text, T5TextConfig):
        raise KinemaError(
            f"the text encoder {text.type!r} has one precision", where="text_dtype",
            hint="leave it out",
        )  # fmt: skip
    known: tuple[T5Precision, ...] = get_args(T5Precision)
    for precision in known:
        if precision == name:
            new = replace(text, precision=precision)
            return replace(config, text=replace(config.text, config=new))
    raise KinemaError(f"text_dtype is {name!r}", hint=f"one of {', '.join(known)}")


def name_of(dtype: torch.dtype) -> str:
    """The name of the precision with weights of this kind; float32 is `fp32`."""
    return next(name for name, kind in DTYPES.items() if kind == dtype)


def vae_dtype_for(dtype: str) -> str:
    """The autoencoder's precision where only the transformer's is given.

    float16 is too narrow for the activations of image autoencoders (SDXL's is known to overflow).
    """
    return "fp32" if dtype == "fp16" else dtype


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Matrix products and convolutions on NVIDIA GPUs as the precision says, for a while.

    PyTorch's own settings would let convolutions round in float32 and matrix products not.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
