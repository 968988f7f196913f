"""What people give to `kinema curate`, as sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinema.config.errors import KinemaError
from kinema.curation.inputs import RUN_MARK, find_inputs


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def names(folder: Path, out: Path | None = None) -> list[str]:
    found = find_inputs([str(folder)], out=None if out is None else str(out))
    return sorted(found.table.column("name").to_pylist())


def test_a_run_does_not_cut_its_own_clips(tmp_path: Path) -> None:
    videos = made(tmp_path / "v", "a.mp4", "clips/mine.mp4", "set/clips/ab/a_1.mp4")
    made(videos, f"set/{RUN_MARK}", "set/frames/ab/1.jpg")
    assert names(videos) == ["v/a.mp4", "v/clips/mine.mp4"]  # a folder `clips` alone is no run's
    assert find_inputs([str(videos)]).made == 1
    assert names(videos, out=videos) == ["v/a.mp4"]


def test_the_clips_of_another_run_can_be_given(tmp_path: Path) -> None:
    run = made(tmp_path / "set", RUN_MARK, "clips/ab/a_1.mp4")
    assert names(run) == ["set/clips/ab/a_1.mp4"]
    assert names(run / "clips") == ["clips/ab/a_1.mp4"]
    with pytest.raises(KinemaError, match="only 1 clips of a curation run"):
        find_inputs([str(run)], out=str(run))
