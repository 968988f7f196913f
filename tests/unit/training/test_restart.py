"""What a launch remembers, and for whom."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kinema.config.errors import KinemaError
from kinema.training.restart import LAUNCHES, Launch, launch_id, newest_run


class Alone:
    is_main = True

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    run = tmp_path / "000-smoke"
    run.mkdir()
    (run / "run.json").write_text("{}")
    return run


def test_a_restart_goes_on_with_the_run_of_its_launch(run: Path) -> None:
    assert Launch(run.parent).run(Alone()) is None
    Launch(run.parent).remember(run)
    assert Launch(run.parent).run(Alone()) == run
    Launch(run.parent).forget()
    assert Launch(run.parent).run(Alone()) is None
    assert not (run.parent / LAUNCHES).exists()


def test_what_was_written_before_torchrun_started_is_of_another_launch(run: Path) -> None:
    Launch(run.parent).remember(run)
    (file,) = (run.parent / LAUNCHES).iterdir()
    os.utime(file, (1.0, 1.0))
    assert Launch(run.parent).run(Alone()) is None


def test_a_folder_that_is_gone_is_not_gone_on_with(run: Path) -> None:
    Launch(run.parent).remember(run)
    (run / "run.json").unlink()
    assert Launch(run.parent).run(Alone()) is None


def test_a_machine_that_does_not_see_the_file_yet_goes_the_same_way(run: Path) -> None:
    class TwoMachines(Alone):
        def gather(self, value: Any) -> list[Any]:
            return [value, (False, None) if isinstance(value, tuple) else value]

    class Other(TwoMachines):
        def __init__(self) -> None:
            self.first: list[Any] = [(True, str(run)), True]

        def gather(self, value: Any) -> list[Any]:
            return [self.first.pop(0), value]

    Launch(run.parent).remember(run)
    assert Launch(run.parent).run(TwoMachines()) == run
    Launch(run.parent).forget()
    assert Launch(run.parent).run(Other()) == run


def test_without_torchrun_nothing_is_remembered(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    Launch(run.parent).remember(run)
    Launch(run.parent).forget()
    assert Launch(run.parent).run(Alone()) is None
    assert not (run.parent / LAUNCHES).exists()
    with Launch(run.parent).final_errors():
        pass


def test_torchruns_default_name_is_made_this_machines_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert str(launch_id()).endswith(f"-{os.getppid()}")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "../a b")
    assert launch_id() == "..-a-b"


def test_an_error_of_a_person_is_said_again_and_not_worked_towards(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(KinemaError), Launch(run.parent).final_errors():
        raise KinemaError("wrong", where="here", hint="right")
    told = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert told == "error: here: wrong\n  try: right"

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    worked = []
    with pytest.raises(KinemaError) as error, Launch(run.parent).final_errors():
        worked.append(1)
    assert str(error.value) == "here: wrong\n  try: right"
    assert not worked


def test_the_first_error_of_a_launch_is_kept_until_the_run_ends(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for what in ("first", "second"):  # of two processes of one start, both of which work
        with pytest.raises(KinemaError, match=what), Launch(run.parent).final_errors():
            raise KinemaError(what)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(KinemaError, match="first"), Launch(run.parent).final_errors():
        pass
    Launch(run.parent).forget()
    assert not (run.parent / LAUNCHES).exists()


def test_a_crash_is_tried_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError), Launch(run.parent).final_errors():
        raise RuntimeError("a lost connection")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with Launch(run.parent).final_errors():
        pass


def test_the_newest_run_of_a_recipe(tmp_path: Path) -> None:
    for name in ("002-a", "010-a", "011-b", "999-a"):
        (tmp_path / name).mkdir()
        if name != "999-a":  # killed in the moment of its making
            (tmp_path / name / "run.json").write_text("{}")
    assert newest_run(tmp_path, lambda run: run.name.endswith("a")) == tmp_path / "010-a"
    assert newest_run(tmp_path, lambda run: False) is None
    assert newest_run(tmp_path / "none", lambda run: True) is None
