"""A run survives: what fails is named and ended, and goes on by itself with the same losses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from kinema.checkpoint.run import Checkpoint
from kinema.config.errors import ConfigError
from kinema.training.run import train
from kinema.training.start import Start
from tests.integration.train_fixtures import smoke, write_clips

ROOT = Path(__file__).resolve().parents[2]
DRIVER = "tests.integration.survival_driver"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONPATH": str(ROOT),
}
UNTRACED = "may not trace processes"
"""What is said where the machine lets nobody look into a process that is stopped."""
KILLED = [-signal.SIGKILL, -signal.SIGKILL]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def forked(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """All forked scenarios of `survival_driver`, run once, and what they said."""
    outputs = tmp_path_factory.mktemp("survival")
    done = subprocess.run(
        [sys.executable, "-m", DRIVER, str(manifest), str(outputs)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"TMPDIR": str(outputs)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return outputs, done.stderr


def codes(outputs: Path, name: str) -> list[int]:
    found = json.loads((outputs / name / "codes.json").read_text())
    assert isinstance(found, list)
    return found


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def events(outputs: Path, name: str) -> list[str]:
    return [e["event"] for e in lines(outputs / name / "000-smoke" / "events.jsonl")]


def stall(run: Path) -> tuple[Path, dict[str, Any]]:
    (folder,) = (run / "stalls").iterdir()
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return folder, report


def test_a_stopped_rank_is_named_with_the_stacks_of_all(forked: tuple[Path, str]) -> None:
    outputs, said = forked
    assert codes(outputs, "stopped") == KILLED
    folder, report = stall(outputs / "stopped" / "000-smoke")
    culprit = report["culprit"]
    assert (culprit["rank"], culprit["process"]) == (1, "stopped")
    assert len(culprit["clips"]) == 4
    # Also of the frozen process itself, down to where it is.
    stack = (folder / "rank-1.stack").read_text()
    assert "stop_this_process" in stack or UNTRACED in stack
    assert "finish" in (folder / "rank-0.stack").read_text()
    assert len(list(folder.glob("rank-*-worker-*.stack"))) == 2
    waiting, frozen = report["ranks"]
    assert waiting["in_collective"]
    assert not frozen["in_collective"]
    assert frozen["enqueued"] is None  # it cannot answer
    last = json.loads((folder / "flight-0.json").read_text())["gloo"]["entries"][-1]
    assert last["profiling_name"] == "gloo:all_reduce"
    assert not last["retired"]
    assert f"rank 1 (node 0 {culprit['host']}, pid {culprit['pid']}) is stopped" in said
    assert str(folder) in said
    assert "stalled" in events(outputs, "stopped")


def test_a_hanging_decode_worker_is_named_with_its_file(forked: tuple[Path, str]) -> None:
    outputs, _ = forked
    assert codes(outputs, "decoder") == KILLED
    folder, report = stall(outputs / "decoder" / "000-smoke")
    assert report["culprit"]["rank"] == 1
    assert report["culprit"]["phase"] == "data"
    assert report["file"].endswith(".mp4")
    (worker,) = folder.glob("rank-1-worker-*.stack")
    assert f"decode worker {worker.stem.rpartition('-')[2]} is on {report['file']}" in (
        (folder / "report.txt").read_text()
    )
    assert "Thread" in worker.read_text() or UNTRACED in worker.read_text()


def test_a_run_that_is_well_is_left_alone(forked: tuple[Path, str]) -> None:
    outputs, _ = forked
    assert codes(outputs, "slow") == [0, 0]
    run = outputs / "slow" / "000-smoke"
    assert not (run / "stalls").exists()
    assert not list(outputs.glob("kinema-watch-*"))  # nor what other watchdogs had there
    assert not (run / ".watch").exists()


def test_a_collective_waits_as_long_as_the_loop_says(forked: tuple[Path, str]) -> None:
    outputs, _ = forked
    assert "500ms" in (outputs / "patience-0.txt").read_text()


def test_a_slow_rank_is_named_once(forked: tuple[Path, str]) -> None:
    outputs, _ = forked
    slow = [
        e for e in lines(outputs / "slow" / "000-smoke" / "events.jsonl") if "slow" in e["event"]
    ]
    (event,) = slow
    assert event["event"].startswith("rank 1 is slow")
    assert event["phase"] == "forward"
    log = lines(outputs / "slow" / "000-smoke" / "log.jsonl")
    assert all(record["rank_spread"] > 3 for record in log[1:])


def test_spikes_are_left_out_and_after_two_the_run_goes_back(forked: tuple[Path, str]) -> None:
    outputs, _ = forked
    assert codes(outputs, "guarded") == [0, 0]
    run = outputs / "guarded" / "000-smoke"
    happened = events(outputs, "guarded")
    assert sum("left out an update" in text for text in happened) == 2
    assert any(text.startswith("went back to epoch1-global_step4") for text in happened)
    spikes = lines(run / "spikes.jsonl")
    assert [(s["epoch"], s["epoch_step"]) for s in spikes] == [(2, 0), (2, 1)]
    assert {w["rank"] for s in spikes for w in s["micro_batches"]} == {0, 1}
    state = Checkpoint.open(run).state["guard"]
    works = [work for spike in spikes for work in spike["micro_batches"]]
    at_fault = [work for work in works if work["loss"] > 10]
    assert {work["rank"] for work in at_fault} == {1}  # whose losses they were
    assert set(state["quarantine"]["2"]) == {row for work in at_fault for row in work["rows"]}
    assert state["rollbacks"] == 1
    log = lines(run / "log.jsonl")
    assert [record["step"] for record in log] == list(range(1, 10))
    assert max(record["loss"] for record in log) < 3


def test_a_guarded_run_resumes_bit_for_bit(forked: tuple[Path, str]) -> None:
    outputs, _ = forked
    whole, resumed = (
        Checkpoint.open(outputs / name / "000-smoke") for name in ("guarded", "guarded-on")
    )
    assert whole.step == resumed.step == 9
    for section in ("model", "ema"):
        assert whole.section_hash(section) == resumed.section_hash(section)  # type: ignore[arg-type]
    assert whole.state["guard"] == resumed.state["guard"]


def test_a_single_loss_that_is_no_number_costs_one_update(forked: tuple[Path, str]) -> None:
    outputs, _ = forked
    assert codes(outputs, "one-spike") == [0, 0]
    happened = events(outputs, "one-spike")
    assert sum("left out an update: loss nan" in text for text in happened) == 1
    assert not [text for text in happened if "went back" in text]
    spoiled = lines(outputs / "one-spike" / "000-smoke" / "spikes.jsonl")[0]
    assert [w["rank"] for w in spoiled["micro_batches"] if w["loss"] is None] == [1]


def test_a_run_that_cannot_get_past_its_spikes_ends_with_an_error(
    forked: tuple[Path, str],
) -> None:
    outputs, _ = forked
    texts = [(outputs / "hopeless" / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert "after going back 2 times" in texts[0]


def test_trying_every_bucket_changes_nothing_also_sharded_and_with_shared_clips(
    forked: tuple[Path, str],
) -> None:
    outputs, said = forked
    assert codes(outputs, "warm") == codes(outputs, "cold") == [0, 0]
    assert "trying every bucket, the largest first: 1/1 bucket" in said
    warm, cold = (Checkpoint.open(outputs / name / "000-smoke") for name in ("warm", "cold"))
    assert warm.step == 2
    assert warm.section_hash("model") == cold.section_hash("model")
    assert warm.section_hash("ema") == cold.section_hash("ema")


def test_a_bucket_that_does_not_fit_is_named_before_the_first_step(
    forked: tuple[Path, str],
) -> None:
    outputs, _ = forked
    text = (outputs / "too-large" / "error-1.txt").read_text()
    assert text.startswith("rank 1 on ")
    assert "bucket 16x16" in text
    assert "does not fit with 4 clips: a step takes about" in text
    assert "--find-batch-size" in text
    assert not (outputs / "too-large" / "000-smoke" / "log.jsonl").read_text()


def test_torchrun_goes_on_after_a_kill_and_a_stall_with_the_same_losses(
    forked: tuple[Path, str], manifest: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "--max-restarts", "3", "-m", DRIVER),
            *("elastic", str(manifest), str(tmp_path)),
        ],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "000-smoke"
    assert [p.name for p in tmp_path.iterdir()] == ["000-smoke"]  # one run, nothing left behind
    folder, report = stall(run)
    assert report["culprit"]["rank"] == 1
    assert "sleep_in_a_function" in report["reason"]
    assert "sleep_in_a_function" in (folder / "rank-1.stack").read_text()
    behind, ahead = report["ranks"][1], report["ranks"][0]
    assert behind["enqueued"] < ahead["enqueued"]  # gloo's flight record counts them
    happened = [e["event"] for e in lines(run / "events.jsonl")]
    assert sum("torchrun started this run again" in text for text in happened) == 2
    whole = forked[0] / "well" / "000-smoke"
    for step, (broken, well) in enumerate(
        zip(lines(run / "log.jsonl"), lines(whole / "log.jsonl"), strict=True), start=1
    ):
        assert (broken["step"], broken["loss"]) == (step, well["loss"])
    for section in ("model", "ema"):
        assert Checkpoint.open(run).section_hash(section) == Checkpoint.open(whole).section_hash(
            section  # type: ignore[arg-type]
        )


def test_an_error_that_no_restart_cures_is_said_in_torchruns_last_words(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "1", "--max-restarts", "1"),
            *("--no-python", str(Path(sys.executable).with_name("kinema"))),
            *("train", "tiny/smoke", "--data-path", str(tmp_path / "none.parquet")),
            *("--outputs", str(tmp_path), "--device", "cpu"),
        ],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert done.stderr.count("error:") >= 2
    last = done.stderr[done.stderr.index("Root Cause") :]
    assert "none.parquet: does not exist" in last


def test_continue_goes_on_with_the_newest_run_of_the_recipe_or_begins_one(
    manifest: Path, tmp_path: Path
) -> None:
    wanted = ("async_save=false", "epochs=9")
    first = train(
        smoke(manifest, tmp_path, *wanted, "max_steps=1"), Start(go_on=True), device="cpu"
    )
    other = train(smoke(manifest, tmp_path, *wanted, "max_steps=1", "name=other"), device="cpu")
    again = train(
        smoke(manifest, tmp_path, *wanted, "max_steps=2"), Start(go_on=True), device="cpu"
    )
    assert [run.run.name for run in (first, other)] == ["000-smoke", "001-other"]
    assert (again.run, again.step) == (first.run, 2)
    for checkpoint in first.run.glob("epoch*"):
        shutil.rmtree(checkpoint)  # killed before its first
    anew = train(smoke(manifest, tmp_path, *wanted, "max_steps=1"), Start(go_on=True), device="cpu")
    assert (anew.run, anew.step) == (first.run, 1)
    assert [line["step"] for line in lines(first.run / "log.jsonl")] == [1]
    with pytest.raises(ConfigError, match="leave out --load"):
        Start(go_on=True, load=first.run)


def test_trying_every_bucket_tries_all_and_changes_nothing(
    manifest: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With two buckets, and latents that are remembered."""
    hashes = set()
    for choice in ("no", "yes"):
        recipe = smoke(
            manifest, tmp_path, f"name={choice}", f"warm_up={choice}", "max_steps=3",
            "data.buckets={'16x16': {3: [[1.0, 1.0], 2], 5: [[1.0, 0.5], 4]}}",
            "task.remember_latents=true", "async_save=false",
        )  # fmt: skip
        checkpoint = Checkpoint.open(train(recipe, device="cpu").run)
        hashes.add((checkpoint.section_hash("model"), checkpoint.section_hash("ema")))
    assert len(hashes) == 1
    assert "the largest first: 2/2 buckets" in capfd.readouterr().err


def test_the_watchdog_ends_with_the_run(manifest: Path, tmp_path: Path) -> None:
    watching: list[list[str]] = []

    def look(step: int, record: dict[str, Any] | None) -> None:
        watching.append([" ".join(p.cmdline()) for p in psutil.Process().children()])

    before = os.environ.get("KINEMA_TRACER")
    train(smoke(manifest, tmp_path, "watchdog={}", "max_steps=1"), device="cpu", on_step=look)
    assert any("kinema.training.watchdog" in line for line in watching[0])
    left = [" ".join(p.cmdline()) for p in psutil.Process().children()]
    assert not any("kinema.training.watchdog" in line for line in left)
    assert os.environ.get("KINEMA_TRACER") == before
