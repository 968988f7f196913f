"""`kinema train` from the command line: flags, exit codes, a full disk, Ctrl-C."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from kinema.checkpoint.run import Checkpoint
from kinema.cli.main import main
from tests.integration.train_fixtures import write_clips

LIMIT = 100_000
"""Bytes that a file may have on the full disk: logs fit, weights do not."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("world"))


def start(*arguments: str | Path, full_disk: bool = False) -> subprocess.Popen[str]:
    limit: Callable[[], None] | None = None
    if full_disk:

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))

    return subprocess.Popen(
        [sys.executable, "-c", "from kinema.cli.main import main; main()", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def test_a_full_disk_leaves_the_last_checkpoint(manifest: Path, tmp_path: Path) -> None:
    common = ("--data-path", manifest, "--outputs", tmp_path, "--device", "cpu")
    code, out, err = finish(start("train", "tiny/smoke", *common, "max_steps=1"))
    assert code == 0, err
    run = Path(out.strip())
    before = Checkpoint.open(run).section_hash("model")
    code, out, err = finish(start("train", "--load", run, "--max_steps", "3", full_disk=True))
    assert code == 1
    assert "Traceback" not in err
    assert "error:" in err
    assert str(run) in err.partition("error:")[2]
    checkpoint = Checkpoint.open(run)
    checkpoint.verify(hashes=True)
    assert (checkpoint.step, checkpoint.section_hash("model")) == (1, before)
    code, _, err = finish(start("train", "--load", run, "--max_steps", "2"))
    assert code == 0, err
    assert Checkpoint.open(run).step == 2


def test_ctrl_c_saves_and_says_how_to_go_on(manifest: Path, tmp_path: Path) -> None:
    process = start(
        *("train", "tiny/smoke", "--data-path", manifest, "--outputs", tmp_path),
        *("--device", "cpu", "max_steps=100000", "epochs=100000", "ckpt_every=100000"),
    )
    log = tmp_path / "000-smoke" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 0, err
    run = Path(out.strip())
    assert f"--load {run}" in err
    saved = Checkpoint.open(run).step
    assert saved >= 1
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    assert last <= saved


def test_mistakes_end_in_one_message_and_a_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump({"base": "tiny/smoke", "optim": {"lrr": 1}}))
    cases = {
        "kinema train-vae tiny/smoke-vae": ("train", "tiny/smoke-vae"),
        "kinema train tiny/smoke": ("train-vae", "tiny/smoke"),
        f"{wrong}:3: optim.lrr": ("train", str(wrong)),
        "did you mean 'num_workers'": ("train", "tiny/smoke", "--data.num_worker", "2"),
        "is not a run folder": ("train", "--load", str(tmp_path)),
        "needs a recipe": ("train", "optim.lr=1"),
        "data.path: no manifest": ("train", "tiny/smoke", "--device", "cpu"),
        "device 'tpu'": ("train", "tiny/smoke", "--device", "tpu"),
        "exclude each other": ("train", "tiny/smoke", "--load", "a", "--ckpt-path", "b"),
    }
    for text, arguments in cases.items():
        monkeypatch.setattr(sys, "argv", ["kinema", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code in (1, 2)
        message = capsys.readouterr().err
        assert text in message
        assert message.startswith("error: ")
