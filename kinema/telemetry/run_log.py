"""The record of a run: a line for people, `log.jsonl` for programs, trackers for curves."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

from kinema.telemetry.config import WandbConfig


class RunLog:
    """Everything that one process writes down about a run, in the run's folder::

        log = RunLog(run_folder, tensorboard=recipe.tracking.tensorboard,
                     wandb=recipe.tracking.wandb, resume_step=None)
        log.step({"step": 20, "loss": 0.41, "loss/144p-51": 0.43, "lr": 1e-4, "step_s": 0.8})

    - `log.jsonl`: one object per logged step, in order, one per step also after resumes;
    - `events.jsonl`: what happened besides (started, resumed, saved), with times, never cut;
    - `tensorboard/`; Weights & Biases.

    Each record is on disk when `step` returns, as far as a killed process is concerned.

    Args:
        folder: the run folder, which exists.
        tensorboard: write `tensorboard/`.
        wandb: also to Weights & Biases.
        resume_step: the run goes on after this step: records of later steps, which the run is
            about to repeat, are dropped.

    Raises:
        KinemaError: Weights & Biases is asked for and not installed or not reachable.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        tensorboard: bool = True,
        wandb: WandbConfig | None = None,
        resume_step: int | None = None,
    ) -> None:
        folder = Path(folder)
        if resume_step is not None:
            _drop_records_after(folder / "log.jsonl", resume_step)
        self._event_file = self._wandb = None
        if tensorboard:
            from kinema.telemetry.event_file import EventFile

            self._event_file = EventFile(folder / "tensorboard", resume_step=resume_step)
        if wandb is not None:
            from kinema.telemetry.wandb_run import WandbRun

            self._wandb = WandbRun(folder, wandb)
        self._steps = (folder / "log.jsonl").open("a", encoding="utf-8")
        self._events = (folder / "events.jsonl").open("a", encoding="utf-8")

    def step(self, record: Mapping[str, Any]) -> None:
        """Write one logged step everywhere.

        Args:
            record: `step` (an integer) and JSON values, named with their unit: `loss`, `lr`,
                `grad_norm`, `samples_per_s`, `data_wait_pct`, `step_s`. A name with a slash is
                one of a breakdown (`loss/144p-51`): recorded, left out of the printed line.
                Numbers also become curves. Not-finite numbers become null in the JSON.
        """
        step = record["step"]
        assert isinstance(step, int)
        _append(self._steps, {**record, "time": _now()})
        say(_line(record))
        curves = {
            key: float(value)
            for key, value in record.items()
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for tracker in (self._event_file, self._wandb):
            if tracker is not None:
                tracker.scalars(curves, step)

    def video(
        self, tag: str, path: Path | str, *, frames: NDArray[np.uint8], fps: float, step: int
    ) -> None:
        """Show a clip in the trackers.

        Args:
            path: the clip's file (mp4), for Weights & Biases.
            frames: the same clip, uint8 `[T, H, W, 3]`, for TensorBoard's animated image.
        """
        if self._event_file is not None:
            self._event_file.video(tag, frames, fps, step)
        if self._wandb is not None:
            self._wandb.video(tag, Path(path), step)

    def event(self, text: str, **fields: Any) -> None:
        """Print and record something that happened: `log.event("saved", path=..., step=500)`."""
        _append(self._events, {"event": text, **fields, "time": _now()})
        say(" | ".join([text, *(f"{key} {_shown(value)}" for key, value in fields.items())]))

    def close(self) -> None:
        """Finish the files and the trackers' runs."""
        self._steps.close()
        self._events.close()
        for tracker in (self._event_file, self._wandb):
            if tracker is not None:
                tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def say(text: str) -> None:
    """One line on stderr, above a progress bar where there is one."""
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # The terminal went away; the record on disk goes on.


def read_log(folder: Path | str) -> list[dict[str, Any]]:
    """The records of `log.jsonl`, in order; a line torn by a kill is left out."""
    return [record for _, record in _records(Path(folder) / "log.jsonl")]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if line.endswith("\n") and isinstance(record, dict) and "step" in record:
                yield line, record


def _drop_records_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(line for line, record in _records(path) if record["step"] <= step)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _append(file: Any, record: Mapping[str, Any]) -> None:
    file.write(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n")
    file.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _line(record: Mapping[str, Any]) -> str:
    shown = {k: v for k, v in record.items() if "/" not in k and isinstance(v, (int, float, str))}
    return " | ".join(f"{key} {_shown(value)}" for key, value in shown.items())


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
