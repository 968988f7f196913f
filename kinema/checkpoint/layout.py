"""How the tensors of a network lie in a file: one description for reading and for writing.

A layout names, for each of our tensors, where it lies. Reading and writing follow the same entry,
so that a conversion there and back cannot differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kinema.checkpoint.errors import WeightsError

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What wrappers put in front of every name: data parallel, `torch.compile`, trainers."""


@dataclass(frozen=True)
class Stored:
    """Where one of our tensors lies."""

    names: tuple[str, ...]
    """Tensors of the file that hold it; several: equal parts of its rows, one after another."""
    without: int | None = None
    """An axis of length one that the file leaves out."""
    extra: int = 0
    """Axes of length one that the file has behind the others (a linear layer as a convolution)."""
    either: bool = False
    """Written with the axes that it has here; files with and without those are read."""
    copies: tuple[str, ...] = ()
    """Names under which the file holds the same once more."""

    def shapes(self, shape: torch.Size) -> tuple[torch.Size, ...]:
        """What each part may have as shape, given ours; the first is how it is written."""
        whole = list(shape)
        if self.without is not None:
            assert whole[self.without] == 1, f"axis {self.without} of {whole} is not one"
            whole.pop(self.without)
        whole += [1] * self.extra
        accepted = [list(shape), whole] if self.either else [whole]
        for part in accepted:
            if len(self.names) > 1:
                assert part[0] % len(self.names) == 0
                part[0] //= len(self.names)
        return tuple(dict.fromkeys(torch.Size(part) for part in accepted))

    def read(self, read: Callable[[str], Tensor], shape: torch.Size) -> Tensor:
        """Our tensor.

        Raises:
            WeightsError: copies of it in the file differ from each other.
        """
        parts = [read(name) for name in self.names]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        for name in self.copies:
            if not torch.equal(read(name), parts[0]):
                raise WeightsError(
                    f"{name} should be the same as {self.names[0]} and is not",
                    hint="one tensor here stands for both; these weights were trained otherwise",
                )
        return value.reshape(shape)

    def write(self, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the file for our tensor."""
        part_shape = self.shapes(value.shape)[0]
        for name, part in zip(self.names, value.chunk(len(self.names)), strict=True):
            yield name, part.reshape(part_shape)
        for name in self.copies:
            yield name, value.reshape(part_shape)


@dataclass(frozen=True)
class Layout:
    """The form of a file of weights for one network."""

    name: str
    stored: Mapping[str, Stored]
    """By our name."""
    computed: tuple[str, ...] = ()
    """Regular expressions of tensors that such files hold and that are computed here."""

    def prefixed(self, prefix: str) -> Layout:
        """The same with something in front of every name of the file."""
        if not prefix:
            return self
        stored = {
            ours: replace(
                s,
                names=tuple(prefix + n for n in s.names),
                copies=tuple(prefix + n for n in s.copies),
            )
            for ours, s in self.stored.items()
        }
        return Layout(self.name, stored, tuple(re.escape(prefix) + c for c in self.computed))

    def file_names(self) -> set[str]:
        return {n for s in self.stored.values() for n in (*s.names, *s.copies)}


@dataclass(frozen=True)
class Fit:
    """How a file and a network go together."""

    loaded: tuple[str, ...]
    """Our names."""
    missing: tuple[str, ...]
    """Names that the file should have, or ours where the layout has no place for them."""
    unexpected: tuple[str, ...]
    """Names of the file that the network has no place for (as the layout calls them here)."""
    unexpected_numbers: int = 0
    wrong_shape: tuple[str, ...] = field(default=())
    """With both shapes."""
    wrong_kind: tuple[str, ...] = field(default=())
    """Whole numbers against floating point, with both."""


def wrapper_prefix(names: Collection[str]) -> str:
    """What a wrapper put in front of every name of a file; "" if none did."""
    return next((p for p in PREFIXES if names and all(n.startswith(p) for n in names)), "")


def detect(shapes: Mapping[str, torch.Size], candidates: Sequence[Layout]) -> Layout:
    """The layout of a file: the one that leaves the fewest names over on both sides."""
    given, prefix = set(shapes), wrapper_prefix(shapes)

    def strangers(layout: Layout) -> int:
        names = layout.file_names()
        known = [n for n in given - names if any(re.fullmatch(c, n) for c in layout.computed)]
        return len(given ^ names) - len(known)

    options = [layout for c in candidates for layout in (c, c.prefixed(prefix))]
    return min(options, key=strangers)


def match(
    shapes: Mapping[str, torch.Size],
    layout: Layout,
    ours: Mapping[str, torch.Size],
    dtypes: Mapping[str, torch.dtype] | None = None,
    our_dtypes: Mapping[str, torch.dtype] | None = None,
) -> Fit:
    """Compare a file with a network, tensor by tensor.

    Args:
        shapes, dtypes: of the file's tensors.
        ours, our_dtypes: of the network's.
    """
    loaded, missing, wrong, kind = [], [], [], []
    for name, shape in ours.items():
        if name not in layout.stored:
            missing.append(name)
            continue
        stored = layout.stored[name]
        absent = [n for n in (*stored.names, *stored.copies) if n not in shapes]
        if absent:
            single = len(stored.names) == 1 and not stored.copies
            missing += [name] if single else absent
            continue
        accepted = stored.shapes(shape)
        bad = [n for n in (*stored.names, *stored.copies) if shapes[n] not in accepted]
        wrong += [f"{n} {list(shapes[n])} in the file, {list(accepted[0])} here" for n in bad]
        if dtypes is not None and our_dtypes is not None:
            # Between floating-point numbers, rounding is all that happens; integers may be
            # quantised.
            kind += [
                f"{n} {dtypes[n]} in the file, {our_dtypes[name]} here"
                for n in stored.names
                if dtypes[n].is_floating_point != our_dtypes[name].is_floating_point
            ]
        if not bad:
            loaded.append(name)
    used: set[str] = set()
    called: dict[str, str] = {}
    for name, stored in layout.stored.items():
        names = (*stored.names, *stored.copies)
        if name in ours:
            used.update(names)
        else:
            called |= dict.fromkeys(names, name)
    unexpected = [n for n in shapes if n not in used]
    return Fit(
        loaded=tuple(loaded),
        missing=tuple(missing),
        unexpected=tuple(called.get(n, n) for n in unexpected),
        unexpected_numbers=sum(shapes[n].numel() for n in unexpected),
        wrong_shape=tuple(wrong),
        wrong_kind=tuple(kind),
    )
