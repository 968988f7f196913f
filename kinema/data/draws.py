"""Random numbers by counter: a pure function of keys, for whole arrays at once.

A number depends on what it is for (seed, purpose, epoch, row, ...) and on nothing that was drawn
before, so that order, chunking and the number of processes cannot change it. The mixing function
is the finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
generators, OOPSLA 2014).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def key(*parts: int | str) -> np.uint64:
    """64 bits from what the numbers are for: `key(seed, "rows", epoch)`."""
    text = "/".join(str(p) for p in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def bits(base: np.uint64 | Array, counter: int | Array) -> Array:
    """64 random bits for each counter (or for each base, with one counter): uint64 array."""
    with np.errstate(over="ignore"):
        z = np.asarray(counter).astype(np.uint64) * _STEP + base
        z = np.atleast_1d(z)
        z ^= z >> np.uint64(30)
        z *= _FIRST
        z ^= z >> np.uint64(27)
        z *= _SECOND
        z ^= z >> np.uint64(31)
    return z


def uniform(base: np.uint64 | Array, counter: int | Array) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 random bits, shaped like `bits`."""
    whole: NDArray[np.float64] = (bits(base, counter) >> np.uint64(11)).astype(np.float64)
    return whole * 2.0**-53
