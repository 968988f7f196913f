"""The record of a run: a line for people, `log.jsonl` for programs, trackers for curves."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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

    Each record is on disk when `step` returns, as far as a killed process is concerned. A tracker
    that fails later on (network, disk) costs one warning, and no run.

    Args:
        folder: the run folder, which exists.
        tensorboard: write `tensorboard/`.
        wandb: also to Weights & Biases.
        resume_step: the run goes on after this step: records of later steps, which the run is
            about to repeat, are dropped.
        about: the run's configuration as plain data, for Weights & Biases.

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
        about: Mapping[str, Any] | None = None,
    ) -> None:
        folder = self._folder = Path(folder)
        if resume_step is not None:
            _drop_records_after(folder / "log.jsonl", resume_step)
        self._event_file = self._wandb = None
        self._failed: set[str] = set()
        if tensorboard:
            from kinema.telemetry.event_file import EventFile

            self._event_file = EventFile(folder / "tensorboard", resume_step=resume_step)
        if wandb is not None:
            from kinema.telemetry.wandb_run import WandbRun

            self._wandb = WandbRun(folder, wandb, about=about)
        self._steps = (folder / "log.jsonl").open("a", encoding="utf-8")
        self._events = (folder / "events.jsonl").open("a", encoding="utf-8")

    def step(self, record: Mapping[str, Any]) -> None:
        """Write one logged step everywhere.

        Args:
            record: `step` (an integer) and JSON values, named with their unit: `loss`, `lr`,
                `grad_norm`, `samples_per_s`, `data_wait_pct`, `step_s`. A name with a slash is
                one of a breakdown (`loss/144p-51`): recorded, left out of the printed line
                (`step_line`).
                Numbers also become curves. Not-finite numbers become null in the JSON.
        """
        step = record["step"]
        assert isinstance(step, int)
        _append(self._steps, {**record, "time": _now()})
        say(step_line(record))
        curves = {
            key: float(value)
            for key, value in record.items()
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if self._event_file is not None:
            with self._kept_going("TensorBoard"):
                self._event_file.scalars(curves, step)
        if self._wandb is not None:
            with self._kept_going("Weights & Biases"):
                self._wandb.scalars(curves, step)

    def rewind(self, step: int) -> None:
        """The run goes back: what was recorded of later steps is about to be repeated."""
        self._steps.close()
        _drop_records_after(self._folder / "log.jsonl", step)
        self._steps = (self._folder / "log.jsonl").open("a", encoding="utf-8")
        if self._event_file is not None:
            self._event_file.forget_after(step)

    def video(
        self, tag: str, path: Path | str, *, frames: NDArray[np.uint8], fps: float, step: int
    ) -> None:
        """Show a clip in the trackers.

        Args:
            path: the clip's file (mp4), for Weights & Biases.
            frames: the same clip, uint8 `[T, H, W, 3]`, for TensorBoard's animated image.
        """
        if self._event_file is not None:
            with self._kept_going("TensorBoard"):
                self._event_file.video(tag, frames, fps, step)
        if self._wandb is not None:
            with self._kept_going("Weights & Biases"):
                self._wandb.video(tag, Path(path), step)

    def event(self, text: str, **fields: Any) -> None:
        """Print and record something that happened: `log.event("saved", path=..., step=500)`."""
        _append(self._events, {"event": text, **fields, "time": _now()})
        say(" | ".join([text, *(f"{key} {_shown(value)}" for key, value in fields.items())]))

    def close(self) -> None:
        """Finish the files and the trackers' runs."""
        if self._event_file is not None:
            with self._kept_going("TensorBoard"):
                self._event_file.close()
        if self._wandb is not None:
            with self._kept_going("Weights & Biases"):
                self._wandb.close()
        self._steps.close()
        self._events.close()

    @contextmanager
    def _kept_going(self, tracker: str) -> Iterator[None]:
        """Around a call of a tracker: whatever it raises, the run goes on. It is tried again at
        the next record, and its first failure alone is told."""
        try:
            yield
        except Exception as error:  # of a library, a network, a disk
            if tracker not in self._failed:
                self._failed.add(tracker)
                self.event(
                    f"{tracker} failed; the run goes on, and log.jsonl has every record",
                    error=f"{type(error).__name__}: {error}",
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def append_event(folder: Path | str, text: str, **fields: Any) -> None:
    """Record in `events.jsonl` what another process than the run's own has to say of it."""
    with (Path(folder) / "events.jsonl").open("a", encoding="utf-8") as file:
        _append(file, {"event": text, **fields, "time": _now()})


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


def step_line(record: Mapping[str, Any]) -> str:
    """A record as a person reads it: what has no slash in its name, units spelled out."""
    unprinted = {*UNPRINTED, "samples_per_s"} if "tokens_per_s" in record else UNPRINTED
    words = []
    for key, value in record.items():
        if "/" in key or key in unprinted or not isinstance(value, (int, float, str)):
            continue
        if key in PRINTED and not isinstance(value, str):
            words.append(PRINTED[key](value))
        else:
            words.append(f"{key} {_shown(value)}")
    return " | ".join(words)


PRINTED: dict[str, Callable[[float], str]] = {
    "step_s": "{:.3g} s/step".format,
    "samples_per_s": "{:.3g} samples/s".format,
    "tokens_per_s": lambda value: f"{_large(value)} tokens/s",
    "mfu_pct": "MFU {:.1f}%".format,
    "data_wait_pct": lambda value: f"data wait {_percent(value)}",
    "collective_wait_pct": lambda value: f"rank wait {_percent(value)}",
    "goodput_pct": lambda value: f"goodput {_percent(value)}",
}
"""How the line has some fields; the others stand there as `name value`."""
UNPRINTED = {"weight_norm", "tflops_per_rank"}
"""Fields that would make the line too long to read."""


def _percent(value: float) -> str:
    return f"{value:.1f}%" if value < 9.95 else f"{value:.0f}%"


def _large(value: float) -> str:
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
