"""Slurm's short way to write many node names: `gpu[01-03,07],login1`."""

from __future__ import annotations

import re

from kinema.config.errors import KinemaError

MOST = 100_000


def expand_nodes(text: str) -> list[str]:
    """The names that a node list of Slurm's stands for, in its order.

    Raises:
        KinemaError: brackets that do not close, or a range that makes no sense.
    """
    names = [name for part in _split(text) for name in _expand(part, text)]
    if not names:
        raise _wrong(text)
    return names


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth = [""], 0
    for sign in text.strip():
        depth += {"[": 1, "]": -1}.get(sign, 0)
        if depth not in (0, 1):
            raise _wrong(text)
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    if depth or not all(parts):
        raise _wrong(text)
    return parts


def _expand(part: str, text: str) -> list[str]:
    match = re.fullmatch(r"([^\[\]]*)\[([\d,-]+)\](.*)", part)
    if match is None:
        if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", part):
            raise _wrong(text)
        return [part]
    before, ranges, after = match.groups()
    names = []
    for piece in ranges.split(","):
        first, dash, last = piece.partition("-")
        last = last if dash else first
        if not first.isdecimal() or not last.isdecimal() or int(last) < int(first):
            raise _wrong(text)
        if int(last) - int(first) >= MOST:
            raise _wrong(text)
        numbers = range(int(first), int(last) + 1)
        names += [
            name for n in numbers for name in _expand(f"{before}{n:0{len(first)}d}{after}", text)
        ]
    return names


def _wrong(text: str) -> KinemaError:
    return KinemaError(
        f"{text!r} is no list of nodes", where="SLURM_JOB_NODELIST", hint="name a --hostfile"
    )
