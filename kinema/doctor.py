"""What this machine has, what Kinema can use of it, and what to do about the rest.

Every check returns findings; none of them raises, and none needs an optional package.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "note", "problem"]

MIN_TORCH = (2, 11)
MIN_FREE_DISK_GIB = 5.0
MIN_SHARED_MEMORY_GIB = 1.0
EXTRAS = {
    "pretrained": ("transformers", "released text encoders, captioners and scores"),
    "curate": ("rapidocr", "raw videos to a training set"),
    "serve": ("fastapi", "pages in the browser"),
    "stores": ("fsspec", "s3://, gs:// and the like"),
    "ray": ("ray", "curation on a cluster"),
    "wandb": ("wandb", "logging runs to Weights & Biases"),
}
"""Extra of the package -> (module it brings, what it is for)."""
NEEDED_CODECS = {"h264": "r", "libx264": "w", "hevc": "r", "vp9": "r", "av1": "r", "mpeg4": "r"}
"""Codec -> read or write, of the FFmpeg inside PyAV."""


@dataclass(frozen=True)
class Finding:
    name: str
    status: Status
    detail: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def examine(folder: Path) -> list[Finding]:
    """All findings; `folder` is where data and runs will be written (for its free disk)."""
    findings: list[Finding] = []
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _torch,
        _accelerators,
        _attention,
        _codecs,
        lambda: _disk(folder),
        _memory,
        _threads,
        _extras,
    ]
    for check in checks:
        findings.extend(check())
    return findings


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    yield Finding("python", "ok", f"{version} on {platform.system()} {platform.machine()}")


def _torch() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        yield Finding("torch", "problem", "not installed", "pip install 'torch>=2.11'")
        return
    import torch

    version = tuple(int(p) for p in torch.__version__.split("+")[0].split(".")[:2])
    if version < MIN_TORCH:
        yield Finding("torch", "problem", torch.__version__, "pip install -U 'torch>=2.11'")
    else:
        yield Finding("torch", "ok", torch.__version__)
    # An installed torchvision of another build breaks transformers and diffusers for everyone.
    if importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError, OSError) as error:
            yield Finding(
                "torchvision",
                "problem",
                f"installed but does not import: {str(error).splitlines()[0]}",
                "pip uninstall torchvision (Kinema does not use it)",
            )


def _accelerators() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            yield Finding(
                f"gpu {index}",
                "ok",
                f"{device.name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, "
                f"compute {device.major}.{device.minor}, CUDA {torch.version.cuda}",
            )
    elif torch.backends.mps.is_available():
        yield Finding("gpu", "ok", "Apple GPU (MPS): for generation")
    elif torch.version.cuda:
        yield Finding(
            "gpu",
            "note",
            f"torch is built for CUDA {torch.version.cuda} but sees no GPU",
            "with a GPU: check the driver with nvidia-smi; without: the CPU is used",
        )
    else:
        yield Finding("gpu", "note", "none; the CPU build of torch is installed", "tiny/ recipes")


def _attention() -> Iterator[Finding]:
    """Which kernels run here, which one "auto" comes to, and why not the others."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    from kinema.models.attention_kernels import (
        BACKENDS,
        USUAL_HEAD_DIM,
        is_hopper,
        picked_by_auto,
        why_not,
    )

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    reasons = {name: why_not(name, device, dtype, USUAL_HEAD_DIM) for name in BACKENDS}
    run = [name for name, reason in reasons.items() if reason is None and name != "auto"]
    picked = picked_by_auto(device, dtype, USUAL_HEAD_DIM)
    yield Finding(
        "attention",
        "ok" if run != ["math"] else "note",
        f"auto takes {picked} on {device} in {str(dtype).removeprefix('torch.')}; "
        f"{', '.join(run)} run",
        "" if run != ["math"] else "only the slow kernel runs; update torch or the GPU driver",
    )
    for name, reason in reasons.items():
        if reason is not None:
            missed = name == "flash3" and on_gpu and is_hopper(device)
            yield Finding(
                f"attention {name}",
                "note",
                f"not here: {reason}",
                "build it from the folder hopper of Dao-AILab/flash-attention" if missed else "",
            )


def _codecs() -> Iterator[Finding]:
    try:
        import av
        from av.codec import Codec
    except ImportError as error:
        yield Finding("video", "problem", f"PyAV does not import: {error}", "pip install 'av>=18'")
        return
    missing = []
    for name, mode in NEEDED_CODECS.items():
        try:
            Codec(name, "w" if mode == "w" else "r")
        except ValueError:
            missing.append(f"{name} ({'writing' if mode == 'w' else 'reading'})")
    detail = (
        f"PyAV {av.__version__} with FFmpeg {'.'.join(map(str, av.library_versions['libavcodec']))}"
    )
    if missing:
        yield Finding(
            "video",
            "problem" if any("libx264" in m for m in missing) else "note",
            f"{detail}; lacks {', '.join(missing)}",
            "install the wheel from PyPI: pip install --force-reinstall --only-binary=av av",
        )
    else:
        yield Finding("video", "ok", f"{detail}: reads H.264, H.265, VP9, AV1; writes H.264")


def _disk(folder: Path) -> Iterator[Finding]:
    there = folder.resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free / 2**30
    if not there.is_dir():
        yield Finding("disk", "problem", f"{there} is a file, not a folder", "name a folder")
    elif not os.access(there, os.W_OK):
        yield Finding("disk", "problem", f"{there} is not writable", "choose another folder")
    elif free < MIN_FREE_DISK_GIB:
        yield Finding(
            "disk", "problem", f"{free:.1f} GiB free at {there}", "free some, or another folder"
        )
    else:
        yield Finding("disk", "ok", f"{free:.0f} GiB free at {there}")


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    yield Finding(
        "memory", "ok", f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB free"
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).free / 2**30
        enough = size >= MIN_SHARED_MEMORY_GIB
        yield Finding(
            "shared memory",
            "ok" if enough else "problem",
            f"{size:.1f} GiB free at {shared}",
            "" if enough else "data workers hand frames over there; docker run --shm-size=8g",
        )


def _threads() -> Iterator[Finding]:
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if policy.upper() == "PASSIVE":
        yield Finding("cores", "ok", f"{cores}, waiting threads sleep")
    else:
        yield Finding(
            "cores",
            "note",
            f"{cores}; OMP_WAIT_POLICY={policy or 'not set'}: waiting threads spin",
            "export OMP_WAIT_POLICY=PASSIVE (3-20 times faster on a busy CPU)",
        )


def _extras() -> Iterator[Finding]:
    for extra, (module, purpose) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(
                extra, "note", f"not installed ({purpose})", f"pip install 'kinema[{extra}]'"
            )
        else:
            yield Finding(extra, "ok", importlib.metadata.version(module))
