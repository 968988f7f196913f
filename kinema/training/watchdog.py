"""A process beside the ranks of a machine that ends them when the run stands still.

    python -m kinema.training.watchdog FOLDER

It needs no torch and holds no lock of a rank, so that nothing that freezes one freezes it. It
reads the ranks' heartbeats (`training/heartbeat.py`) and tells the watchdogs of other machines
through a folder in the run. When a rank that others wait for makes no progress for too long, every
watchdog writes what its ranks were at, the first one writes the report, and all end their ranks,
for torchrun to start them anew.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kinema.training.culprit import Limits, Seen, silent, suspects
from kinema.training.heartbeat import HeartbeatReader, State
from kinema.training.stacks import decode_workers, process_state
from kinema.training.stall_report import collect, write_report

CONFIG = "watchdog.json"
OTHERS_S = 15.0
"""How long to wait for what the watchdogs of other machines found out."""
MOST_BETWEEN_WORDS_S = 10.0


@dataclass(frozen=True)
class Config:
    """What a watchdog is told.

    Attributes:
        parent: the process that it ends with.
        folder: private to this machine: heartbeats and answers of its ranks.
        shared: a folder that all machines see, for this start of the run alone.
        run: the run folder.
        ranks: (rank, process id) of this machine.
    """

    parent: int
    node: int
    nodes: int
    host: str
    folder: str
    shared: str
    run: str
    ranks: list[tuple[int, int]]
    limits: Limits

    def write(self, folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Config:
        values = json.loads((folder / CONFIG).read_text())
        values["ranks"] = [tuple(one) for one in values["ranks"]]
        return cls(**values | {"limits": Limits(**values["limits"])})


@dataclass
class _Other:
    """The watchdog of another machine, as far as it is heard of."""

    count: int = -1
    heard: float = 0.0
    seen: list[Seen] = field(default_factory=list)


class Watchdog:
    """The watch over the ranks of one machine."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._readers = {
            rank: HeartbeatReader(heartbeat_path(Path(config.folder), rank))
            for rank, _ in config.ranks
        }
        step = config.limits.step
        self._poll_s = min(1.0, step / 10)
        self._word_s = min(MOST_BETWEEN_WORDS_S, step / 4)
        self._awake = self._started = time.monotonic()
        self._spoken = float("-inf")
        self._words = 0
        self._others = {n: _Other() for n in range(config.nodes) if n != config.node}

    def run(self) -> bool:
        """Watch until the ranks stand still or the parent is gone; returns whether they did."""
        config = self._config
        before = time.monotonic()
        while os.getppid() == config.parent:
            time.sleep(self._poll_s)
            now = time.monotonic()
            if now - before > 5 * self._poll_s + 2:
                self._awake = now  # the whole machine stood still: a paused virtual one
            before = now
            seen = self.look(now)
            missing = self._exchange(seen, now) if config.nodes > 1 else []
            everyone = [*seen, *self._elsewhere(now)]
            own = any(one.idle_s > one.limit_s for one in seen)
            if self._called() or suspects(everyone) or (missing and own):
                self._end(everyone, missing)
                return True
        return False

    def look(self, now: float) -> list[Seen]:
        """The ranks of this machine."""
        found = []
        for rank, pid in self._config.ranks:
            state = self._readers[rank].read() or State(rank=rank, pid=pid, beat=self._started)
            found.append(
                Seen(
                    state,
                    node=self._config.node,
                    host=self._config.host,
                    idle_s=now - max(state.beat, self._awake),
                    limit_s=self._config.limits.of(state),
                    process=process_state(pid),
                )
            )
        return found

    # Other machines

    def _exchange(self, seen: Sequence[Seen], now: float) -> list[int]:
        """Tell and hear; returns the nodes that are silent."""
        shared, config = Path(self._config.shared), self._config
        if now - self._spoken >= self._word_s:
            self._spoken = now
            self._words += 1
            word = {"count": self._words, "seen": [asdict(one) for one in seen]}
            with suppress(OSError):  # a full disk must not end the watch
                write_json(shared / f"node-{config.node}.json", word)
            for node, other in self._others.items():
                self._hear(shared / f"node-{node}.json", other, now)
        limit = 4 * self._word_s + OTHERS_S
        heard = {n: now - max(o.heard, self._started) for n, o in self._others.items()}
        return silent(heard | {config.node: 0.0}, config.nodes, limit_s=limit)

    @staticmethod
    def _hear(path: Path, other: _Other, now: float) -> None:
        word = read_json(path)
        if word and word["count"] != other.count:
            other.count, other.heard = word["count"], now
            other.seen = [Seen(**one | {"state": State(**one["state"])}) for one in word["seen"]]

    def _elsewhere(self, now: float) -> list[Seen]:
        return [
            replace(one, idle_s=one.idle_s + now - other.heard)
            if one.idle_s > self._word_s
            else one  # it was well a moment ago: its next word tells
            for other in self._others.values()
            for one in other.seen
        ]

    def _called(self) -> bool:
        return self._config.nodes > 1 and (Path(self._config.shared) / "verdict.json").exists()

    # The end

    def _end(self, seen: list[Seen], missing: list[int]) -> None:
        config = self._config
        folder, first = self._claim()
        line = f"the run stood still; what was found is in {folder}"
        try:
            collect(folder, config.node, config.ranks, seen, self._readers, Path(config.folder))
            self._await([folder / f"node-{n}.json" for n in self._others if n not in missing])
            if first:
                write_report(folder, seen, missing)
            self._await([folder / "report.json"])
            line = (read_json(folder / "report.json") or {}).get("line", line)
            if first:
                self._note(line, folder)
        except OSError as error:
            line += f" (not all could be written: {error.strerror})"
        # Not SIGTERM: to a rank that means "save, and end as if all were well", and torchrun would
        # not start it again. Stopped first, so that none says a last word about the others.
        ranks = [pid for _, pid in config.ranks]
        # A decode worker ends with its rank by itself, but not while it is frozen.
        workers = [worker for pid in ranks for worker in decode_workers(pid)]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in (*ranks, *workers):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        sys.stderr.write(f"kinema: {line}\n")
        sys.stderr.flush()

    def _claim(self) -> tuple[Path, bool]:
        """The folder of this stall, the same on all machines, and whether this one made it."""
        name = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
        folder = Path(self._config.run) / "stalls" / name
        try:
            claim = os.open(
                Path(self._config.shared) / "verdict.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY
            )
        except FileExistsError:
            for _ in range(50):
                if said := read_json(Path(self._config.shared) / "verdict.json"):
                    return Path(self._config.run) / "stalls" / said["name"], False
                time.sleep(0.1)
            return folder, False
        except OSError:  # a full disk: what can be said is said on the screen
            return folder, True
        with os.fdopen(claim, "w") as file:
            file.write(json.dumps({"name": name, "node": self._config.node}))
        return folder, True

    def _await(self, files: Sequence[Path]) -> None:
        until = time.monotonic() + OTHERS_S
        while time.monotonic() < until and not all(file.exists() for file in files):
            time.sleep(0.2)

    def _note(self, line: str, folder: Path) -> None:
        event = {
            "event": "stalled",
            "report": str(folder.relative_to(self._config.run)),
            "culprit": line,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        with (Path(self._config.run) / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, ensure_ascii=False) + "\n")


def heartbeat_path(folder: Path, rank: int) -> Path:
    """Where a rank's heartbeat is."""
    return folder / f"rank-{rank}.beat"


def write_json(path: Path, value: Any) -> None:
    """A file that is whole whenever it is read."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """Its content; None where there is none (yet)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def main() -> None:
    # Ctrl-C goes to all processes of the terminal; the watchdog ends with its parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder = Path(sys.argv[1])
    try:
        Watchdog(Config.read(folder)).run()
    finally:  # its ranks were killed, and clean up no more
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
