"""Xid errors: what the NVIDIA driver writes into the kernel's log when a GPU is in trouble.

Meanings and first moves: https://docs.nvidia.com/deploy/xid-errors/
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PAGE = "https://docs.nvidia.com/deploy/xid-errors/"
_PROGRAM = (
    "a fault of the program as a rule: find it with compute-sanitizer; if only this GPU has it, "
    "dcgmi diag -r 3"
)
_RESET = "take the node out, stop what runs on the GPU, nvidia-smi --gpu-reset, or restart it"


@dataclass(frozen=True)
class Meaning:
    """Of a number; `hardware`: the node should not train until it is cured."""

    what: str
    cure: str
    hardware: bool


MEANINGS: dict[int, Meaning] = {
    13: Meaning("a kernel on the GPU failed (graphics engine exception)", _PROGRAM, False),
    31: Meaning("a program touched memory that is not its own (page fault)", _PROGRAM, False),
    32: Meaning(
        "broken commands arrived over PCIe", "check PCIe errors in dmesg, the slot, risers", False
    ),
    43: Meaning("the GPU stopped a program after a fault of its own", _PROGRAM, False),
    45: Meaning(
        "a program was cut off: killed, or after another error",
        "look for the Xid before it; alone it is harmless",
        False,
    ),
    48: Meaning(
        "a double-bit memory error (ECC)", f"{_RESET}; if it comes again, have it replaced", True
    ),
    61: Meaning("the GPU's microcontroller stopped at a breakpoint", _RESET, True),
    62: Meaning("the GPU's microcontroller halted", _RESET, True),
    63: Meaning(
        "a bad memory row will be replaced by a spare one",
        "reset the GPU when it is free: nvidia-smi --gpu-reset",
        False,
    ),
    64: Meaning("a bad memory row could not be replaced", "have the GPU replaced", True),
    68: Meaning("the video decoder failed", _PROGRAM, False),
    69: Meaning("a program gave a wrong command (graphics engine class error)", _PROGRAM, False),
    74: Meaning(
        "an NVLink error",
        f"{_RESET}; nvidia-smi nvlink -e says which link; then bridge, board or NVSwitch",
        True,
    ),
    79: Meaning(
        "the GPU has fallen off the bus",
        "take the node out, power it off and on; if it comes again: seating, power, GPU",
        True,
    ),
    92: Meaning("many single-bit memory errors", "watch it; have it replaced if 48 follows", False),
    94: Meaning(
        "a memory error hit one program (contained ECC)",
        "start that program again; reset the GPU when it is free",
        False,
    ),
    95: Meaning("a memory error that may have hit any program (uncontained ECC)", _RESET, True),
    109: Meaning("a program did not give the GPU back in time", _PROGRAM, False),
    119: Meaning(
        "the GPU's system processor (GSP) does not answer", f"{_RESET}; update the driver", True
    ),
    120: Meaning("the GPU's system processor (GSP) failed", f"{_RESET}; update the driver", True),
    140: Meaning("a memory error that could not be corrected (ECC)", _RESET, True),
    143: Meaning("the GPU did not start up", "power the node off and on", True),
    154: Meaning(
        "the driver asks for a recovery", "nvidia-smi -q | grep -i recovery says which", False
    ),
}
MEANINGS |= {
    number: Meaning("an NVLink error (fifth generation)", f"{_RESET}; see {PAGE}", True)
    for number in range(144, 151)
}


@dataclass(frozen=True)
class Xid:
    """One line of the log.

    Attributes:
        at_s: seconds after the machine's start; None where the line has no time.
        device: the GPU's PCI address.
        text: what the driver adds.
    """

    number: int
    device: str
    at_s: float | None
    text: str

    @property
    def meaning(self) -> Meaning:
        unknown = Meaning("not in Kinema's table", f"look it up: {PAGE}", False)
        return MEANINGS.get(self.number, unknown)


_LINE = re.compile(r"(?:\[\s*([\d.]+)\])?.*?NVRM: Xid \((?:PCI:)?([^)]+)\): (\d+)(?:, (.*))?$")


def read(log: str) -> list[Xid]:
    """The Xid lines of a kernel log, `dmesg`'s or `journalctl -o short-monotonic`'s."""
    found = []
    for line in log.splitlines():
        match = _LINE.match(line)
        if match is not None:
            at, device, number, text = match.groups()
            found.append(Xid(int(number), device, float(at) if at else None, text or ""))
    return found
