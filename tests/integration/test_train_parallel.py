"""Every proven way of training in parallel makes the step that one process makes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration.parallel_cases import CASES, LOSS_SCALE, Step, differences, reference_step

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def reference(precision: str, micro_batches: int, frozen: tuple[str, ...]) -> Step:
    return reference_step(precision, micro_batches, frozen)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, run once."""
    output = tmp_path_factory.mktemp("parallel")
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.parallel_driver", str(output)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output


@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_that_of_one_process(results: Path, name: str) -> None:
    case = CASES[name]
    got = Step(**torch.load(results / f"{name}.pt"))
    want, tolerance = reference(*case.reference), case.tolerance
    assert got.losses == pytest.approx(want.losses, rel=tolerance)
    assert got.norm == pytest.approx(want.norm, rel=tolerance)
    assert all(float(g.norm()) > 1e-7 for g in want.grads.values())
    assert not differences(got.grads, want.grads, tolerance)
    assert not differences(got.weights, want.weights, tolerance)
    assert not differences(got.average, want.average, tolerance)


def test_all_ranks_skip_an_update_that_overflows_on_one(results: Path) -> None:
    for rank in range(2):
        seen = json.loads((results / f"overflow-{rank}.json").read_text())
        assert seen.pop("own norm is finite") == (rank == 0)  # which rank it was is known
        assert seen == {"scale": LOSS_SCALE / 2, "norm is finite": False, "moved": False}


def test_at_most_twelve_cases() -> None:
    assert len(CASES) <= 12


def test_the_reference_is_a_step_that_clips_and_moves() -> None:
    step, plain = reference("fp32", 4, ()), reference("fp32", 8, ())
    assert step.norm > 1.0  # so that clipping has an effect
    assert differences(step.weights, plain.weights, 1e-3)  # other data, another step
    doubled = {name: 2 * grad for name, grad in step.grads.items()}
    assert len(differences(doubled, step.grads, 0.9)) == len(step.grads)


@pytest.mark.parametrize(("half", "tolerance"), [("bf16", 0.15), ("fp16", 0.02)])
def test_half_precision_is_near_float32(half: str, tolerance: float) -> None:
    got, want = reference(half, 4, ()), reference("fp32", 4, ())
    assert got.losses == pytest.approx(want.losses, rel=0.02)
    assert not differences(got.grads, want.grads, tolerance)
