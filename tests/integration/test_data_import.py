"""`kinema data import` as a person runs it, and what comes of it: merged, planned."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pa_parquet
import pytest

from kinema.cli.main import main
from kinema.curation.importers.catalog import DATA_SETS
from kinema.data.manifest import Manifest
from tests.unit.curation.importers import published

DOCS = Path(__file__).resolve().parents[2] / "docs" / "datasets"
KINEMA = (sys.executable, "-c", "from kinema.cli.main import main; main()")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return published.render_clips(tmp_path_factory.mktemp("import") / "clips")


def kinema(monkeypatch: pytest.MonkeyPatch, command: str) -> int:
    """The command in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["kinema", *shlex.split(command)])
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    return 0


def test_openvid_and_miradata_to_the_speed_run(
    tmp_path: Path,
    clips: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two data sets, one manifest, the plan of a published recipe."""
    published.openvid(tmp_path, clips)
    published.miradata(tmp_path, clips)
    monkeypatch.chdir(tmp_path)
    command = "data import openvid-1m OpenVid-1M.csv --videos video_folder -o "
    command += "openvid.parquet --workers 1"
    assert kinema(monkeypatch, command) == 0
    told = capsys.readouterr().out
    assert "openvid.parquet: 2 clips of OpenVid-1M and OpenVidHD, 4 rows in its tables" in told
    assert "captions: 2 of 2 from 'caption'" in told
    assert "left out: 1 no_file" in told
    assert "gone_1.mp4" in told
    assert "kinema data plan openvid.parquet RECIPE" in told
    command = "data import miradata miradata_v1_330k.csv --videos miradata -o "
    command += "mira.parquet --workers 1"
    assert kinema(monkeypatch, command) == 0
    assert kinema(monkeypatch, "data merge openvid.parquet mira.parquet -o both.parquet") == 0
    merged = Manifest.read("both.parquet")
    assert len(merged) == 4
    assert {"aesthetic", "text_short", "source"} <= set(merged.table.column_names)
    assert all(merged.absolute_path(row).is_file() for row in range(4))
    capsys.readouterr()
    assert kinema(monkeypatch, "data plan both.parquet tiny/smoke") == 0
    assert "4 of 4 clips train in epoch 0; none is left out" in capsys.readouterr().out


def test_speed_run_counts_clips_of_a_size_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes from MiraData's table: 1280 x 720, 60 s, as the speed run's third stage sees them."""
    rows = []
    for number in range(64):
        clip = f"{number}.0"
        path = tmp_path / "clip_video" / "000000000000" / f"{clip}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not opened")
        row = dict(zip(published.MIRA, [""] * len(published.MIRA), strict=True))
        row |= {"clip_id": clip, "video_id": f"video{number:06d}", "width": 1280, "height": 720}
        row |= {"fps": 30.0, "frame_number": 1800, "timestamp": "['0:00:00.0', '0:01:00.0']"}
        row |= {"file_path": f"clip_video/000000000000/{clip}.mp4", "dense_caption": "A hill."}
        rows.append(list(row.values()))
    published.write_csv(tmp_path / "miradata_v1_330k.csv", published.MIRA, rows)
    monkeypatch.chdir(tmp_path)
    command = "data import miradata miradata_v1_330k.csv -o m.parquet --trust-table"
    assert kinema(monkeypatch, command) == 0
    assert kinema(monkeypatch, "data plan m.parquet speedrun/stage3 --json") == 0
    output = capsys.readouterr().out
    plan = json.loads(output[output.index("{") :])
    assert plan["rows"] == 64
    assert plan["samples"] > 32
    assert not any("small" in reason for reason in plan["dropped"])


def test_a_cut_list_and_its_report(
    tmp_path: Path,
    clips: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    published.panda(tmp_path, clips)
    monkeypatch.chdir(tmp_path)
    command = "data import panda-70m panda70m_training_2m.csv --videos videos -o "
    command += "cuts.parquet --report r.jsonl"
    assert kinema(monkeypatch, command) == 0
    told = capsys.readouterr().out
    assert "cuts.parquet: 2 cuts in 1 video of Panda-70M" in told
    assert "next: kinema curate cuts.parquet -o FOLDER" in told
    reasons = [json.loads(line)["reason"] for line in Path("r.jsonl").read_text().splitlines()]
    assert sorted(reasons) == ["bad_row", "bad_time", "no_file", "no_row"]
    command = "data import panda-70m panda70m_training_2m.csv --videos videos -o c.csv"
    assert kinema(monkeypatch, command) == 1
    assert "ends in .parquet" in capsys.readouterr().err


PAGES = {
    "README": (published.openvid,),
    "openvid-1m": (published.openvid,),
    "miradata": (published.miradata,),
    "openvid-and-miradata": (published.openvid, published.miradata),
    "pexels-45k": (published.pexels,),
    "panda-70m": (published.panda,),
    "hd-vg-130m": (published.hd_vg,),
    "internvid": (published.internvid,),
    "webvid-10m": (published.webvid,),
    "inter4k": (published.inter4k,),
    "mixkit": (published.mixkit,),
    "vidprom": (published.vidprom,),
    "ucf-101": (published.ucf_101,),
    "ego4d": (published.ego4d,),
    "opendv": (published.opendv,),
    "webdataset": (published.webdataset,),
    "hugging-face": (published.hugging_face,),
    "csv": (published.any_table,),
}
"""Pages of docs/datasets, and the published layouts that their commands need."""


def test_every_page_has_its_data() -> None:
    assert sorted(PAGES) == sorted(page.stem for page in DOCS.glob("*.md"))
    assert {entry.name for entry in DATA_SETS} <= set(PAGES)
    listed = (DOCS / "README.md").read_text()
    assert all(f"]({name}.md)" in listed for name in PAGES if name != "README")


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_pages(
    tmp_path: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    """Every command in a `bash` block runs as it stands, in a folder with the data set."""
    for make in PAGES[page]:
        make(tmp_path, clips)
    monkeypatch.chdir(tmp_path)
    text = (DOCS / f"{page}.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert commands
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "kinema"
        assert kinema(monkeypatch, shlex.join(words[1:])) == 0, command
        if "-o" in words:
            output = Path(words[words.index("-o") + 1])
            rows = pa_parquet.read_table(output)
            assert rows.num_rows > 0, command
            if "_cuts" not in rows.column_names:
                assert Manifest.read(output).kept.any(), command


def test_mistakes_end_in_a_message(tmp_path: Path, clips: list[Path]) -> None:
    """In a process of its own: exit code, one message, no traceback."""
    table = published.openvid(tmp_path, clips)

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [*KINEMA, "data", "import", *map(str, arguments)],
            capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "did you mean 'openvid-1m'" in run("openvid1m", table, "-o", "m.parquet")
    assert "kinema data import openvid-1m" in run("webvid-10m", table, "-o", "m.parquet")


def test_the_list_of_data_sets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kinema(monkeypatch, "data import --list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16
    assert lines[0].startswith("openvid-1m ")
