"""Stages for tests of the engine: what they are asked is written to a file, row by row."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from kinema.curation.stage import Bad, Part, Places, Result, Row, Work


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
        with (out / f"asked-{self.name}").open("a") as file:
            file.write(f"{row['id']}\n")
        if value == self.bad:
            return {self.name: Bad("odd", f"{value} is odd", self.passing)}
        return {self.name: {self.name: 2 * value}}


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
