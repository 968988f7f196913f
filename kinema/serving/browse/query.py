"""Which clips the page shows, in which order: worked out on Arrow columns, remembered in part."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kinema.config.errors import KinemaError
from kinema.data.manifest import Manifest
from kinema.serving.browse.columns import bin_counts, bin_edges, kind, plain
from kinema.serving.browse.edits import Edits

Mask = NDArray[np.bool_]
Rows = NDArray[np.int64]

SHOW = ("kept", "dropped", "all")
VALUES = 200
"""Different values of a text column that are counted."""
REMEMBERED = 48
"""Masks and orders that are kept, one byte or eight per row each."""
LOWER_BYTES = 512 << 20
"""Captions up to this size are held a second time in lower case."""


@dataclass(frozen=True)
class Query:
    """What was asked for."""

    filter: str = ""
    """An expression over columns (`kinema.data.expression`)."""
    search: str = ""
    """Words that the caption has, all of them, whatever their case; `"in quotes"` together."""
    show: str = "kept"
    """`kept`, `dropped` or `all`."""
    marked: bool = False
    edited: bool = False
    ranges: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Column of numbers -> least and greatest value, both inclusive."""
    values: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    """Other column -> values as text, None for no value."""
    sort: str = ""
    """A column; `""`: as in the manifest, `?`: shuffled."""
    descending: bool = False

    @classmethod
    def from_json(cls, text: str) -> Query:
        """The page's words.

        Raises:
            KinemaError: not a query.
        """
        try:
            data = json.loads(text or "{}")
            query = cls(
                filter=str(data.get("filter", "")).strip(),
                search=str(data.get("search", "")).strip(),
                show=str(data.get("show", "kept")),
                marked=bool(data.get("marked", False)),
                edited=bool(data.get("edited", False)),
                ranges={
                    str(name): (_number(low), _number(high))
                    for name, (low, high) in data.get("ranges", {}).items()
                },
                values={
                    str(name): tuple(None if v is None else str(v) for v in chosen)
                    for name, chosen in data.get("values", {}).items()
                },
                sort=str(data.get("sort", "")),
                descending=bool(data.get("descending", False)),
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise KinemaError(f"is not a query: {error}") from None
        if query.show not in SHOW:
            raise KinemaError(f"show is {query.show!r}, not one of {', '.join(SHOW)}")
        return query


class ClipTable:
    """A manifest with its edits, asked by the page; may be used from several threads."""

    def __init__(self, manifest: Manifest, edits: Edits) -> None:
        self.manifest = manifest
        self.edits = edits
        self._original = manifest.table
        self._lock = threading.RLock()
        self._memory: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._newest: dict[str, tuple[int, Any]] = {}

    def __len__(self) -> int:
        return len(self.manifest)

    @property
    def table(self) -> pa.Table:
        """The manifest's columns, captions as edited."""
        if not self.edits.texts:
            return self._original
        return self._latest("table", self._edited_table)

    def columns(self) -> list[dict[str, Any]]:
        """Name and kind (`number`, `text`, `bool`, `other`) of each column."""
        schema = self._original.schema
        return [{"name": f.name, "kind": kind(f.type)} for f in schema]

    def rows(self, query: Query) -> Rows:
        """The rows that `query` asks for, in its order.

        Raises:
            KinemaError: an unknown column, an expression that is none.
        """
        key = ("rows", repr(query), self.edits.revision)
        return self._remember(key, lambda: self._ordered(query))

    def mask(self, query: Query, *, without: str = "") -> Mask:
        """Bool [N], True for rows that `query` asks for.

        Args:
            without: leave this column's own range or values aside: what its histogram is of.
        """
        mask = self._shown(query.show)
        if query.filter:
            mask = mask & self._remember(
                ("filter", query.filter, self.edits.revision), lambda: self._filter(query.filter)
            )
        if query.search:
            mask = mask & self._remember(
                ("search", query.search, self.edits.revision), lambda: self._search(query.search)
            )
        if query.marked:
            mask = mask & self._these(self.edits.marked)
        if query.edited:
            mask = mask & self._these(self.edits.texts)
        for name, (low, high) in query.ranges.items():
            if name != without:
                find = partial(self._range, name, low, high)
                mask = mask & self._remember(("range", name, low, high), find)
        for name, chosen in query.values.items():
            if name != without:
                find = partial(self._values, name, chosen)
                mask = mask & self._remember(("values", name, chosen), find)
        return mask

    def hours(self, rows: Rows) -> float:
        """Hours of video in these rows (images count nothing)."""
        seconds = self._remember(("seconds",), self._seconds)
        return float(seconds[rows].sum() / 3600)

    def histogram(self, name: str, query: Query) -> dict[str, Any]:
        """How a column is distributed.

        Of numbers: `edges` (see `bin_edges`; the first and the last bin take all that is beyond),
        `all` (counts of the rows that `show` asks for) and `chosen` (those of the query without the
        column's own range), `missing` of both, `least` and `greatest`. Of other columns: `values`,
        the most frequent first, each `[value, all, chosen]`, and how many `others` there are.
        """
        base, chosen = self._shown(query.show), self.mask(query, without=name)
        if kind(self._column(name).type) == "number":
            return self._number_histogram(name, base, chosen)
        return self._value_counts(name, base, chosen)

    def row(self, row: int) -> dict[str, Any]:
        """All columns of a row as JSON values, with `_edited`, `_marked` and `_original` text."""
        found = {
            n: plain(self._original.column(n)[row].as_py()) for n in self._original.column_names
        }
        return found | self._state(row, found["text"])

    def cards(self, rows: Rows, names: list[str]) -> list[dict[str, Any]]:
        """What a card shows of each row: the named columns and its marks."""
        # `take` on a chunked column copies it whole first; single values do not.
        columns = {name: self._original.column(name) for name in names}
        cards = []
        for row in rows.tolist():
            values = {name: plain(column[row].as_py()) for name, column in columns.items()}
            cards.append({"row": row} | values | self._state(row, values.get("text", "")))
        return cards

    def _state(self, row: int, original: str) -> dict[str, Any]:
        edited = self.edits.texts.get(row)
        state: dict[str, Any] = {"_marked": row in self.edits.marked, "_edited": edited is not None}
        return state if edited is None else state | {"text": edited, "_original": original}

    def _remember(self, key: tuple[Any, ...], find: Callable[[], Any]) -> Any:
        with self._lock:
            if key in self._memory:
                self._memory.move_to_end(key)
                return self._memory[key]
        found = find()
        with self._lock:
            self._memory[key] = found
            while len(self._memory) > REMEMBERED:
                self._memory.popitem(last=False)
        return found

    def _latest(self, name: str, find: Callable[[], Any]) -> Any:
        """Something large that edits change: only the newest one is held."""
        revision = self.edits.revision
        with self._lock:
            known = self._newest.get(name)
            if known is not None and known[0] == revision:
                return known[1]
            found = find()
            self._newest[name] = (revision, found)
            return found

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self._original.column_names:
            raise KinemaError(
                f"there is no column {name!r}", hint=f"columns: {', '.join(self._names())}"
            )
        column = self._original.column(name)
        return (
            column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        )

    def _names(self) -> list[str]:
        return list(self._original.column_names)

    def _numbers(self, name: str) -> NDArray[np.float64]:
        def read() -> NDArray[np.float64]:
            column = self._column(name).cast(pa.float64(), safe=False)
            values: NDArray[np.float64] = column.to_numpy()
            return values

        return self._remember(("numbers", name), read)

    def _edited_table(self) -> pa.Table:
        texts = dict(self.edits.texts)
        rows = sorted(texts)
        mask = np.zeros(len(self), bool)
        mask[rows] = True
        new = pa.array([texts[row] for row in rows], pa.large_string())
        column = pc.replace_with_mask(
            self._original.column("text").combine_chunks(), pa.array(mask), new
        )
        return self._original.set_column(self._names().index("text"), "text", column)

    def _shown(self, show: str) -> Mask:
        if show == "all":
            return np.ones(len(self), bool)
        return self.manifest.kept if show == "kept" else ~self.manifest.kept

    def _these(self, rows: set[int] | dict[int, str]) -> Mask:
        mask = np.zeros(len(self), bool)
        mask[list(rows)] = True
        return mask

    def _filter(self, text: str) -> Mask:
        from kinema.data.expression import parse

        mask: Mask = np.asarray(parse(text).mask(self.table), bool)
        return mask

    def _search(self, text: str) -> Mask:
        lower = self._lower()
        column = self.table.column("text") if lower is None else lower
        mask = np.ones(len(self), bool)
        for word in words(text):
            if lower is not None:
                word = pc.utf8_lower(word).as_py()
            found = pc.match_substring(column, word, ignore_case=lower is None)
            mask &= found.to_numpy(zero_copy_only=False)
        return mask

    def _lower(self) -> pa.ChunkedArray | None:
        if self._original.column("text").nbytes > LOWER_BYTES:
            return None
        return self._latest("lower", lambda: pc.utf8_lower(self.table.column("text")))

    def _range(self, name: str, low: float | None, high: float | None) -> Mask:
        if kind(self._column(name).type) != "number":
            raise KinemaError(f"column {name!r} holds no numbers")
        values = self._numbers(name)
        mask = ~np.isnan(values)
        if low is not None:
            mask &= values >= low
        if high is not None:
            mask &= values <= high
        return mask

    def _values(self, name: str, chosen: tuple[str | None, ...]) -> Mask:
        column = self._as_text(name)
        wanted = pa.array([value for value in chosen if value is not None], pa.large_string())
        mask = pc.fill_null(pc.is_in(column, value_set=wanted), False)
        if None in chosen:
            mask = pc.or_(mask, pc.is_null(column))
        found: Mask = mask.to_numpy(zero_copy_only=False)
        return found

    def _as_text(self, name: str) -> pa.ChunkedArray:
        def read() -> pa.ChunkedArray:
            column = self._column(name)
            if kind(column.type) == "other":
                values = [None if v is None else str(plain(v)) for v in column.to_pylist()]
                return pa.chunked_array([pa.array(values, pa.large_string())])
            return column.cast(pa.large_string())

        return self._remember(("text", name), read)

    def _seconds(self) -> NDArray[np.float64]:
        frames, fps = self.manifest.column("num_frames"), self.manifest.column("fps")
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(fps > 0, frames / fps, 0.0)

    def _ordered(self, query: Query) -> Rows:
        mask = self.mask(query)
        if not query.sort:
            rows: Rows = np.flatnonzero(mask)
            return rows[::-1] if query.descending else rows
        order: Rows = self._remember(
            ("order", query.sort, query.descending),
            lambda: self._order(query.sort, query.descending),
        )
        ordered: Rows = order[mask[order]]
        return ordered

    def _order(self, name: str, descending: bool) -> Rows:
        if name == "?":
            shuffled: Rows = np.random.default_rng(0).permutation(len(self))
            return shuffled
        if kind(self._column(name).type) == "number":
            values = self._numbers(name)
            order = np.argsort(-values if descending else values, kind="stable")  # NaN is last
            return order.astype(np.int64)
        keys = [("", "descending" if descending else "ascending"), ("row", "ascending")]
        table = pa.table({"": self._as_text(name), "row": np.arange(len(self))})
        found: Rows = pc.sort_indices(table, sort_keys=keys).to_numpy().astype(np.int64)
        return found

    def _number_histogram(self, name: str, base: Mask, chosen: Mask) -> dict[str, Any]:
        values = self._numbers(name)
        finite = np.isfinite(values)
        shown = values[base & finite]
        result: dict[str, Any] = {
            "kind": "number",
            "missing": [int((base & ~finite).sum()), int((chosen & ~finite).sum())],
        }
        if not shown.size:
            return result | {"edges": [], "all": [], "chosen": []}
        edges = bin_edges(shown)
        return result | {
            "edges": edges.tolist(),
            "all": bin_counts(shown, edges),
            "chosen": bin_counts(values[chosen & finite], edges),
            "least": float(shown.min()),
            "greatest": float(shown.max()),
        }

    def _value_counts(self, name: str, base: Mask, chosen: Mask) -> dict[str, Any]:
        # Codes are the same for both counts; the dictionary is made once per column.
        codes, values = self._remember(("codes", name), lambda: self._encode(name))
        both = [np.bincount(codes[m], minlength=len(values)) for m in (base, chosen)]
        order = np.argsort(-both[0], kind="stable")
        order = order[both[0][order] > 0]
        listed = [[values[i], int(both[0][i]), int(both[1][i])] for i in order[:VALUES].tolist()]
        return {"kind": "values", "values": listed, "others": max(0, len(order) - VALUES)}

    def _encode(self, name: str) -> tuple[NDArray[np.int64], list[str | None]]:
        encoded = self._as_text(name).combine_chunks().dictionary_encode()
        values = encoded.dictionary.to_pylist()
        codes = pc.fill_null(encoded.indices, len(values)).to_numpy(zero_copy_only=False)
        return codes.astype(np.int64), [*values, None]


def words(search: str) -> list[str]:
    """The words of a search; what stands in double quotes is one."""
    parts = search.split('"')
    found = []
    for place, part in enumerate(parts):
        found += [part] if place % 2 else part.split()
    return [word for word in found if word]


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
