"""Stand-ins of hardware tools, and what the real ones say.

The texts are in the form that the tools document: `nvidia-smi --help-query-gpu`, its man page,
the kernel's sysfs documentation, chrony's manual. No such hardware was at hand. `Hardware` writes
tools and a root folder that say them; a host with `Hardware.environment` has that hardware.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

XID_79 = (
    "[  4200.123456] NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, "
    "GPU has fallen off the bus.\n"
)
XID_31_IN_JOURNAL = (
    "[  100.000001] node1 kernel: NVRM: Xid (PCI:0000:86:00): 31, pid=4711, name=python3, "
    "Ch 00000008, intr 10000000. MMU Fault: ENGINE GRAPHICS GPCCLIENT_T1_0\n"
)
LISTING_WITH_MIG = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f)
  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 1g.5gb      Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-aa111111-d268-c3f3-1b07-005d5ae1dc3f)
"""
NVLINK = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)
\t Link 0: 26.562 GB/s
\t Link 1: 26.562 GB/s
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-1)
\t Link 0: 26.562 GB/s
\t Link 1: {link}
"""
NVLINK_ERRORS = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)
\t Link 0: Replay Errors: 0
\t Link 0: Recovery Errors: 0
\t Link 0: CRC Errors: 0
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-1)
\t Link 0: Replay Errors: 2
\t Link 0: Recovery Errors: 0
\t Link 0: CRC Errors: 5
"""
NVLINK_QUIET = NVLINK_ERRORS.replace(": 2\n", ": 0\n").replace(": 5\n", ": 0\n")
CHRONY = """\
Reference ID    : A9FEA97B (169.254.169.123)
Stratum         : 4
Ref time (UTC)  : Sat Nov 21 15:00:00 2026
System time     : 0.000001501 seconds fast of NTP time
Last offset     : +0.000002107 seconds
RMS offset      : 0.000011212 seconds
Frequency       : 2.110 ppm slow
Residual freq   : +0.001 ppm
Skew            : 0.013 ppm
Root delay      : 0.000412102 seconds
Root dispersion : 0.000312101 seconds
Update interval : 16.1 seconds
Leap status     : {leap}
"""

_NVIDIA_SMI = """\
import json, sys
from pathlib import Path
table = json.loads((Path(__file__).parent / "nvidia.json").read_text())
words = sys.argv[1:]
if table["hangs"]:
    import time
    time.sleep(600)
if table["broken"]:
    sys.stdout.write(table["broken"] + "\\n")
    sys.exit(15)
if words[0] == "nvlink":
    sys.stdout.write(table["nvlink_errors" if words[1] == "-e" else "nvlink"])
elif words[0] == "-L":
    sys.stdout.write(table["listing"])
else:
    what, fields = words[0].removeprefix("--query-").split("=")
    rows = table[what]
    for name in fields.split(","):
        if name not in table["known"][what]:
            sys.stdout.write('Field "%s" is not a valid field to query.\\n' % name)
            sys.exit(2)
    for row in rows:
        sys.stdout.write(", ".join(str(row[name]) for name in fields.split(",")) + "\\n")
"""
_GPU: dict[str, object] = {
    "index": 0,
    "uuid": "GPU-0",
    "name": "NVIDIA H100 80GB HBM3",
    "utilization.gpu": 98,
    "memory.total": 81559,
    "memory.used": 70230,
    "power.draw": "652.31",
    "power.limit": "700.00",
    "temperature.gpu": 64,
    "clocks.sm": 1755,
    "clocks.max.sm": 1980,
    "clocks_event_reasons.active": "0x0000000000000004",
    "driver_version": "570.124.06",
    "persistence_mode": "Enabled",
    "mig.mode.current": "Disabled",
    "ecc.mode.current": "Enabled",
    "ecc.errors.uncorrected.volatile.total": 0,
    "ecc.errors.corrected.volatile.total": 0,
    "ecc.errors.uncorrected.aggregate.total": 0,
    "retired_pages.pending": "[N/A]",
    "pcie.link.width.current": 16,
    "pcie.link.width.max": 16,
}
_APP: dict[str, object] = {
    "gpu_uuid": "GPU-0",
    "pid": 1,
    "used_gpu_memory": 70000,
    "process_name": "/usr/bin/python3",
}
_ROW: dict[str, object] = {
    "gpu_uuid": "GPU-0",
    "remapped_rows.correctable": 0,
    "remapped_rows.uncorrectable": 0,
    "remapped_rows.pending": "No",
    "remapped_rows.failure": "No",
}


def gpu_row(index: int = 0, **changes: object) -> dict[str, object]:
    """What nvidia-smi knows of a healthy GPU, by the fields' names; changes with `__` for `.`."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return {**_GPU, "index": index, "uuid": f"GPU-{index}", **named}


def app_row(pid: int, index: int = 0, memory: object = 70000) -> dict[str, object]:
    return {**_APP, "gpu_uuid": f"GPU-{index}", "pid": pid, "used_gpu_memory": memory}


def rows_row(index: int = 0, **changes: str) -> dict[str, object]:
    named = {f"remapped_rows.{key}": value for key, value in changes.items()}
    return {**_ROW, "gpu_uuid": f"GPU-{index}", **named}


def csv(rows: list[dict[str, object]], fields: list[list[str]]) -> dict[str, object]:
    """What `on_node.nvidia.query` brings of such rows."""
    names = [first[0] for first in fields]
    lines = [", ".join(str(row[name]) for name in names) for row in rows]
    return {"text": "\n".join(lines), "problem": None, "fields": names}


@dataclass
class Hardware:
    """A node's hardware, as its tools and kernel tell of it.

    Attributes:
        folder: for `tools/` and `root/`.
        gpus, apps, rows: what nvidia-smi says; without `gpus` there is no nvidia-smi.
        clock_s: how far `date` is ahead.
    """

    folder: Path
    gpus: list[dict[str, object]] = field(default_factory=list)
    apps: list[dict[str, object]] = field(default_factory=list)
    rows: list[dict[str, object]] = field(default_factory=list)
    nvlink: str = ""
    nvlink_errors: str = ""
    broken: str = ""
    hangs: bool = False
    log: str = ""
    leap: str = "Normal"
    clock_s: float | None = None
    rate: str = "400 Gb/sec (4X NDR)"
    link_downed: int = 0
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def environment(self) -> dict[str, str]:
        """For a host of `cluster_fixtures.loopback`."""
        path = f"{self.folder / 'tools'}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": path, "KINEMA_NODE_ROOT": str(self.root), **self.variables}

    def write(self) -> Hardware:
        """Write tools and root, also again after a change."""
        tools = self.folder / "tools"
        tools.mkdir(parents=True, exist_ok=True)
        if self.gpus or self.broken:
            _tool(tools / "nvidia-smi", _NVIDIA_SMI)
            known = {"gpu": [*_GPU], "compute-apps": [*_APP], "remapped-rows": [*_ROW]}
            # As a driver before 535 has it: the field's new name is not known.
            known["gpu"].remove("clocks_event_reasons.active")
            known["gpu"].append("clocks_throttle_reasons.active")
            table = {
                "gpu": [
                    {**row, "clocks_throttle_reasons.active": row["clocks_event_reasons.active"]}
                    for row in self.gpus
                ],
                "compute-apps": self.apps,
                "remapped-rows": self.rows,
                "nvlink": self.nvlink,
                "nvlink_errors": self.nvlink_errors,
                "listing": "",
                "known": known,
                "broken": self.broken,
                "hangs": self.hangs,
            }
            _replace(tools / "nvidia.json", json.dumps(table))
        _tool(tools / "dmesg", f"import sys; sys.stdout.write({self.log!r})\n")
        said = CHRONY.format(leap=self.leap)
        _tool(tools / "chronyc", f"import sys; sys.stdout.write({said!r})\n")
        if self.clock_s is not None:
            text = f"import sys, time; sys.stdout.write('%.9f' % (time.time() + {self.clock_s}))\n"
            _tool(tools / "date", text)
        port = self.root / "sys/class/infiniband/mlx5_0/ports/1"
        self._file(port / "state", "4: ACTIVE")
        self._file(port / "phys_state", "5: LinkUp")
        self._file(port / "rate", self.rate)
        self._file(port / "link_layer", "InfiniBand")
        self._file(port / "counters/link_downed", str(self.link_downed))
        self._file(port / "counters/symbol_error", "0")
        card = self.root / "sys/class/net/eth0"
        self._file(card / "operstate", "up")
        self._file(card / "speed", "25000")
        self._file(card / "carrier_changes", "1")
        (card / "device").mkdir(exist_ok=True)
        self._file(self.root / "proc/uptime", "7800.00 100000.00")
        self._file(self.root / "proc/loadavg", "3.50 3.00 2.00 1/200 4711")
        self._file(self.root / "proc/meminfo", "MemTotal: 1000 kB\nMemAvailable: 250 kB\n")
        self._file(self.root / "proc/stat", "cpu  10 0 10 80 0 0 0 0 0 0\n")
        self._file(self.root / "proc/modules", "nvidia_peermem 16384 0 - Live 0x0\n")
        (self.root / "dev/shm").mkdir(parents=True, exist_ok=True)
        for index in range(len(self.gpus)):
            self._file(self.root / f"dev/nvidia{index}", "")
        return self

    def _file(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, text + "\n")

    def remove_port(self) -> None:
        shutil.rmtree(self.root / "sys/class/infiniband")


def _tool(path: Path, source: str) -> None:
    _replace(path, f"#!{sys.executable} -S\n{source}")
    path.chmod(0o755)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    os.replace(temporary, path)
