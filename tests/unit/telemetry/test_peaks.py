from __future__ import annotations

import pytest

from kinema.telemetry.peaks import bf16_tflops
from kinema.training.gpus import GPUS

NAMES = {
    "a100-40": "NVIDIA A100-SXM4-40GB",
    "a100-80": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
    "l40s": "NVIDIA L40S",
    "4090": "NVIDIA GeForce RTX 4090",
}


@pytest.mark.parametrize("plan", GPUS)
def test_a_run_and_a_plan_mean_the_same_peak(plan: str) -> None:
    assert bf16_tflops(NAMES[plan]) == pytest.approx(GPUS[plan].peak / 1e12)


def test_boards_of_less_power_have_their_own_figures() -> None:
    assert bf16_tflops("NVIDIA H100 PCIe") == 756.5
    assert bf16_tflops("NVIDIA H100 NVL") == bf16_tflops("NVIDIA H200 NVL") == 835.5
    assert bf16_tflops("NVIDIA GB200") == 2500.0


@pytest.mark.parametrize(
    "name",
    ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40", "NVIDIA GeForce RTX 4090 D", "Tesla T4"],
)
def test_what_is_not_known_is_not_guessed(name: str) -> None:
    assert bf16_tflops(name) is None
