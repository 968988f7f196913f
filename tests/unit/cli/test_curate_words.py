"""Slips in the words of `kinema curate`: what each is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kinema.cli.curate import split_overrides
from kinema.cli.main import app
from kinema.config.errors import ConfigError
from kinema.curation.files import seen_from_here


def told(*words: str) -> str:
    result = CliRunner().invoke(app, ["curate", *words])
    assert result.exit_code != 0
    return f"{result.output}{result.exception}"


def test_a_misspelt_stage_is_told_whatever_else_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "did you mean `kinema curate motion`" in told("moton", "m.parquet")
    assert "neither a file or folder nor a stage" in told("videos", "-o", "out")
    (tmp_path / "videos").mkdir()
    assert "has no videos" in told("videos", "-o", "out")
    assert "has no videos" in told("-o", "out", "videos")
    assert "embed={}" in told("videos", "-o", "out", "dedup.concepts=3")
    assert "did you mean 'curate/default'" in told("videos", "-o", "out", "--recipe", "defualt")
    assert "has no videos" in told("videos", "-o", "out", "--recipe", "default")
    assert "nsfw.label=" in told("nsfw", "m.parquet", "-o", "n.parquet", "nsfw.model=x")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["v", "motion.flow_per_s", "=", "3"], "without spaces"),
        (["v", "motion.flow_per_s", "=3"], "without spaces"),
        (["v", "--worker", "3"], "did you mean --workers"),
        (["v", "--recpie=x"], "did you mean --recipe"),
    ],
)
def test_a_slip_names_what_was_meant(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        split_overrides(words)


def test_changes_may_stand_anywhere_and_be_options() -> None:
    words = ["a=1", "v", "--motion.flow_per_s", "3", "w", "--seed=2", "caption.model=x"]
    given, overrides = split_overrides(words)
    assert given == ["v", "w"]
    assert overrides == ["a=1", "--motion.flow_per_s", "3", "--seed=2", "caption.model=x"]


def test_paths_are_shown_as_short_as_they_are_seen_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert seen_from_here(str(tmp_path / "v" / "a.mp4")) == "v/a.mp4"
    assert seen_from_here("/a.mp4") == "/a.mp4"
    assert seen_from_here("s3://b/a.mp4") == "s3://b/a.mp4"


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").touch()
    monkeypatch.setitem(sys.modules, "cv2", None)  # as if it were not installed
    said = told(str(tmp_path / "v"), "-o", str(tmp_path / "out"))
    assert "opencv-python-headless" in said
    assert "pip install 'kinema[curate]'" in said
