"""GPUs that a run can be planned for, with figures of the makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from kinema.config.errors import KinemaError


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    Attributes:
        name: as `--gpu` takes it.
        memory: bytes that PyTorch finds on it (somewhat less than its name says).
        peak: dense bf16 FLOP/s with float32 sums, without sparsity.
        link: bytes/s to the other GPUs of its machine, in one direction.
        source: the data sheet.
    """

    name: str
    memory: int
    peak: float
    link: float
    source: str


def _gpu(name: str, gib: float, tflops: float, gbytes: float, source: str) -> GPU:
    return GPU(name, int(gib * 2**30), tflops * 1e12, gbytes * 1e9, source)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40", 39.4, 312, 300, "NVIDIA A100 data sheet, SXM 40 GB, 2021"),
        _gpu("a100-80", 79.2, 312, 300, "NVIDIA A100 data sheet, SXM 80 GB, 2021"),
        _gpu("h100", 79.1, 989.4, 450, "NVIDIA H100 data sheet, SXM 80 GB, 2023"),
        _gpu("h200", 139.8, 989.4, 450, "NVIDIA H200 data sheet, SXM 141 GB, 2024"),
        _gpu("b200", 178.3, 2250, 900, "NVIDIA DGX B200 data sheet, an eighth of it, 2024"),
        _gpu("l40s", 44.4, 362, 32, "NVIDIA L40S data sheet, PCIe 4.0, 2023"),
        _gpu("4090", 23.5, 165.2, 32, "NVIDIA Ada architecture paper, GeForce RTX 4090, 2023"),
    )
}  # fmt: skip


def find_gpu(name: str) -> GPU:
    """A GPU by the name that `--gpu` takes, in any case.

    Raises:
        KinemaError: an unknown one; names the nearest and all.
    """
    wanted = name.lower().removeprefix("nvidia-").replace("_", "-")
    if wanted in GPUS:
        return GPUS[wanted]
    near = get_close_matches(wanted, GPUS, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise KinemaError(
        f"nothing is known of the GPU {name!r}",
        where="--gpu",
        hint=f"{guess}one of {', '.join(GPUS)}",
    )
