"""What the loop tells of itself while it runs: to the watchdog, and of ranks that are slow."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch

from kinema.data.loader import Batch
from kinema.parallel.world import World
from kinema.telemetry.spans import Spans
from kinema.training.config import TrainRecipe
from kinema.training.cost import bucket_cost
from kinema.training.heartbeat import Heartbeat
from kinema.training.slow_ranks import OWN_PHASES, Slow, SlowRanks
from kinema.training.watch import Expectation

COMPUTE = "compute"
"""On a GPU, in place of the phases between data and reduction: host times say nothing there."""
PATIENCE = 4.0
"""Times `watchdog.timeout_s`: how long a collective operation waits once the first step is done.
The watchdog comes first, and says more than a time-out does."""


class Vitals:
    """One rank's reports. Made where `spans` are; the loop calls it at each step.

    Args:
        heart: None: nobody watches.
        path: the file of a row of the manifest.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        world: World,
        spans: Spans,
        *,
        heart: Heartbeat | None,
        path: Callable[[int], str],
    ) -> None:
        self._world = world
        self._spans = spans
        self._heart = heart
        self._path = path
        self._cost_of = bucket_cost(recipe)
        self._expected = Expectation(compiles=recipe.compile)
        self._watchdog = recipe.watchdog
        factor = recipe.watchdog.slow_factor if recipe.watchdog else None
        self._slow = SlowRanks(factor) if factor and world.size > 1 else None
        self._hosts: list[str] = []
        self._cost = 0.0
        self._before: dict[str, float] = {}
        self._cuda = world.device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._begun: torch.cuda.Event | None = None
        self._patient = True  # as the world was opened
        # A rank that compiles for minutes, for a shape that is new to it, tells no other.
        self._may_shorten = recipe.watchdog is not None and not recipe.compile
        spans.on_enter = self._enter

    def _enter(self, phase: str) -> None:
        if self._heart is not None:
            self._heart.enter(phase)
        if phase == "reduce" and self._begun is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._events.append((self._begun, end))
            self._begun = None

    def clip_came(self) -> None:
        """A clip was read: a sign of progress while data is awaited."""
        if self._heart is not None:
            self._heart.beat()

    def begin(self, step: int) -> None:
        """A step begins; `step` updates were made so far."""
        if not self._before:  # what was done before the first step counts for no one
            self._before = dict.fromkeys(OWN_PHASES, 0.0) | self._spans.total
            self._events.clear()
        self._expected.begin()
        if self._heart is not None:
            self._heart.turn(step)

    def await_micro(self, micro: int) -> None:
        """The `micro`-th micro-batch of the step, from 0, is awaited."""
        if self._heart is not None:
            self._heart.await_micro(micro)

    def hold(self, label: str, batch: Batch) -> None:
        """A micro-batch of the bucket called `label` is at hand."""
        cost = self._cost_of(batch.bucket) * len(batch.rows) / batch.degree
        self._cost += cost
        expected, first = self._expected.of(label, cost)
        if self._heart is not None:
            clips = [self._path(int(row)) for row in batch.rows]
            self._heart.hold(label, clips, expected_s=expected, first=first)
        if self._cuda and self._begun is None:
            self._begun = torch.cuda.Event(enable_timing=True)
            self._begun.record()

    def end(self) -> None:
        """The step is done."""
        self._expected.end()
        if self._watchdog is not None and self._may_shorten and self._patient:
            # The first step, and what follows a save or a preview, had the long limit.
            self._patient = False
            longest = 5.0 * self._expected.longest_s
            self._world.wait_at_most(max(PATIENCE * self._watchdog.timeout_s, longest))

    def be_patient(self) -> None:
        """Until the next step is done, one rank may work alone while the others wait for it."""
        if self._watchdog is not None and not self._patient:
            self._patient = True
            self._world.wait_at_most(self._watchdog.first_step_s)

    def compare(self) -> tuple[dict[str, float], list[tuple[str, dict[str, Any]]]]:
        """Ranks against each other, at a log point. Collective.

        Returns:
            Fields of the record (`rank_spread`: the slowest rank's own work per cost over the
            median), and events: text with fields.
        """
        if self._slow is None:
            return {}, []
        if not self._hosts:
            self._hosts = self._world.gather(socket.gethostname())
        names = ("data", COMPUTE) if self._cuda else OWN_PHASES
        own = self._own_work()
        table = torch.zeros(self._world.size, len(names) + 1, dtype=torch.float64)
        table[self._world.rank] = torch.tensor(
            [*(own.get(name, 0.0) for name in names), self._cost], dtype=torch.float64
        )
        self._cost = 0.0
        rows = self._world.sum(table).tolist()
        spread, slow = self._slow.compare(
            [dict(zip(names, row[:-1], strict=True)) for row in rows], [row[-1] for row in rows]
        )
        record = {} if spread is None else {"rank_spread": spread}
        return record, [self._event(one) for one in slow]

    def _own_work(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        now = dict(self._spans.total)
        own = {name: now.get(name, 0.0) - self._before.get(name, 0.0) for name in OWN_PHASES}
        self._before = now
        if self._cuda:
            # All but the newest step are over: every step ends with a wait for the device.
            done = [(a, b) for a, b in self._events if b.query()]
            own[COMPUTE] = sum(a.elapsed_time(b) for a, b in done) / 1000.0
            self._events.clear()
        return own

    def _event(self, slow: Slow) -> tuple[str, dict[str, Any]]:
        text = f"rank {slow.rank} is slow: {slow.factor:.2f} times the median's time for its work"
        return text, {"host": self._hosts[slow.rank], "phase": slow.phase}
