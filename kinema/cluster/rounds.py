"""Health, round after round: keeps a history and says what changed, once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kinema.cluster.health import Examiner, Health
from kinema.cluster.health_report import carried, statuses, turns
from kinema.cluster.history import History
from kinema.cluster.readings import summary
from kinema.telemetry.run_log import append_event, say


class Rounds:
    """Rounds of quick checks after a first whole one.

    Args:
        quick: what the first round found.
        slow: findings that later rounds do not look for again (versions, bandwidth): they stand.
        history: JSONL of readings; goes on where it ended.
        run: run folder that hears of it as well, in `events.jsonl`.
        tell: takes a line for each change.
        clock, sleep: seconds.
    """

    def __init__(
        self,
        examiner: Examiner,
        quick: Health,
        slow: Health,
        history: Path,
        run: Path | None,
        *,
        tell: Callable[[str], None] = say,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._examiner, self._run, self._tell = examiner, run, tell
        self._clock, self._sleep = clock, sleep
        self._past = History(history)
        self._now, self._slow = quick, slow
        self._before = statuses(quick)
        self._keep(quick)

    def go_on(self, pause_s: float, most_s: float | None) -> Health:
        """Round after round, until the time is over or Ctrl-C; the state at the end.

        Args:
            pause_s: from the start of one round to the start of the next.
            most_s: in all; None: for ever.
        """
        start = self._clock()
        at = start
        try:
            while True:
                at += pause_s
                if most_s is not None and at - start > most_s:
                    return self._now.joined(self._slow)
                self._sleep(max(at - self._clock(), 0.0))
                at = max(at, self._clock() - pause_s)  # rounds that took too long are left out
                self.round()
        except KeyboardInterrupt:
            return self._now.joined(self._slow)

    def round(self) -> None:
        """Look once more, and tell what changed."""
        found = self._examiner.quick()
        now = carried(self._before, statuses(found))
        for (node, name), state, text in turns(self._before, now):
            self._say(text, node=node, check=name, state=state)
        self._before, self._now = now, found
        self._keep(found)

    def _keep(self, found: Health) -> None:
        for node, readings in found.readings.items():
            for change in self._past.add(node, readings, found.verdict(node)):
                self._say(str(change), node=node, reading=change.name, state=change.state)
        if self._run is not None:
            nodes = {
                node: {"verdict": found.verdict(node), **summary(found.readings.get(node, {}))}
                for node in found.nodes
            }
            self._record("cluster health", nodes=nodes)

    def _say(self, text: str, **fields: str) -> None:
        self._tell(f"{time.strftime('%H:%M:%S')}  {text}")
        self._record("cluster health changed", what=text, **fields)

    def _record(self, event: str, **fields: Any) -> None:
        """To the run's own log; a disk that is full ends that, not the watch."""
        if self._run is not None:
            try:
                append_event(self._run, event, **fields)
            except OSError as error:
                self._tell(f"{self._run}: no more of this in its events: {error.strerror}")
                self._run = None
