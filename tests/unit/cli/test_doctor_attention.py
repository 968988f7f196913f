"""What `kinema doctor` says of attention kernels."""

from __future__ import annotations

import pytest
import torch

from kinema.doctor import _attention
from kinema.models import attention_kernels
from kinema.models.attention_kernels import BACKENDS, USUAL_HEAD_DIM, picked_by_auto, why_not

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32


def test_every_backend_is_accounted_for() -> None:
    first, *others = _attention()
    assert first.name == "attention"
    taken = picked_by_auto(DEVICE, DTYPE, USUAL_HEAD_DIM)
    assert f"auto takes {taken} on {DEVICE.type}" in first.detail
    not_here = {finding.name: finding.detail for finding in others}
    for name in BACKENDS:
        reason = why_not(name, DEVICE, DTYPE, USUAL_HEAD_DIM)
        if reason is None:
            assert name in first.detail
            assert f"attention {name}" not in not_here
        else:
            assert reason in not_here[f"attention {name}"]


def test_only_the_slow_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_math(backend: str, *_: object) -> str | None:
        return None if backend in ("auto", "math") else "broken"

    monkeypatch.setattr(attention_kernels, "why_not", only_math)
    monkeypatch.setattr(attention_kernels, "picked_by_auto", lambda *_: "math")
    first, *others = _attention()
    assert first.status == "note"
    assert "only the slow kernel" in first.advice
    assert {f.detail for f in others} == {"not here: broken"}
    assert len(others) == len(BACKENDS) - 2


def test_flash3_is_advised_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention_kernels, "picked_by_auto", lambda *_: "flash")
    asked: list[tuple[str, torch.dtype]] = []

    def without_flash3(
        backend: str, device: torch.device, dtype: torch.dtype, _: int
    ) -> str | None:
        asked.append((device.type, dtype))
        return "not installed" if backend == "flash3" else None

    monkeypatch.setattr(attention_kernels, "why_not", without_flash3)
    first, flash3 = _attention()
    assert set(asked) == {("cuda", torch.bfloat16)}
    assert "auto takes flash on cuda in bfloat16" in first.detail
    assert flash3.name == "attention flash3"
    assert "flash-attention" in flash3.advice
