"""Stages in processes of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from kinema.curation.chain import Chain, Seat, only_waits, pool_for, seat_for
from kinema.curation.executor import Done, Task
from kinema.curation.stage import Places, Stage
from kinema.media.pool import DecodePool


class LocalExecutor:
    """Worker processes: all CPU stages share `workers` of them, each stage with a model has its
    own, one per GPU (or one, with all cores, where there is none). Stages that only wait for an
    endpoint run in threads of this process."""

    name = "local"

    def __init__(self, workers: int, *, gpus: int | None = None) -> None:
        """
        Args:
            workers: processes for CPU stages, at least 1.
            gpus: None: all that PyTorch sees.
        """
        assert workers >= 1
        self._workers = workers
        self._gpus = gpus
        self._cpu: DecodePool | None = None

    def workers(self, stage: Stage) -> int:
        """See `Executor`."""
        if stage.gpu:
            return max(1, self.gpus)
        return 1 if only_waits(stage) else self._workers

    @property
    def gpus(self) -> int:
        """GPUs to use."""
        if self._gpus is None:
            import torch

            self._gpus = torch.cuda.device_count()
        return self._gpus

    def worker_pids(self) -> list[int]:
        """Processes of CPU stages that are running."""
        return self._cpu.worker_pids() if self._cpu is not None else []

    def close(self) -> None:
        """End all workers."""
        if self._cpu is not None:
            self._cpu.close()
            self._cpu = None

    def stream(
        self, stages: Sequence[Stage], tasks: Iterator[Task], places: Places
    ) -> Iterator[Done]:
        """See `Executor`."""
        seats: list[Seat] = []
        try:
            for stage in stages:
                seats.append(self._seat(stage, places))
            yield from Chain(seats, tasks).run()
        finally:
            for seat in seats:
                seat.close()

    def _seat(self, stage: Stage, places: Places) -> Seat:
        workers = self.workers(stage)
        if stage.gpu:
            environments = [{"CUDA_VISIBLE_DEVICES": name} for name in _gpu_names(self.gpus)]
            return seat_for(stage, places, workers, environments or [all_cores()])
        if only_waits(stage):
            return seat_for(stage, places, workers)
        if self._cpu is None:
            self._cpu = pool_for(models=False, workers=self._workers)
        return seat_for(stage, places, workers, pool=self._cpu)


def all_cores() -> dict[str, str]:
    """The environment of the one worker of a model where there is no GPU."""
    return {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "OMP_WAIT_POLICY": "PASSIVE"}


def _gpu_names(count: int) -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(count)]
    return names[:count]
