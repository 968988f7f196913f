"""Which kernels run, what "auto" stands for, and FlashAttention-3's package on a stand-in."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import sys
import types
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kinema.config.errors import KinemaError
from kinema.models import attention, attention_kernels
from kinema.models.attention import Packing, attend, attend_packed
from kinema.models.attention_kernels import BACKENDS, check_backend, choose, picked_by_auto, why_not

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FLASH3 = attention_kernels.FLASH3_PACKAGE


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    why_not.cache_clear()
    yield
    why_not.cache_clear()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class StandIn(types.ModuleType):
    """Takes the arguments of FlashAttention-3's two functions by their names and order."""

    def __init__(self, tuples: bool = False) -> None:
        super().__init__(FLASH3)
        self.__spec__ = importlib.machinery.ModuleSpec(FLASH3, None)
        self.tuples = tuples  # as its first releases gave them
        self.calls: list[str] = []

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert softmax_scale is None
        assert not causal
        self.calls.append("dense")
        scores = torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5
        out = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)
        return (out, scores.logsumexp(-1)) if self.tuples else out

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert seqused_q is None
        assert seqused_k is None
        self.calls.append("ragged")
        rows = []
        spans = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        for (i, j), (m, n) in spans:
            assert j - i <= max_seqlen_q
            assert n - m <= max_seqlen_k
            scores = torch.einsum("lhd,mhd->hlm", q[i:j], k[m:n]) / q.shape[-1] ** 0.5
            rows.append(torch.einsum("hlm,mhd->lhd", scores.softmax(-1), v[m:n]))
        out = torch.cat(rows)
        return (out, out) if self.tuples else out


@pytest.fixture(params=[False, True])
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """FlashAttention-3 "installed", on a device that passes for a Hopper GPU."""
    module = StandIn(tuples=request.param)
    monkeypatch.setitem(sys.modules, FLASH3, module)
    monkeypatch.setattr(attention_kernels, "_why_not_flash3", lambda *_: None)
    return module


# FlashAttention-3


def test_auto_takes_flash3_where_it_runs(stand_in: StandIn) -> None:
    q, k, v = draw(2, 5, 3, 8), draw(2, 7, 3, 8, seed=1), draw(2, 7, 3, 8, seed=2)
    want = attend(q, k, v, backend="math")
    assert choose("auto", CPU, torch.float32, 8) == "flash3"
    assert picked_by_auto(CPU, torch.float32, 8) == "flash3"
    stand_in.calls.clear()
    for backend in ("auto", "flash3"):
        torch.testing.assert_close(attend(q, k, v, backend=backend), want)
    assert stand_in.calls == ["dense", "dense"]


def test_flash3_takes_uneven_texts_in_one_call(stand_in: StandIn) -> None:
    lengths = [4, 1, 2]
    q, k, v = draw(3, 6, 2, 8), draw(7, 2, 8, seed=1), draw(7, 2, 8, seed=2)
    packing = Packing.of(lengths, CPU)
    want = attend_packed(q, k, v, packing, backend="math")
    assert choose("flash3", CPU, torch.float32, 8) == "flash3"
    stand_in.calls.clear()
    torch.testing.assert_close(attend_packed(q, k, v, packing, backend="flash3"), want)
    assert stand_in.calls == ["ragged"]


def test_flash3_that_fails_is_not_taken(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.setattr(stand_in, "flash_attn_func", broken)
    assert why_not("flash3", CPU, torch.float32, 8) == "no kernel image is available"
    assert choose("auto", CPU, torch.float32, 8) == "auto"
    with pytest.raises(KinemaError, match="no kernel image"):
        choose("flash3", CPU, torch.float32, 8)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "installed", "reason"),
    [
        ((8, 0), torch.bfloat16, 72, True, "Hopper GPU .* has 8.0"),
        ((10, 0), torch.bfloat16, 72, True, "Hopper GPU .* has 10.0"),
        ((9, 0), torch.float32, 72, True, "not float32"),
        ((9, 0), torch.bfloat16, 12, True, "multiple of 8"),
        ((9, 0), torch.bfloat16, 512, True, "at most 256"),
        ((9, 0), torch.bfloat16, 72, False, "flash_attn_interface .* is not installed"),
    ],
)
def test_why_flash3_does_not_run(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    installed: bool,
    reason: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    spec = importlib.machinery.ModuleSpec(FLASH3, None) if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    told = why_not("flash3", GPU, dtype, head_dim)
    assert told is not None
    assert re.search(reason, told)


# The others


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_probe_is_what_it_says_whoever_asks(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, around: Callable[[], Any]
) -> None:
    seen: list[Tensor] = []

    def watched(q: Tensor, *_: Tensor) -> Tensor:
        seen.append(q)
        return q + 0

    monkeypatch.setattr(stand_in, "flash_attn_func", watched)
    with around(), torch.autocast("cpu", torch.bfloat16):
        assert why_not("flash3", CPU, torch.float32, 8) is None
    assert why_not("flash3", CPU, torch.float32, 8) is None  # remembered
    (q,) = seen
    assert q.dtype == torch.float32
    assert q.requires_grad
    assert not q.is_inference()


def test_refusal_says_why_and_what_runs() -> None:
    with pytest.raises(KinemaError) as refusal:
        check_backend("flash3", CPU, torch.float32)
    told = str(refusal.value)
    assert "'flash3' cannot run on cpu in float32" in told
    assert "it needs a Hopper GPU" in told
    assert "here run auto, math" in told
    check_backend("math", CPU, torch.float32)
    check_backend("auto", CPU, torch.bfloat16, head_dim=5)


def test_every_backend_runs_or_says_why_not() -> None:
    q = draw(1, 4, 2, 8)
    for backend in BACKENDS:
        reason = why_not(backend, CPU, torch.float32, 8)
        if reason is None:
            assert attend(q, q, q, backend=backend).shape == q.shape
        else:
            assert reason
            with pytest.raises(KinemaError):
                attend(q, q, q, backend=backend)
    assert picked_by_auto(CPU, torch.float32, 8) in ("flash", "math")


@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_device_takes_any(backend: attention.AttentionBackend) -> None:
    q = torch.empty(2, 5, 3, 8, device="meta", dtype=torch.bfloat16)
    assert attend(q, q, q, backend=backend).shape == q.shape
    packing = Packing.of([2, 3], q.device)
    assert attend_packed(q, q[0], q[0], packing, backend=backend).shape == q.shape


def test_what_pytorch_warns_is_the_reason() -> None:
    warned = [
        "Memory efficient kernel not used because: (Triggered internally at sdp.cpp:1.)",
        "Memory Efficient attention has been runtime disabled. (Triggered internally at s:2.)",
        "Flash attention kernel not used because: (Triggered internally at sdp.cpp:3.)",
        "Expected query to be of dtype: {Half, BFloat16}. (Triggered internally at sdp.cpp:4.)",
    ]
    told = attention_kernels._in_words(RuntimeError("No available kernel."), warned)
    assert told == "Expected query to be of dtype: {Half, BFloat16}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_agree_on_cuda() -> None:
    q, k, v = (draw(2, 40, 4, 72, seed=s).cuda().bfloat16() for s in range(3))
    want = attend(q.float(), k.float(), v.float(), backend="math")
    ran = [b for b in BACKENDS if why_not(b, q.device, q.dtype, 72) is None]
    assert {"auto", "math", "flash"} <= set(ran)
    for backend in ran:
        got = attend(q, k, v, backend=backend).float()
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
