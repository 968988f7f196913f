from __future__ import annotations

from pathlib import Path

import pytest

from kinema.config.errors import KinemaError
from kinema.demo.config import DemoConfig
from kinema.demo.state import DemoState


def test_finished_stages_are_not_done_again(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    calls: list[str] = []
    for _ in range(2):
        state = DemoState(folder, DemoConfig())
        result = state.run("render", lambda: calls.append("render") or {"clips": 3})
        assert result == {"clips": 3}
    assert calls == ["render"]
    assert state.done("render")
    assert not state.done("index")


def test_an_interrupted_stage_runs_again_and_its_time_counts(tmp_path: Path) -> None:
    state = DemoState(tmp_path / "demo", DemoConfig())

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        state.run("train", interrupted)
    state = DemoState(tmp_path / "demo", DemoConfig())
    assert not state.done("train")
    state._data["interrupted"]["train"] = 5.0
    assert state.run("train", lambda: 1) == 1
    assert state.seconds("train") >= 5.0


def test_other_settings_and_other_folders_are_refused(tmp_path: Path) -> None:
    DemoState(tmp_path / "demo", DemoConfig(seed=1))
    with pytest.raises(KinemaError, match="other settings \\(seed\\)"):
        DemoState(tmp_path / "demo", DemoConfig(seed=2))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(KinemaError, match="holds no demo"):
        DemoState(tmp_path / "full", DemoConfig())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "demo.json").write_text("{")
    with pytest.raises(KinemaError, match="not a demo's record"):
        DemoState(tmp_path / "broken", DemoConfig())


def test_captions_need_videos() -> None:
    with pytest.raises(ValueError, match="--videos"):
        DemoConfig(captions="c.csv")
