"""Edits outlive crashes, and follow their clips into another version of the manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinema.config.errors import KinemaError
from kinema.serving.browse.edits import Edits

PATHS = ["a.mp4", "b.mp4", "c.mp4"]


def test_edits_are_there_again(tmp_path: Path) -> None:
    file = tmp_path / "m.csv.edits.jsonl"
    edits = Edits(file, PATHS.__getitem__, 3)
    edits.set_text(1, "new\nlines “and” more")
    edits.set_marks([0, 2], True)
    edits.set_marks([0], False)
    again = Edits(file, PATHS.__getitem__, 3)
    assert again.texts == {1: "new\nlines “and” more"}
    assert again.marked == {2}
    again.set_text(1, None)
    assert Edits(file, PATHS.__getitem__, 3).texts == {}


def test_a_line_that_was_cut_off_costs_only_itself(tmp_path: Path) -> None:
    file = tmp_path / "edits.jsonl"
    edits = Edits(file, PATHS.__getitem__, 3)
    edits.set_text(0, "first")
    edits.set_text(1, "second")
    file.write_bytes(file.read_bytes()[:-9])
    crashed = Edits(file, PATHS.__getitem__, 3)
    assert crashed.texts == {0: "first"}
    crashed.set_text(2, "third")
    assert Edits(file, PATHS.__getitem__, 3).texts == {0: "first", 2: "third"}


def test_edits_follow_the_path(tmp_path: Path) -> None:
    file = tmp_path / "edits.jsonl"
    edits = Edits(file, PATHS.__getitem__, 3)
    edits.set_text(0, "of a")
    edits.set_text(2, "of c")
    moved = ["c.mp4", "x.mp4", "y.mp4", "y.mp4"]
    again = Edits(file, moved.__getitem__, 4)
    assert again.texts == {0: "of c"}
    assert again.lost == 1


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    edits = Edits(tmp_path / "missing" / "edits.jsonl", PATHS.__getitem__, 3)
    with pytest.raises(KinemaError, match="cannot be written"):
        edits.set_text(0, "x")
    assert edits.texts == {}
