"""Near duplicates by perceptual hashes of frames.

A clip is a sequence of 64-bit hashes of frames. The distance of two clips is the mean Hamming
distance of their frames in bits, at the shift of at most two frames where it is smallest; at least
three quarters of the longer one must lie beside the other, and clips whose durations differ by more
than a quarter are never duplicates.

Comparing all pairs is out of the question for a million clips. Two frames that differ in few bits
agree in whole stretches of them: hashes are cut into 5 bands (of 13, 13, 13, 13 and 12 bits), and
clips are compared when frames of theirs agree in two bands or more (multi-index hashing, after
M. Norouzi, A. Punjani and D. Fleet, CVPR 2012). Frames 6 bits apart do so with probability 0.44,
and one of all the frames of a clip is enough: 0.94 for 5 frames; with 4 bits 0.998.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kinema.config.errors import KinemaError
from kinema.curation.dedup.stars import Pairs

BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))
"""First bit and number of bits."""
FRAMES = 8
"""Frames of a clip that are looked up by each pair of bands, chosen by their content, so that two
near copies choose the same ones."""
POPULAR = 200
"""Clips that may share a look-up value and all be compared: more of them have a frame that says
little (black, a title card), and only those that are alike otherwise too are compared."""
WINDOW = 8
"""Neighbours that are compared where a value is popular."""
SHIFT = 2
"""Frames that two clips may be shifted by."""
OVERLAP = 0.75
"""Share of the longer clip that must lie beside the other one, in frames and in seconds."""
BLOCK = 1 << 22
"""Frames that are compared at once."""

Words = NDArray[np.uint64]


class Frames:
    """Hashes of all clips, one after the other."""

    def __init__(self, words: Words, starts: NDArray[np.int64]) -> None:
        self.words = words
        self.starts = starts
        """[clips + 1]"""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        lengths: NDArray[np.int64] = np.diff(self.starts)
        return lengths

    @classmethod
    def parse(cls, column: pa.Array | pa.ChunkedArray) -> Frames:
        """Read a `phash` column: 16 hex digits for each frame, separated by spaces; missing or
        empty text is a clip without frames.

        Raises:
            KinemaError: something else is in it; names the row.
        """
        words, counts = [], []
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        for chunk in chunks:
            for first in range(0, len(chunk), 1 << 17):
                texts = pc.fill_null(chunk.slice(first, 1 << 17).cast(pa.large_string()), "")
                lists = pc.split_pattern(texts, " ")
                flat = pc.list_flatten(lists)
                empty = pc.equal(flat, "").to_numpy(zero_copy_only=False)
                parents = pc.list_parent_indices(lists).to_numpy()[~empty]
                flat = flat.filter(pa.array(~empty))
                counts.append(np.bincount(parents, minlength=len(texts)))
                words.append(_from_hex(flat, parents + sum(map(len, counts[:-1]))))
        lengths = np.concatenate(counts or [np.zeros(0, np.int64)])
        joined = np.concatenate(words or [np.zeros(0, np.uint64)])
        return cls(joined, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def take(self, clips: NDArray[np.int64]) -> Frames:
        """Some of the clips, in that order."""
        lengths = self.lengths[clips]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        frames = np.repeat(self.starts[clips] - starts[:-1], lengths) + np.arange(starts[-1])
        return Frames(self.words[frames], starts)


def _from_hex(texts: pa.Array, rows: NDArray[np.int64]) -> Words:
    if not len(texts):
        return np.zeros(0, np.uint64)
    sizes = pc.binary_length(texts).to_numpy()
    wrong = np.flatnonzero(sizes != 16)
    if not len(wrong):
        ends = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset :][: len(texts) + 1]
        digits = np.frombuffer(texts.buffers()[2], np.uint8)[ends[0] : ends[-1]]
        nibbles = _NIBBLE[digits.reshape(-1, 16)]
        wrong = np.flatnonzero((nibbles > 15).any(1))
    if len(wrong):
        raise KinemaError(
            f"column 'phash' holds {texts[int(wrong[0])].as_py()!r}, not 16 hex digits a frame",
            where=f"row {rows[wrong[0]]}",
        )
    pairs = nibbles[:, ::2] << 4 | nibbles[:, 1::2]
    words: Words = np.ascontiguousarray(pairs).view(">u8")[:, 0].astype(np.uint64)
    return words


_NIBBLE = np.full(256, 255, np.uint8)
for _digits in ("0123456789abcdef", "0123456789ABCDEF"):
    _NIBBLE[np.frombuffer(_digits.encode(), np.uint8)] = np.arange(16)


def equal_clips(frames: Frames, durations: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
    """For each clip the first one with the same frames (itself, if there is none before).

    Args:
        durations: seconds [clips], see `near_pairs`.
    """
    # Two multiplicative hashes of the whole sequence: 128 bits, so that equal means equal.
    place = np.arange(len(frames.words)) - np.repeat(frames.starts[:-1], frames.lengths)
    signs = []
    for odd in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F):
        mixed = _mix(frames.words ^ _mix(place.astype(np.uint64) * np.uint64(odd)))
        signs.append(_sums(mixed, frames.starts))
    table = np.stack([frames.lengths.astype(np.uint64), *signs], 1)
    _, first, inverse = np.unique(table, axis=0, return_index=True, return_inverse=True)
    same: NDArray[np.int64] = first[inverse.reshape(-1)]
    empty = frames.lengths == 0
    same[empty] = np.flatnonzero(empty)
    if durations is None:
        return same
    # A black clip of 2 s and one of 16 s are told apart: a few of each group stay.
    kept: dict[int, list[int]] = {}
    for clip in np.flatnonzero(same != np.arange(len(same))):
        alike = kept.setdefault(int(same[clip]), [int(same[clip])])
        fits = [other for other in alike if _as_long(durations[clip], durations[other])]
        if fits:
            same[clip] = fits[0]
        else:
            same[clip] = clip
            alike.append(int(clip))
    return same


def _as_long(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether durations are near enough; one that is not known is near to any."""
    as_long: NDArray[np.bool_] = ~(np.minimum(one, other) < OVERLAP * np.maximum(one, other))
    return as_long


def _mix(words: Words) -> Words:
    """Spread every bit over all 64 (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _sums(values: Words, starts: NDArray[np.int64]) -> Words:
    with np.errstate(over="ignore"):
        total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values, dtype=np.uint64)])
        return total[starts[1:]] - total[starts[:-1]]


def near_pairs(frames: Frames, most: float, durations: NDArray[np.float64] | None = None) -> Pairs:
    """Pairs of clips whose distance is at most `most` bits; `equal_clips` are taken out before.

    Args:
        durations: seconds [clips]; NaN or none: not known, anything goes with it.
    """
    if len(frames) < 2 or not len(frames.words):
        none = np.zeros(0, np.int64)
        return Pairs(none, none, np.zeros(0))
    found, apart = [np.zeros(0, np.uint64)], [np.zeros(0)]
    for candidates in _candidates(frames):  # one pair of bands after the other, to save memory
        first = (candidates >> np.uint64(32)).astype(np.int64)
        second = (candidates & np.uint64(0xFFFFFFFF)).astype(np.int64)
        distance = distances(frames, first, second)
        near = distance <= most
        if durations is not None:
            near &= _as_long(durations[first], durations[second])
        found.append(candidates[near])
        apart.append(distance[near])
    pairs, index = np.unique(np.concatenate(found), return_index=True)
    return Pairs(
        (pairs >> np.uint64(32)).astype(np.int64),
        (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64),
        np.concatenate(apart)[index],
    )


def _candidates(frames: Frames) -> Iterator[Words]:
    """Pairs that agree in two bands, as first << 32 | second, for each two bands."""
    clip = np.repeat(np.arange(len(frames), dtype=np.uint64), frames.lengths)
    bands = [frames.words >> np.uint64(first) & np.uint64((1 << bits) - 1) for first, bits in BANDS]
    middle = np.minimum(frames.starts[:-1] + frames.lengths // 2, len(frames.words) - 1)
    signature = _mix(frames.words[middle])
    for one, other in combinations(range(len(BANDS)), 2):
        value = bands[one] << np.uint64(13) | bands[other]
        order = np.lexsort((_mix(value), clip))
        value, owner = value[order], clip[order]
        fresh = np.r_[True, (value[1:] != value[:-1]) | (owner[1:] != owner[:-1])]
        value, owner = value[fresh], owner[fresh]
        begins = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
        sizes = np.diff(np.r_[begins, len(owner)])
        chosen = np.arange(len(owner)) - np.repeat(begins, sizes) < FRAMES
        value, owner = value[chosen], owner[chosen]
        yield _same_value(value, owner, signature)


def _same_value(value: Words, owner: Words, signature: Words) -> Words:
    """Pairs of clips with the same look-up value, as first << 32 | second."""
    order = np.lexsort((owner, value))
    value, owner = value[order], owner[order]
    begins = np.flatnonzero(np.r_[True, value[1:] != value[:-1]])
    sizes = np.diff(np.r_[begins, len(value)])
    popular = np.repeat(sizes > POPULAR, sizes)
    pairs = [_all_pairs(owner[~popular], sizes[sizes <= POPULAR])]
    if popular.any():
        value, owner = value[popular], owner[popular]
        order = np.lexsort((owner, signature[owner.astype(np.int64)], value))
        value, owner = value[order], owner[order]
        for step in range(1, WINDOW + 1):
            same = value[step:] == value[:-step]
            pairs.append(_packed(owner[:-step][same], owner[step:][same]))
    return np.unique(np.concatenate(pairs))


def _all_pairs(owner: Words, sizes: NDArray[np.int64]) -> Words:
    """All pairs within stretches of these sizes."""
    begins = np.cumsum(sizes) - sizes
    pairs = [np.zeros(0, np.uint64)]
    for size in np.unique(sizes[sizes > 1]):
        one, other = np.triu_indices(size, 1)
        here = begins[sizes == size]
        step = max(1, BLOCK // len(one))
        for first in range(0, len(here), step):
            block = here[first : first + step, None]
            pairs.append(_packed(owner[block + one].ravel(), owner[block + other].ravel()))
    return np.concatenate(pairs)


def _packed(one: Words, other: Words) -> Words:
    low, high = np.minimum(one, other), np.maximum(one, other)
    return low << np.uint64(32) | high


def distances(
    frames: Frames, first: NDArray[np.int64], second: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The distance of each pair in bits; infinite where lengths are too different."""
    lengths = frames.lengths
    best = np.full(len(first), np.inf)
    step = max(1, BLOCK // max(1, int(lengths.max(initial=1))))
    for begin in range(0, len(first), step):
        one, other = first[begin : begin + step], second[begin : begin + step]
        for shift in range(-SHIFT, SHIFT + 1):
            apart = _at_shift(frames, one, other, lengths, shift)
            best[begin : begin + step] = np.minimum(best[begin : begin + step], apart)
    return best


def _at_shift(
    frames: Frames,
    one: NDArray[np.int64],
    other: NDArray[np.int64],
    lengths: NDArray[np.int64],
    shift: int,
) -> NDArray[np.float64]:
    skip_one, skip_other = max(shift, 0), max(-shift, 0)
    beside = np.minimum(lengths[one] - skip_one, lengths[other] - skip_other)
    longer = np.maximum(lengths[one], lengths[other])
    usable = np.flatnonzero((beside > 0) & (beside >= OVERLAP * longer))
    found = np.full(len(one), np.inf)
    if not len(usable):
        return found
    beside = beside[usable]
    begins = np.cumsum(beside) - beside
    place = np.arange(int(beside.sum())) - np.repeat(begins, beside)
    left = np.repeat(frames.starts[one[usable]] + skip_one, beside) + place
    right = np.repeat(frames.starts[other[usable]] + skip_other, beside) + place
    bits = np.bitwise_count(frames.words[left] ^ frames.words[right])
    found[usable] = np.add.reduceat(bits.astype(np.int64), begins) / beside
    return found
