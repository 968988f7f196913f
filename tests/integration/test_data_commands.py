"""`kinema data index` and `check` as a person runs them: a small world and broken files."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kinema.cli.main import main
from kinema.data.manifest import Manifest
from kinema.data.world import WorldSpec, write_world

KINEMA = (sys.executable, "-c", "from kinema.cli.main import main; main()")
CLIPS = 12
BROKEN = {
    "a_empty.mp4": "empty",
    "b_words.mp4": "not_media",
    "c_cut.mp4": "truncated",
    "d_folder.mp4": "not_a_file",
    "e_pipe.mp4": "not_a_file",
    "f_nowhere.mp4": "missing",
}


def kinema(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*KINEMA, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 good clips with captions, and a folder of things that only look like videos."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, WorldSpec(count=CLIPS, size=32, frames=6))
    broken = folder / "broken"
    broken.mkdir()
    clip = folder / "clips/00000.mp4"
    (broken / "a_empty.mp4").touch()
    (broken / "b_words.mp4").write_text("these are words " * 100)
    (broken / "c_cut.mp4").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    (broken / "d_folder.mp4").mkdir()
    os.mkfifo(broken / "e_pipe.mp4")
    (broken / "f_nowhere.mp4").symlink_to(folder / "nowhere.mp4")
    return folder


def fingerprint(world: Path) -> str:
    """What the manifest of the good clips must have, worked out without probing any file."""
    rows = list(csv.DictReader((world / "captions.csv").open()))
    size = [32] * len(rows)
    columns = {"path": [r["path"] for r in rows], "text": [r["text"] for r in rows]}
    return Manifest.from_columns(
        {**columns, "num_frames": [6] * len(rows), "height": size, "width": size,
         "fps": [8.0] * len(rows)}, world,
    ).fingerprint  # fmt: skip


@pytest.fixture
def copy(world: Path, tmp_path: Path) -> Path:
    """The good part of the world, to be changed."""
    for name in ("clips", "captions.csv"):
        source = world / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_index_then_check(world: Path, ending: str) -> None:
    output = world / f"m.{ending}"
    indexed = kinema("data", "index", world, "--captions", world / "captions.csv", "-o", output)
    assert indexed.returncode == 0, indexed.stderr
    assert f"{CLIPS} clips" in indexed.stdout
    assert f"{CLIPS}/" not in indexed.stdout  # progress goes to stderr
    assert "indexing" in indexed.stderr
    report = [json.loads(line) for line in Path(f"{output}.report.jsonl").read_text().splitlines()]
    assert {Path(line["path"]).name: line["reason"] for line in report} == BROKEN
    for name in BROKEN:
        assert f"broken/{name}: " in indexed.stdout

    manifest = Manifest.read(output)
    assert len(manifest) == CLIPS
    assert manifest.fingerprint == fingerprint(world)  # the same data in both formats
    assert manifest.kept.all()
    assert manifest.column("num_frames").tolist() == [6] * CLIPS
    manifest.require_captions()

    checked = kinema("data", "check", output)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{CLIPS} of {CLIPS} clips are good" in checked.stdout


def test_check_finds_what_broke_since(copy: Path) -> None:
    output = copy / "m.csv"
    assert kinema("data", "index", copy, "-o", output).returncode == 0
    (copy / "clips/00003.mp4").unlink()
    shutil.copy(copy / "clips/00001.mp4", copy / "clips/00002.mp4")  # another good clip is fine
    cut = (copy / "clips/00005.mp4").read_bytes()
    (copy / "clips/00005.mp4").write_bytes(cut[: len(cut) * 2 // 3])

    checked = kinema("data", "check", output, "-o", copy / "good.parquet")
    assert checked.returncode == 1
    assert "row 3: clips/00003.mp4" in checked.stdout
    assert "row 5: clips/00005.mp4" in checked.stdout
    assert f"{CLIPS - 2} of {CLIPS} clips are good" in checked.stdout
    assert "no clip has a caption" in checked.stdout
    good = Manifest.read(copy / "good.parquet")
    assert len(good) == CLIPS
    assert good.kept.sum() == CLIPS - 2
    again = kinema("data", "check", copy / "good.parquet")
    assert again.returncode == 0, again.stdout


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_index_goes_on_where_it_was(copy: Path, stop: signal.Signals) -> None:
    output, journal = copy / "m.parquet", copy / "m.parquet.journal.jsonl"
    for number in range(200):
        shutil.copy(copy / "clips/00000.mp4", copy / f"clips/more{number:03d}.mp4")
    command = [*KINEMA, "data", "index", str(copy), "-o", str(output),
               "--workers", "1"]  # fmt: skip
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 5):
        assert time.monotonic() < deadline
        assert run.poll() is None, run.communicate()
        time.sleep(0.002)
    if stop == signal.SIGINT:
        os.killpg(run.pid, stop)  # as a terminal does it: to the workers as well
    else:
        run.send_signal(stop)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode != 0
    if stop == signal.SIGINT:
        assert "the same command again continues from here" in stderr
        assert "Traceback" not in stderr
    assert not output.exists()
    known = journal.read_bytes().count(b"\n") - 1
    assert 5 <= known < CLIPS + 200

    again = kinema("data", "index", copy, "-o", output)
    assert again.returncode == 0, again.stderr
    files = int(again.stdout.split("(")[1].split()[0])
    assert known - 1 <= files <= known  # the last line may have been cut
    assert len(Manifest.read(output)) == CLIPS + 200
    assert sorted(path.name for path in copy.iterdir()) == [
        "captions.csv", "clips", "m.parquet", "m.parquet.journal.jsonl", "m.parquet.report.jsonl",
    ]  # fmt: skip


def test_a_full_disk_is_named_and_loses_nothing(copy: Path) -> None:
    output = copy / "m.csv"
    assert kinema("data", "index", copy, "-o", output).returncode == 0
    before = output.read_bytes()
    for number in range(60):
        shutil.copy(copy / "clips/00000.mp4", copy / f"clips/more{number:03d}.mp4")
    limited = subprocess.run(
        [*KINEMA, "data", "index", str(copy), "-o", str(output)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert limited.returncode == 1
    assert "cannot be written" in limited.stderr
    assert "free some space" in limited.stderr
    assert "Traceback" not in limited.stderr
    assert output.read_bytes() == before
    again = kinema("data", "index", copy, "-o", output)
    assert again.returncode == 0, again.stderr
    assert len(Manifest.read(output)) == CLIPS + 60


def test_bad_input_gets_one_message(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    captions = tmp_path / "captions.csv"
    captions.write_text("path,text\nelsewhere.mp4,a cat\n")
    less = tmp_path / "less.csv"
    less.write_text("path,text,num_frames,width,fps\na.mp4,a cat,3,8,8\n")
    cases = [
        (("index", tmp_path / "gone", "-o", tmp_path / "m.csv"), "does not exist"),
        (("index", world, "-o", tmp_path / "m.json"), "ends in .csv or .parquet"),
        (("index", world / "broken", "-o", tmp_path / "m.csv"), "none of its 6 files can be used"),
        (("index", world, "-o", tmp_path / "m.csv", "--captions", captions), "--data-root"),
        (("check", tmp_path / "gone.parquet"), "does not exist"),
        (("check", less), "no column 'height'"),
    ]
    for arguments, message in cases:
        monkeypatch.setattr(sys, "argv", ["kinema", "data", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "m.csv").exists()
