from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kinema.config.errors import KinemaError
from kinema.telemetry.config import WandbConfig
from kinema.telemetry.run_json import read_run_json, update_run_json
from kinema.telemetry.run_log import RunLog, read_log, step_line

RECORD = {
    "step": 10,
    "epoch": 0,
    "loss": 0.41257,
    "loss/144p-51": 0.5,
    "lr": 1e-4,
    "data_wait_pct": 3.0,
    "clips": [4, 7],
}


def test_a_step_is_one_json_line_and_one_human_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.step(RECORD)
        [record] = read_log(tmp_path)  # on disk before the log is closed
    assert {k: record[k] for k in RECORD} == RECORD
    assert record["time"].endswith("+00:00")
    line = capsys.readouterr().err
    assert line == "step 10 | epoch 0 | loss 0.4126 | lr 0.0001 | data wait 3.0%\n"


def test_the_line_of_a_large_run_fits_a_wide_terminal() -> None:
    record = {
        "step": 123456, "epoch": 12, "loss": 0.412571, "loss/144p-51f": 0.5, "grad_norm": 0.71234,
        "weight_norm": 1234.5, "lr": 1.5e-4, "step_s": 12.3456, "samples_per_s": 123.45,
        "tokens_per_s": 1_234_567.0, "tflops_per_rank": 432.1, "mfu_pct": 43.21,
        "data_wait_pct": 12.34, "collective_wait_pct": 1.26, "goodput_pct": 97.65,
    }  # fmt: skip
    line = step_line(record)
    assert line == (
        "step 123456 | epoch 12 | loss 0.4126 | grad_norm 0.7123 | lr 0.00015 | 12.3 s/step | "
        "1.23M tokens/s | MFU 43.2% | data wait 12% | rank wait 1.3% | goodput 98%"
    )
    assert len(line) <= 160  # everything at its longest
    # An autoencoder has no tokens, a GPU that is not known no MFU.
    del record["tokens_per_s"]
    line = step_line(record | {"mfu_pct": None})
    assert "| 123 samples/s |" in line
    assert "MFU" not in line


class BrokenTracker:
    """A tracker whose disk is full or whose network is gone."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.calls = 0

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.calls += 1
        raise self.error

    def close(self) -> None:
        raise self.error


def test_a_tracker_that_fails_costs_one_warning_and_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = BrokenTracker(OSError(28, "No space left on device"))
    with RunLog(tmp_path) as log:
        assert log._event_file is not None
        log._event_file.close()
        log._event_file = broken  # type: ignore[assignment]
        for step in (1, 2, 3):
            log.step({"step": step, "loss": 1.0})
    assert broken.calls == 3
    assert [r["step"] for r in read_log(tmp_path)] == [1, 2, 3]
    said = capsys.readouterr().err
    assert said.count("TensorBoard failed; the run goes on") == 1
    assert "No space left on device" in said
    [event] = (tmp_path / "events.jsonl").read_text().splitlines()
    assert "TensorBoard failed" in json.loads(event)["event"]


def test_not_finite_numbers_are_null_in_valid_json(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.step({"step": 1, "loss": float("nan"), "norms": {"a": [float("inf"), 1.0]}})
    [record] = read_log(tmp_path)
    assert record["loss"] is None
    assert record["norms"] == {"a": [None, 1.0]}


def test_resume_leaves_one_record_per_step(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        for step in (10, 20, 30, 40):
            log.step({"step": step, "loss": 1.0})
        log.event("saved", path="epoch0-global_step25", step=25)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 50, "lo')  # killed here
    with RunLog(tmp_path, tensorboard=False, resume_step=25) as log:
        for step in (30, 40):
            log.step({"step": step, "loss": 2.0})
    assert [(r["step"], r["loss"]) for r in read_log(tmp_path)] == [
        (10, 1.0),
        (20, 1.0),
        (30, 2.0),
        (40, 2.0),
    ]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert events[0]["event"] == "saved"
    assert not list(tmp_path.glob(".log*"))


def test_the_step_that_is_resumed_from_keeps_its_record(tmp_path: Path) -> None:
    for resume_step in (None, 20):
        with RunLog(tmp_path, tensorboard=False, resume_step=resume_step) as log:
            for step in (10, 20, 30) if resume_step is None else (30,):
                log.step({"step": step, "loss": 1.0})
    assert [r["step"] for r in read_log(tmp_path)] == [10, 20, 30]


def test_a_torn_last_line_does_not_swallow_the_next_record(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 10}\n{"step": 20, "l')
    with RunLog(tmp_path, tensorboard=False, resume_step=15) as log:
        log.step({"step": 20, "loss": 1.0})
    assert [r["step"] for r in read_log(tmp_path)] == [10, 20]


def test_a_closed_terminal_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    with RunLog(tmp_path, tensorboard=False) as log:
        log.step(RECORD)
    assert len(read_log(tmp_path)) == 1


def moving_square(frames: int = 6) -> np.ndarray[Any, np.dtype[np.uint8]]:
    clip = np.full((frames, 24, 32, 3), 30, dtype=np.uint8)
    for t in range(frames):
        clip[t, 8:16, 4 * t : 4 * t + 8] = (250, 20, 20)
    return clip


def event_values(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {
        tag: [(e.step, round(e.value, 6)) for e in events.Scalars(tag)] for tag in tags["scalars"]
    }
    images = {
        tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)]
        for tag in tags["images"]
    }
    return scalars | images


def test_tensorboard_reads_curves_and_an_animated_clip(tmp_path: Path) -> None:
    clip = moving_square()
    with RunLog(tmp_path) as log:
        log.step(RECORD)
        log.video("samples/0", tmp_path / "a.mp4", frames=clip, fps=24, step=10)
    values = event_values(tmp_path)
    assert values["loss"] == [(10, 0.41257)]
    assert values["loss/144p-51"] == [(10, 0.5)]
    assert "step" not in values
    assert "clips" not in values
    [(step, gif)] = values["samples/0"]
    assert step == 10
    image = Image.open(io.BytesIO(gif))
    assert image.format == "GIF"
    assert getattr(image, "n_frames", 1) == len(clip)
    assert image.info["duration"] == 40
    assert image.info["loop"] == 0
    for t in range(len(clip)):
        image.seek(t)
        shown = np.asarray(image.convert("RGB")).astype(int)
        assert np.abs(shown - clip[t]).max() <= 8


def test_tensorboard_forgets_what_a_resume_repeats(tmp_path: Path) -> None:
    for resume_step, steps in ((None, (10, 20, 30)), (20, (30, 40))):
        with RunLog(tmp_path, resume_step=resume_step) as log:
            for step in steps:
                log.step({"step": step, "loss": 2.0 if resume_step else 1.0})
    assert event_values(tmp_path)["loss"] == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]


def test_run_json_keeps_what_others_wrote(tmp_path: Path) -> None:
    update_run_json(tmp_path, {"name": "tiny", "code": "abc"})
    update_run_json(tmp_path, {"name": "tiny2"})
    assert read_run_json(tmp_path) == {"name": "tiny2", "code": "abc"}
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(KinemaError, match=r"run\.json"):
        read_run_json(tmp_path)


class FakeWandb(types.ModuleType):
    """Records calls; the real library is an extra."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.opened: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []

    def Video(self, path: str) -> str:  # noqa: N802 (wandb's name)
        return f"video of {path}"

    def init(self, **settings: Any) -> FakeWandb:
        if settings["project"] == "forbidden":
            raise self.Error("permission denied")
        self.opened.append(settings)
        self.id = settings["id"] or "new-id"
        self.name = settings["name"]
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        pass

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.logged.append({"finished": True})


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = WandbConfig(project="kinema", mode="offline")
    update_run_json(tmp_path, {"name": "tiny"})
    with RunLog(tmp_path, tensorboard=False, wandb=config, about={"name": "tiny"}) as log:
        log.step(RECORD)
        log.video("samples/0", tmp_path / "a.mp4", frames=moving_square(), fps=24, step=10)
    assert read_run_json(tmp_path)["wandb"]["id"] == "new-id"
    assert read_run_json(tmp_path)["name"] == "tiny"
    with RunLog(tmp_path, tensorboard=False, wandb=config, resume_step=10):
        pass
    assert [o["id"] for o in fake.opened] == [None, "new-id"]
    assert fake.opened[0]["config"] == {"name": "tiny"}
    assert fake.logged[0]["step"] == 10
    assert fake.logged[0]["loss/144p-51"] == 0.5
    assert fake.logged[1]["samples/0"] == f"video of {tmp_path / 'a.mp4'}"


def test_wandb_that_is_missing_or_refuses_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(KinemaError, match=r"pip install 'kinema\[wandb\]'"):
        RunLog(tmp_path, tensorboard=False, wandb=WandbConfig(project="kinema"))
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    with pytest.raises(KinemaError, match="permission denied"):
        RunLog(tmp_path, tensorboard=False, wandb=WandbConfig(project="forbidden"))
