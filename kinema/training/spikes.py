"""What a run does about a spike: it reports it, and after some in a row goes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kinema.checkpoint.folder import Checkpoint, checkpoint_folders
from kinema.data.loader import Batch
from kinema.parallel.world import World
from kinema.telemetry.run_log import RunLog
from kinema.training.guard import Guard, Spike, Work, write_spike
from kinema.training.reopen import open_verified
from kinema.training.state import TrainState

SHOWN_CLIPS = 8


class Spikes:
    """The guard's decisions, carried out on all ranks alike.

    Args:
        log: of rank 0; None on the others.
    """

    def __init__(
        self, guard: Guard, state: TrainState, world: World, run: Path, log: RunLog | None
    ) -> None:
        self._guard = guard
        self._state = state
        self._world = world
        self._run = run
        self._log = log
        self.go_back_now = False
        """So many updates in a row were left out that the run must go back."""

    def pass_over(self, batch: Batch, epoch: int) -> Batch:
        """A micro-batch without what an earlier going back found at fault."""
        rows = self._guard.passed_over(epoch)
        return batch.without(rows) if rows else batch

    def leave_out(self, spike: Spike, own: Sequence[Work]) -> None:
        """An update is not made. Collective.

        Args:
            own: what this rank worked on in it.
        """
        state, guard = self._state, self._guard
        works = [work for of_rank in self._world.gather(list(own)) for work in of_rank]
        faulty = guard.faulty(works)
        self.go_back_now = guard.skip(state.position[0], faulty)
        if self._log is None:
            return
        write_spike(self._run, spike, step=state.step, position=state.position, works=works)
        # Ranks that share a micro-batch name the same clips.
        paths = list(dict.fromkeys(path for work in faulty for path in work.paths))
        names = ", ".join(paths[:SHOWN_CLIPS])
        more = f" and {len(paths) - SHOWN_CLIPS} more" if len(paths) > SHOWN_CLIPS else ""
        self._log.event(
            f"left out an update: {spike}",
            step=state.step,
            epoch=state.position[0],
            epoch_step=state.position[1],
            ranks=sorted({work.rank for work in faulty}),
            clips=names + more,
        )

    def go_back(self, *, restore: Callable[[Checkpoint], None]) -> int | None:
        """Return to the newest whole checkpoint. Collective.

        Args:
            restore: fills the state of every rank from it.

        Returns:
            Its step; None where there is no checkpoint yet: the weights stay as they are, and what
            was at fault is passed over all the same.

        Raises:
            GuardError: not once more.
        """
        started, step = time.perf_counter(), self._state.step
        self.go_back_now = False
        self._guard.go_back(str(self._run))
        rows = sum(len(rows) for rows in self._guard.quarantine.values())
        if not self._world.broadcast(bool(checkpoint_folders(self._run))):
            if self._log is not None:
                self._log.event("no checkpoint to go back to: going on past the spikes", step=step)
            return None
        checkpoint = open_verified(self._run, self._world)
        restore(checkpoint)
        if self._log is not None:
            self._log.rewind(self._state.step)
            self._log.event(
                f"went back to {checkpoint.path.name} after {self._guard.config.skips} spikes in a "
                "row",
                from_step=step,
                step=self._state.step,
                passed_over_clips=rows,
                seconds=round(time.perf_counter() - started, 1),
            )
        return self._state.step
