"""What a demo ran on: enough to compare times, nothing that names the machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch


def machine_facts() -> dict[str, str]:
    """Name -> value, for people."""
    facts = {
        "processor": f"{_processor()}, {_cores()} cores usable",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "PyTorch": f"{torch.__version__}, {torch.get_num_threads()} threads",
    }
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
    return facts


def _cores() -> int:
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
