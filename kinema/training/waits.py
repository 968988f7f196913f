"""How long a rank waits for the others.

On the CPU a rank's own process waits, and a clock tells how long. On a GPU collectives run beside
the kernels, and what counts is for how long the kernels' stream stands still until one is done:
two events on that stream, before and after the wait, are read later, when the step is over.

Measured are: the rest of averaging gradients after the backward pass; ranks agreeing on a step;
under sharding (FSDP2) also the waits for gathered weights, in both passes, with copying them into
place, and for gradients being averaged. The exchange of sequence parallelism is not in it: it is
part of a block's forward pass (`kinema train --profile` shows it).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

SHARDED_WAITS = ("wait_for_unshard", "post_backward", "finalize_backward")
"""Methods of FSDP2's groups of parameters in which a rank waits, or on the CPU sends itself."""


class Waits:
    """Adds up the waits of one rank.

    Args:
        device: that trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._depth = 0

    @contextmanager
    def host(self) -> Iterator[None]:
        """Around what this process itself waits in. Inside another wait nothing is counted
        twice."""
        start = time.perf_counter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._seconds += time.perf_counter() - start

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Around what the kernels' stream waits in; on the CPU the same as `host`."""
        if not self._cuda:
            with self.host():
                yield
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._depth += 1
        before.record()
        try:
            yield
        finally:
            after.record()
            self._depth -= 1
            if not self._depth:
                self._events.append((before, after))

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Waits herein do not count: they are no part of a step."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def watch(self, model: nn.Module) -> None:
        """Count the waits inside the passes of a sharded model as well.

        FSDP2 has no public hook there; the three methods are looked up by name. A PyTorch that has
        others trains all the same, and their waits are not counted.
        """
        from kinema.parallel.shard import units_of

        for unit in units_of(model):
            for group in _parameter_groups(unit._get_fsdp_state()):
                for name in SHARDED_WAITS:
                    if (method := getattr(group, name, None)) is not None:
                        setattr(group, name, self._timed(method))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stream():
                return method(*args, **kwargs)

        return timed

    def settle(self) -> None:
        """Read the events of a step that is over: called where the device was waited for anyway,
        so that few are kept."""
        waiting = []
        for before, after in self._events:
            if after.query():
                self._seconds += before.elapsed_time(after) / 1000.0
            else:
                waiting.append((before, after))
        self._events = waiting

    def take(self) -> float:
        """Seconds since the last call."""
        self.settle()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _parameter_groups(state: Any) -> list[Any]:
    """FSDP2's groups of parameters of a module. Up to PyTorch 2.11 there was one, or None."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]
