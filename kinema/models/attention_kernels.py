"""Which attention kernels run on a device, why the others do not, and what "auto" stands for.

The rule of "auto", in this order:

1. FlashAttention-3's own package, where it is installed and runs: a Hopper GPU (H100, H200), half
   precision, heads that it takes.
2. Otherwise `scaled_dot_product_attention`, which picks for itself: on CUDA in half precision its
   FlashAttention or cuDNN, in fp32 the memory-efficient kernel, on the CPU its fused kernel.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import re
import types
import warnings
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kinema.config.errors import KinemaError
from kinema.models.config import AttentionBackend

BACKENDS: tuple[AttentionBackend, ...] = get_args(AttentionBackend)
FLASH3_PACKAGE = "flash_attn_interface"
"""The module that FlashAttention-3 installs (folder `hopper` of its repository)."""
HOPPER = 9
"""Major compute capability."""
HALF = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
"""Of FlashAttention-3."""
PROBE_LENGTH = 16
USUAL_HEAD_DIM = 72
"""Of the released models of size XL/2."""

_SDPA_BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def check_backend(
    backend: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int = USUAL_HEAD_DIM,
) -> None:
    """Refuse a backend that cannot run, before any work is done.

    Args:
        backend: as configured; "auto" always runs.
        device, dtype: where and in what the model will compute.
        head_dim: channels of a head.

    Raises:
        KinemaError: it cannot; says why, and what can.
    """
    reason = why_not(backend, device, dtype, head_dim)
    if reason is None:
        return
    others = [b for b in BACKENDS if why_not(b, device, dtype, head_dim) is None]
    raise KinemaError(
        f"attention {backend!r} cannot run on {device} in {_name(dtype)}, {head_dim} channels a "
        f"head: {reason}",
        where="model.attention",
        hint=f"here run {', '.join(others)}; `kinema doctor` lists them",
    )


def choose(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> AttentionBackend:
    """The backend to call: "auto" is replaced by "flash3" where that runs, and otherwise means
    that PyTorch picks.

    Raises:
        KinemaError: a configured backend cannot run.
    """
    if device.type == "meta":  # only shapes and operations count there
        return "math" if backend == "math" else "auto"
    if backend == "auto":
        return "flash3" if why_not("flash3", device, dtype, head_dim) is None else "auto"
    check_backend(backend, device, dtype, head_dim)
    return backend


def picked_by_auto(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The kernel that "auto" comes to for a plain call, PyTorch's pick included."""
    if choose("auto", device, dtype, head_dim) == "flash3":
        return "flash3"
    q = _probe(device, dtype, head_dim).transpose(1, 2)
    picked = SDPBackend(torch._fused_sdp_choice(q, q, q))
    return next((name for name, sdpa in _SDPA_BACKENDS.items() if sdpa == picked), "math")


def is_hopper(device: torch.device) -> bool:
    """Whether a CUDA device is an H100, an H200 or another of their kind."""
    return torch.cuda.get_device_capability(device)[0] == HOPPER


@functools.cache
def why_not(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Why a backend cannot run; None if it can. Found out by running it once, forward, on zeros:
    what is compiled in is not always what works."""
    if backend in ("auto", "math") or device.type == "meta":
        return None
    reason = _why_not_flash3(device, dtype, head_dim) if backend == "flash3" else None
    if reason is not None:
        return reason
    if backend == "cudnn" and device.type != "cuda":
        return "it needs an NVIDIA GPU"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            # Kernels differ in what they take with gradients: those are the stricter limits. And
            # whoever asks may have switched autocast on, which would change the dtype.
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast(device.type, enabled=False),
            ):
                q = _probe(device, dtype, head_dim).requires_grad_()
                attend_dense(q, q, q, backend)
        except (RuntimeError, ImportError, OSError) as error:
            return _in_words(error, [str(w.message) for w in told])
    return None


def _in_words(error: Exception, warned: list[str]) -> str:
    """What PyTorch says about a kernel: in warnings, among others that say nothing new."""
    told = [w for w in warned if not re.search(r"because:|runtime disabled", w)]
    if told:
        return told[0].partition(" (Triggered internally")[0].rstrip(".")
    if re.search(r"No (viable|available)", str(error)):
        return "PyTorch has no such kernel for it"
    return str(error).partition("\n")[0].rstrip(".")


def _why_not_flash3(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return "it needs a Hopper GPU"
    if not is_hopper(device):
        major, minor = torch.cuda.get_device_capability(device)
        return f"it needs a Hopper GPU (compute 9.0), this one has {major}.{minor}"
    if dtype not in HALF:
        return f"it takes float16 and bfloat16, not {_name(dtype)}"
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"it takes heads of a multiple of 8 channels, at most {MAX_HEAD_DIM}"
    if importlib.util.find_spec(FLASH3_PACKAGE) is None:
        return f"the package {FLASH3_PACKAGE} (FlashAttention-3) is not installed"
    return None


def attend_dense(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend) -> Tensor:
    """Softmax attention of `[B, L, heads, D]` by one backend, as `choose` gave it."""
    if backend == "flash3":
        return _first(flash3().flash_attn_func(q, k, v))
    chosen = _SDPA_BACKENDS.get(backend)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    with contextlib.nullcontext() if chosen is None else sdpa_kernel(chosen):
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)


def attend_ragged_flash3(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, q_max: int, k_max: int
) -> Tensor:
    """Rows of uneven lengths, one after another: `[sum of lengths, heads, D]` each.

    Args:
        q_starts, k_starts: first token of each row, and the end: `[B + 1]` int32.
        q_max, k_max: longest row.
    """
    return _first(flash3().flash_attn_varlen_func(q, k, v, q_starts, k_starts, q_max, k_max))


def flash3() -> types.ModuleType:
    """FlashAttention-3's own package."""
    return importlib.import_module(FLASH3_PACKAGE)


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    # Its first releases return the sums of the softmax beside the result.
    return result[0] if isinstance(result, tuple) else result


def _probe(device: torch.device, dtype: torch.dtype, head_dim: int) -> Tensor:
    return torch.zeros(1, PROBE_LENGTH, 2, head_dim, device=device, dtype=dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
