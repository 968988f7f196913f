"""The door to attention: backends agree, packed keys stay with their rows, big batches split."""

from __future__ import annotations

import inspect
import logging
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from kinema.config.errors import KinemaError
from kinema.models import attention
from kinema.models.attention import Packing, attend, attend_packed
from kinema.models.config import AttentionBackend

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)


@pytest.mark.parametrize("backend", ["auto", "math", "flash"])
def test_backends_agree(backend: AttentionBackend) -> None:
    q, k, v = draw(2, 5, 3, 8), draw(2, 7, 3, 8, seed=1), draw(2, 7, 3, 8, seed=2)
    torch.testing.assert_close(attend(q, k, v, backend=backend), reference(q, k, v))


def test_backend_that_cannot_run_is_not_replaced() -> None:
    q = draw(2, 5, 3, 8)
    with pytest.raises(KinemaError, match="'cudnn' cannot run on cpu in float32"):
        attend(q, q, q, backend="cudnn")
    with pytest.raises(KinemaError, match="'flash3' cannot run on cpu"):
        attend_packed(q, q[0], q[0], Packing.of([2, 3], CPU), backend="flash3")


def test_batches_larger_than_a_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (draw(11, 3, 2, 4, seed=s) for s in range(3))
    want = attend(q, k, v, backend="auto")
    calls: list[int] = []
    fused = F.scaled_dot_product_attention

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape[0])
        return fused(q, k, v)

    monkeypatch.setattr(attention, "MAX_ROWS", 4)
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    torch.testing.assert_close(attend(q, k, v, backend="auto"), want)
    assert calls == [4, 4, 3]


@pytest.mark.parametrize("lengths", [[3, 3, 3], [1, 4, 1, 2], [5, 0, 2, 0], [0, 0]])
def test_packed_keys_stay_with_their_row(lengths: list[int]) -> None:
    q = draw(len(lengths), 6, 2, 8).requires_grad_()
    k, v = (draw(sum(lengths), 2, 8, seed=s).requires_grad_() for s in (1, 2))
    got = attend_packed(q, k, v, Packing.of(lengths, CPU), backend="auto")
    rows = []
    for i, (kept, values) in enumerate(zip(k.split(lengths), v.split(lengths), strict=True)):
        row = q[i : i + 1]
        rows.append(
            reference(row, kept[None], values[None]) if lengths[i] else torch.zeros_like(row)
        )
    want = torch.cat(rows)
    torch.testing.assert_close(got, want)
    if sum(lengths):
        weights = draw(*want.shape, seed=3)
        got_grads = torch.autograd.grad((got * weights).sum(), (q, k, v))
        want_grads = torch.autograd.grad((want * weights).sum(), (q, k, v))
        torch.testing.assert_close(got_grads, want_grads)


def test_kernel_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    attention._log_once.cache_clear()
    q = draw(2, 5, 3, 8)
    with caplog.at_level(logging.INFO, logger="kinema.models.attention"):
        attend(q, q, q, backend="math")
        attend(q[:, :2], q, q, backend="math")
    assert [r.getMessage() for r in caplog.records] == [
        "self-attention on cpu in torch.float32: scaled_dot_product_attention, math"
    ]


def test_one_kernel_gets_what_it_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call for CUDA, on a stand-in that takes the same arguments."""
    signature = inspect.signature(varlen.varlen_attn)

    def stand_in(*args: Tensor, **kwargs: Tensor) -> Tensor:
        a = signature.bind(*args, **kwargs).arguments
        q_starts, k_starts = a["cu_seq_q"].tolist(), a["cu_seq_k"].tolist()
        assert a["cu_seq_q"].dtype == a["cu_seq_k"].dtype == torch.int32
        assert a["max_q"] == max(j - i for i, j in pairwise(q_starts))
        assert a["max_k"] == max(j - i for i, j in pairwise(k_starts))
        rows = []
        for (i, j), (m, n) in zip(pairwise(q_starts), pairwise(k_starts), strict=True):
            q, k, v = a["query"][None, i:j], a["key"][None, m:n], a["value"][None, m:n]
            rows.append(reference(q, k, v)[0])
        return torch.cat(rows)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    lengths = [4, 1, 2]
    q, k, v = draw(3, 6, 2, 8), draw(7, 2, 8, seed=1), draw(7, 2, 8, seed=2)
    packing = Packing.of(lengths, CPU)
    got = attention._attend_in_one(q, k, v, packing, "varlen")
    torch.testing.assert_close(got, attend_packed(q, k, v, packing, backend="auto"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_kernel_for_all_texts_on_cuda() -> None:
    lengths = [5, 300, 1, 77]
    q = draw(4, 130, 16, 72).cuda().bfloat16().requires_grad_()
    k, v = (draw(sum(lengths), 16, 72, seed=s).cuda().bfloat16().requires_grad_() for s in (1, 2))
    packing = Packing.of(lengths, q.device)
    one, many = (attend_packed(q, k, v, packing, backend=b) for b in ("auto", "math"))
    torch.testing.assert_close(one, many, atol=2e-2, rtol=2e-2)
    weights = torch.randn_like(one)
    got, want = (torch.autograd.grad((o * weights).sum(), (q, k, v)) for o in (one, many))
    torch.testing.assert_close(got, want, atol=5e-2, rtol=5e-2)
