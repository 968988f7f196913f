"""Checking a manifest: every kind of bad row is found, good ones are not called bad."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kinema.data import check as check_module
from kinema.data.check import check_manifest, mark_bad
from kinema.data.manifest import Manifest
from kinema.media.write import write_image, write_video
from tests.unit.data.in_process_pool import InProcessPool


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "DecodePool", InProcessPool)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    frames = np.random.default_rng(0).integers(0, 255, (12, 48, 64, 3), np.uint8)
    for name in ("good", "count", "size", "gone", "silent", "dropped"):
        write_video(tmp_path / f"{name}.mp4", frames, 8)
    write_image(tmp_path / "image.png", frames[0])
    (tmp_path / "gone.mp4").unlink()
    names = ["good.mp4", "count.mp4", "size.mp4", "gone.mp4", "silent.mp4", "dropped.mp4",
             "image.png"]  # fmt: skip
    return Manifest.from_columns(
        {
            "path": names,
            "text": ["a", "b", "c", "d", " ", "f", "g"],
            "num_frames": [12, 13, 12, 12, 12, 99, 1],
            "height": [48, 48, 64, 48, 48, 48, 48],
            "width": [64, 64, 48, 64, 64, 64, 64],
            "fps": [8.0] * 7,
            "dropped_by": ["", "", "", "", "", "blurry", ""],
        },
        tmp_path,
    )


def test_every_fault_is_named(manifest: Manifest) -> None:
    bad = check_manifest(manifest, workers=2, timeout_s=60)
    assert [(item.row, item.reason) for item in bad] == [
        (1, "frames_differ"),
        (2, "size_differs"),
        (3, "missing"),
        (4, "no_caption"),
    ]
    assert bad[0].message == "decodes to 12 frames, its row says 13"
    assert bad[1].message == "is 64x48, its row says 48x64"
    assert "dropped.mp4" not in InProcessPool.opened


def test_bad_rows_are_marked(manifest: Manifest) -> None:
    marked = mark_bad(manifest, check_manifest(manifest))
    assert marked.kept.tolist() == [True, False, False, False, False, False, True]
    assert marked.dropped()["check:missing"] == 1
    assert marked.dropped()["blurry"] == 1
    assert check_manifest(marked) == []


def test_no_captions_at_all_is_no_fault(manifest: Manifest) -> None:
    table = manifest.table.set_column(1, "text", [[""] * len(manifest)])
    bad = check_manifest(Manifest(table, manifest.root))
    assert "no_caption" not in {item.reason for item in bad}


def test_damage_behind_a_good_beginning_is_found(manifest: Manifest) -> None:
    path = manifest.absolute_path(0)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat")
    keep = start + (len(data) - start) // 3
    data[keep:] = bytes(len(data) - keep)
    path.write_bytes(data)
    bad = check_manifest(manifest)
    assert bad[0].row == 0
    assert bad[0].reason in {"corrupt", "truncated", "frames_differ", "too_short"}
