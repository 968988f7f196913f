"""Columns as the page sees them: their kinds, their bins, their values as JSON."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

BINS = 40


def bin_edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges of a histogram: one bin per whole number where there are few, else BINS equal ones.

    Where a few far values would squeeze the others into one bin, edges span the middle 99 %.
    """
    low, high = float(values.min()), float(values.max())
    inner = np.percentile(values, (0.5, 99.5))
    if high - low > 4 * (inner[1] - inner[0]) > 0:
        low, high = float(inner[0]), float(inner[1])
    if high - low < BINS and (values == np.floor(values)).all():
        return np.arange(low, high + 2) - 0.5
    if high <= low:
        half = max(abs(low), 1.0) / 2
        return np.array([low - half, low + half])
    return np.linspace(low, high, BINS + 1)


def bin_counts(values: NDArray[np.float64], edges: NDArray[np.float64]) -> list[int]:
    """Values per bin; what is beyond the edges counts in the outer ones."""
    counts: list[int] = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()
    return counts


def kind(of: pa.DataType) -> str:
    """What the page takes a column for."""
    if pa.types.is_dictionary(of):
        of = of.value_type
    if pa.types.is_integer(of) or pa.types.is_floating(of) or pa.types.is_decimal(of):
        return "number"
    if pa.types.is_boolean(of):
        return "bool"
    if pa.types.is_string(of) or pa.types.is_large_string(of) or of == pa.string_view():
        return "text"
    return "other"


def plain(value: Any) -> Any:
    """A value as JSON has it: no NaN, nothing but text, numbers and lists of them."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return str(value)
