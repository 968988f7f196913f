"""Which rank writes which weights: decided alike on every rank, without asking the others."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from kinema.checkpoint.weights import MAX_SHARD_BYTES

SMALL = 2**30
"""Bytes of weights that one rank writes alone; more are shared out, about so much to each."""


@dataclass(frozen=True)
class WeightsFile:
    """One file of weights of a checkpoint."""

    section: str
    """model or ema."""
    name: str
    rank: int
    """Writes it."""
    sizes: Mapping[str, int]
    """Bytes of its tensors, by name."""


def share_out(
    sections: Mapping[str, Mapping[str, Tensor]],
    ranks: int,
    *,
    small: int = SMALL,
    most: int = MAX_SHARD_BYTES,
) -> tuple[WeightsFile, ...]:
    """The files of all sections.

    A section is one file, `SECTION.safetensors`, where it is small or one process saves alone;
    otherwise it is cut, in the order of its tensors, into files of about equal size, which lie with
    ranks as far from each other as can be: each machine has a network card and a disk cache of its
    own. No file is much larger than `most`.

    Args:
        sections: state dicts by section; of sharded tensors the whole size counts.
        ranks: that save together.
        small: bytes; see `SMALL`.
        most: bytes.
    """
    cut = {}
    for section, tensors in sections.items():
        sizes = {n: math.prod(t.shape) * t.dtype.itemsize for n, t in tensors.items()}
        total = sum(sizes.values())
        count = math.ceil(total / most)
        if ranks > 1:
            count = max(count, min(ranks, math.ceil(total / small)))
        cut[section] = _cut(sizes, max(1, count))
    files = [(section, k, part) for section, parts in cut.items() for k, part in enumerate(parts)]
    return tuple(
        WeightsFile(section, _name(section, k, len(cut[section])), i * ranks // len(files), part)
        for i, (section, k, part) in enumerate(files)
    )


def index_of(files: Sequence[WeightsFile]) -> str:
    """The text of `SECTION.safetensors.index.json` for the files of one section."""
    weight_map = {name: file.name for file in files for name in file.sizes}
    total = sum(size for file in files for size in file.sizes.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)


def _cut(sizes: Mapping[str, int], count: int) -> list[dict[str, int]]:
    """Runs of about equal bytes, none of them empty."""
    total = sum(sizes.values())
    parts: list[dict[str, int]] = [{} for _ in range(count)]
    before = 0
    for name, size in sizes.items():
        # A tensor belongs where its middle lies.
        parts[min(count - 1, int((before + size / 2) * count / total) if total else 0)][name] = size
        before += size
    return [part for part in parts if part] or [{}]


def _name(section: str, number: int, count: int) -> str:
    if count == 1:
        return f"{section}.safetensors"
    return f"{section}-{number + 1:05d}-of-{count:05d}.safetensors"
