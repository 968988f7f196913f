"""How far the nodes' clocks are apart, measured over ssh.

A question and its answer take a time R here; the node read its clock somewhere in between. So the
difference of the clocks is known to +-R/2, and the fastest of several round trips says it best.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from kinema.cluster.hostfile import Host
from kinema.cluster.session import LostError, Session
from kinema.cluster.ssh import Problem, Ssh

ROUND_TRIPS = 8


@dataclass(frozen=True)
class Clock:
    """A node's clock less this machine's.

    Attributes:
        offset_s: positive: the node is ahead.
        bound_s: how far the true value can be from it: half the fastest round trip.
    """

    offset_s: float
    bound_s: float


def measure(ssh: Ssh, hosts: Sequence[Host], *, timeout_s: float = 20) -> list[Clock | Problem]:
    """Each node's clock, or why it could not be asked; in the order of the hosts."""

    def one(host: Host) -> Clock | Problem:
        try:
            with Session(ssh, host, "clock") as session:
                session.ask(None, timeout_s=timeout_s)  # logging in is no part of a round trip
                return estimate(lambda: float(session.ask(None, timeout_s=timeout_s)))
        except LostError as error:
            return error.problem

    return ssh.each(hosts, one)


def estimate(
    ask: Callable[[], float],
    *,
    round_trips: int = ROUND_TRIPS,
    here: Callable[[], float] = time.time,
) -> Clock:
    """The clock behind `ask`, from the fastest of some round trips.

    Args:
        ask: the other clock, seconds.
        here: this machine's clock, seconds.
    """
    best: Clock | None = None
    for _ in range(round_trips):
        before = here()
        there = ask()
        after = here()
        clock = Clock(there - (before + after) / 2, (after - before) / 2)
        if best is None or clock.bound_s < best.bound_s:
            best = clock
    assert best is not None
    return best


def against_the_middle(clocks: dict[str, Clock]) -> dict[str, Clock]:
    """Each clock less the middle of all of them and of this machine's own.

    So one wrong clock among many is named, whether it is a node's or the one here; with two nodes
    this machine decides.
    """
    middle = median([0.0, *(clock.offset_s for clock in clocks.values())])
    return {name: Clock(c.offset_s - middle, c.bound_s) for name, c in clocks.items()}
