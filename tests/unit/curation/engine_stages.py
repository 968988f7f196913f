"""Stages for tests of the engine: what they are asked is written to a file, row by row."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from kinema.config.errors import KinemaError
from kinema.curation.stage import Bad, Found, Part, Places, Result, Row, Work


@dataclass(frozen=True)
class Double:
    """Gives `name` = twice the column `of`; notes each row that it is asked for."""

    name: str = "double"
    of: str = "value"
    version: int = 1
    batch: int = 2
    gpu: bool = False
    threads: int = 1
    bad: int | None = None
    """The value whose row is bad."""
    passing: bool = False
    dies: int | None = None
    """The value whose worker dies, while there is no file `died`."""
    always: bool = False
    """It dies each time."""
    hangs: int | None = None
    seconds: float = 0.0
    limit: float = 30.0
    offset: int | None = None
    """From this value on it gives one more."""

    @property
    def parts(self) -> Sequence[Part]:
        made_by = {"version": self.version}
        return [Part(self.name, {self.name: pa.int64()}, made_by, (self.of,))]

    def time_limit_s(self, row: Row) -> float:
        return self.limit

    def open(self, places: Places) -> Work:
        out = Path(places.out)

        def work(rows: Sequence[Row]) -> list[Result]:
            return [self._one(row, out) for row in rows]

        return work

    def _one(self, row: Row, out: Path) -> Result:
        assert row["todo"] == [self.name]
        value = row[self.of]
        if value == self.dies and (self.always or not (out / "died").exists()):
            (out / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if value == self.hangs:
            time.sleep(600)
        time.sleep(self.seconds)
        note(out, self.name, row)
        if value == self.bad:
            return {self.name: Bad("odd", f"{value} is odd", self.passing)}
        more = self.offset is not None and value >= self.offset
        return {self.name: {self.name: 2 * value + more}}


@dataclass(frozen=True)
class Powers:
    """Two parts from one look at a row: `square` and `cube` of its value."""

    versions: tuple[int, int] = (1, 1)
    bad: int | None = None
    """The value that has no cube."""
    name: str = "powers"
    batch: int = 3
    gpu: bool = False
    threads: int = 1

    @property
    def parts(self) -> Sequence[Part]:
        square, cube = self.versions
        return [
            Part("square", {"square": pa.int64()}, {"version": square}),
            Part("cube", {"cube": pa.int64(), "_root": pa.list_(pa.int64())}, {"version": cube}),
        ]

    def time_limit_s(self, row: Row) -> float:
        return 30.0

    def open(self, places: Places) -> Work:
        out = Path(places.out)

        def work(rows: Sequence[Row]) -> list[Result]:
            return [self._one(row, out) for row in rows]

        return work

    def _one(self, row: Row, out: Path) -> Result:
        value = row["value"]
        result: dict[str, Found] = {}
        for name in row["todo"]:
            note(out, name, row)
            result[name] = {"square": value**2}
            if name == "cube":
                result[name] = {"cube": value**3, "_root": [value] * value}
                if value == self.bad:
                    result[name] = Bad("round", f"{value} has no edges")
        return result


@dataclass(frozen=True)
class Where:
    """Gives the process that it ran in, and a variable of its environment."""

    variable: str = "OMP_NUM_THREADS"
    name: str = "where"
    batch: int = 1
    gpu: bool = False
    threads: int = 1
    max_workers: int | None = None

    @property
    def parts(self) -> Sequence[Part]:
        return [Part("where", {"pid": pa.int64(), "variable": pa.string()}, {})]

    def time_limit_s(self, row: Row) -> float:
        return 30.0

    def open(self, places: Places) -> Work:
        def work(rows: Sequence[Row]) -> list[Result]:
            found = {"pid": os.getpid(), "variable": os.environ.get(self.variable)}
            return [{"where": found} for _ in rows]

        return work


@dataclass(frozen=True)
class Wrong:
    """A stage that does not do what a stage does, in the `way` that is asked for."""

    way: str
    name: str = "wrong"
    batch: int = 2
    gpu: bool = False
    threads: int = 1

    @property
    def parts(self) -> Sequence[Part]:
        return [Part("wrong", {"wrong": pa.int64()}, {})]

    def time_limit_s(self, row: Row) -> float:
        return 30.0

    def open(self, places: Places) -> Work:
        if self.way == "set-up":
            raise KinemaError("there is no model", where="models/none", hint="fetch it")

        def work(rows: Sequence[Row]) -> list[Result]:
            if self.way == "mistake":
                raise ZeroDivisionError("not by zero")
            if self.way == "disk":
                raise OSError(errno.ENOSPC, "No space left on device", "clips/x.mp4")
            if self.way == "few":
                return []
            if self.way == "part":
                return [{} for _ in rows]
            return [{"wrong": {"wrong": "a text"}} for _ in rows]

        return work


def note(out: Path, name: str, row: Row) -> None:
    """Write down that a row was asked for; one file says in which order, over all stages."""
    for file in (f"asked-{name}", "asked"):
        with (out / file).open("a") as lines:
            lines.write(f"{row['id']}\n" if file != "asked" else f"{name} {row['id']}\n")


def rows(count: int) -> pa.Table:
    """`id`, `state`, `path`, `value` 0, 1, 2, ..."""
    ids = [f"{i:032x}" for i in range(count)]
    paths = [f"clip-{i}.mp4" for i in range(count)]
    values = {"id": ids, "state": ["s"] * count, "path": paths, "value": list(range(count))}
    return pa.table(values)


def asked(out: Path, name: str) -> list[int]:
    """Rows that a stage was asked for, in order; with repetitions."""
    file = out / f"asked-{name}"
    return sorted(int(line, 16) for line in file.read_text().split()) if file.exists() else []


def order(out: Path) -> list[tuple[str, int]]:
    """(stage's or part's name, row), as they were asked for."""
    lines = [line.split() for line in (out / "asked").read_text().splitlines()]
    return [(name, int(row, 16)) for name, row in lines]
