"""File names that users of Open-Sora 1.x know."""

from __future__ import annotations

import re

LONGEST = 200
"""Bytes of a file name made from a prompt; file systems take 255, endings included."""


def published_stem(
    *,
    number: int,
    prompt: str,
    sample_name: str | None = None,
    prompt_as_path: bool = False,
    num_samples: int = 1,
    sample: int = 0,
) -> str:
    """A file's name without its ending, as `get_save_path_name` of 1.2 makes it.

    Args:
        number: of the prompt, from 0: `sample_0003`.
        sample_name: goes in front, in place of `sample`.
        prompt_as_path: the prompt itself instead of the number (for VBench), with what a file name
            cannot hold replaced by `_`.
        num_samples: of each prompt; several are told apart by `-0`, `-1`, ...
        sample: which of them.
    """
    if prompt_as_path:
        stem = _as_file_name((sample_name or "") + prompt)
    else:
        stem = f"{_as_file_name(sample_name) if sample_name else 'sample'}_{number:04d}"
    return stem if num_samples == 1 else f"{stem}-{sample}"


def _as_file_name(text: str) -> str:
    """One name in the folder it is meant for: no separators, nothing hidden, not too long."""
    name = re.sub(r"[/\\\x00-\x1f]", "_", text)
    if name.startswith("."):
        name = "_" + name[1:]
    return name.encode()[:LONGEST].decode(errors="ignore")
