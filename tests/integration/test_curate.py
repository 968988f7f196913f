"""`kinema curate` as a person runs it: rendered videos with known cuts, copies and broken files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pa_parquet
import pytest

from kinema.data.manifest import Manifest
from kinema.media.probe import probe
from kinema.media.write import write_video
from tests.unit.curation.captions.conftest import Reply, Server, server

assert server  # a fixture
KINEMA = (sys.executable, "-c", "from kinema.cli.main import main; main()")
FPS = 12


def kinema(*arguments: object, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*KINEMA, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | env,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def shot(seed: int, seconds: float, *, moving: bool = True) -> np.ndarray[Any, Any]:
    """uint8 `[T, 160, 256, 3]`: a bright square over smooth colours."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 200, (10, 16, 3)).astype(np.uint8)
    ground = coarse.repeat(16, 0).repeat(16, 1)
    frames = np.repeat(ground[None], round(seconds * FPS), 0)
    for number, frame in enumerate(frames):
        left = 10 + (2 * number if moving else 0) % 120
        frame[30 + 5 * seed : 60 + 5 * seed, left : left + 30] = 255
    return frames


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shots in one file, one with a copy at half size, a still, a flash, and broken files."""
    folder = tmp_path_factory.mktemp("raw")
    write_video(folder / "two.mp4", np.concatenate([shot(1, 3), shot(2, 4)]), FPS)
    write_video(folder / "one.mp4", shot(3, 3), FPS)
    write_video(folder / "copies" / "small.mp4", shot(3, 3)[:, ::2, ::2].copy(), FPS)
    write_video(folder / "still.mp4", shot(4, 3, moving=False), FPS)
    write_video(folder / "flash.mp4", shot(5, 0.5), FPS)
    (folder / "empty.mp4").touch()
    (folder / "words.mp4").write_text("no video " * 100)
    (folder / "cut.mp4").write_bytes((folder / "one.mp4").read_bytes()[:500])
    (folder / "one.txt").write_text("A white square slides to the right.")
    return folder


@pytest.fixture(scope="module")
def out(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    kinema("curate", raw, "-o", folder, "--workers", 2)
    return folder


@pytest.fixture
def copy(out: Path, tmp_path: Path) -> Path:
    """The run's folder, for a test that runs again in it."""
    return shutil.copytree(out, tmp_path / "set")


def rows(out: Path) -> list[dict[str, Any]]:
    table: Any = pa_parquet.read_table(out / "manifest.parquet")
    found: list[dict[str, Any]] = table.to_pylist()
    return found


def computed(out: Path) -> dict[str, int]:
    run = json.loads((out / "run.json").read_text())
    return {stage["name"]: stage["computed"] for stage in run["stages"]}


def test_one_command_gives_clips_a_manifest_and_a_report(raw: Path, out: Path) -> None:
    manifest = Manifest.read(out / "manifest.parquet")
    found = rows(out)
    spans = {(r["source_name"].split("/", 1)[1], r["start_s"], r["end_s"]) for r in found}
    assert spans == {
        ("two.mp4", 0.0, 3.0), ("two.mp4", 3.0, 7.0), ("one.mp4", 0.0, 3.0),
        ("copies/small.mp4", 0.0, 3.0), ("still.mp4", 0.0, 3.0),
    }  # fmt: skip
    for row, clip in enumerate(found):
        if clip["cut_by"] is None:
            continue
        info = probe(manifest.absolute_path(row))
        assert (info.num_frames, info.height, info.width) == (
            clip["num_frames"], clip["height"], clip["width"],
        )  # fmt: skip
        assert clip["gop"] <= 30
        assert (out / clip["frames"]).is_file()
    dropped = {r["source_name"].split("/", 1)[1]: r["dropped_by"] for r in found}
    assert dropped["still.mp4"] == "not cut: static_share <= 0.95"
    assert dropped["copies/small.mp4"] == "not cut: min(height, width) >= 144"
    assert "<html" in (out / "report.html").read_text()[:200]
    refused = [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()]
    reasons = {Path(item["path"]).name: item["reason"] for item in refused}
    assert reasons == {
        "empty.mp4": "empty", "words.mp4": "not_media", "cut.mp4": "truncated",
        "flash.mp4": "no_clips",
    }  # fmt: skip


def test_a_second_run_works_nothing_out_and_other_rules_only_what_is_missing(
    raw: Path, copy: Path
) -> None:
    kinema("curate", raw, "-o", copy, 'filter.rules=["duration >= 3.5"]')
    assert computed(copy) == {"look": 0, "segment": 0, "cut": 0}
    assert sum(not row["dropped_by"] for row in rows(copy)) == 1
    kinema("curate", raw, "-o", copy, "filter.rules=[]")
    assert computed(copy)["cut"] == 2  # the still, and the small copy
    kept = [row for row in rows(copy) if not row["dropped_by"]]
    assert len(kept) == 4
    (twin,) = [row for row in rows(copy) if row["dropped_by"]]
    assert twin["dropped_by"] == 'filter: duplicate_of == ""'
    assert twin["source_name"].endswith("copies/small.mp4")
    assert twin["duplicate_of"] == next(
        row["id"] for row in kept if row["source_name"].endswith("/one.mp4")
    )


def test_a_caption_belongs_to_a_whole_video_only(out: Path) -> None:
    texts = {row["source_name"].split("/", 1)[1]: row["text"] for row in rows(out)}
    assert texts["one.mp4"] == "A white square slides to the right."
    assert texts["two.mp4"] == ""


def test_the_result_does_not_depend_on_the_number_of_workers(raw: Path, tmp_path: Path) -> None:
    tables = []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        kinema("curate", raw, "-o", out, "--workers", workers, "--no-report")
        tables.append(pa_parquet.read_table(out / "manifest.parquet"))
        assert not (out / "report.html").exists()
    assert tables[0].equals(tables[1])
    clips = sorted(p.relative_to(tmp_path / "1") for p in (tmp_path / "1/clips").rglob("*.mp4"))
    assert clips
    for clip in clips:
        assert (tmp_path / "1" / clip).read_bytes() == (tmp_path / "3" / clip).read_bytes()


def test_a_killed_run_goes_on(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*KINEMA, "curate", str(raw), "-o", str(out), "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not list((out / "stages").glob("cut/*/*.arrows")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kinema("curate", raw, "-o", out)
    assert computed(out)["segment"] == 0
    assert computed(out)["look"] == 0
    assert {row["cut_by"] for row in rows(out)} == {"encode", None}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{empty}", "-o", "{out}"], "has no videos"),
        (["{empty}/none", "-o", "{out}"], "does not exist"),
        (["{raw}/empty.mp4", "-o", "{out}"], "none of 1 videos gives a clip"),
        (["{raw}", "-o", "{out}", "scenes.min=3"], "did you mean 'min_s'"),
        (["{raw}", "-o", "{out}", "filter.rules=[aesthetic >= 5]"], "the stage 'aesthetic' gives"),
        (["{raw}", "-o", "{out}", "filter.rules=[flwo >= 5]"], "did you mean 'flow'"),
        (["{raw}", "-o", "{out}", "filter.rules=[flow >=]"], "flow >="),
        (["{raw}", "-o", "{out}", "filter.preset=opensora"], "opensora"),
        (["{raw}", "-o", "{out}", "aesthetic.clip={empty}", "aesthetic.head={empty}/x.pth"],
         "config.json"),
        (["{raw}", "-o", "{out}", "--recipe", "curate/defualt"], "did you mean 'curate/default'"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_line(
    raw: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    names = {"raw": raw, "empty": empty, "out": tmp_path / "out"}
    done = subprocess.run(
        [*KINEMA, "curate", *(word.format(**names) for word in arguments)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "manifest.parquet").exists()


def test_two_runs_in_one_folder_are_refused(raw: Path, tmp_path: Path) -> None:
    from kinema.curation.store import ResultStore

    with ResultStore(f"{tmp_path}/stages"):
        done = kinema("curate", raw, "-o", tmp_path, code=1)
    assert "another curation run" in done.stderr


def test_captions_by_an_endpoint(raw: Path, copy: Path, server: Server) -> None:
    config = [
        f"caption={{endpoint: {server.address}, model: eyes, price_per_million_input: 1, "
        "price_per_million_output: 2, prompt: Describe it., backoff_s: 0.01, retries: 1}",
        "filter.rules=[not blank(text)]",
    ]
    done = kinema("curate", raw, "-o", copy, *config)
    assert "captions by eyes, about: 3 videos" in done.stderr  # one has a text file
    assert "USD" in done.stderr
    kept = [row for row in rows(copy) if not row["dropped_by"]]
    assert len(kept) == 4
    assert sum(row["caption_model"] == "eyes" for row in kept) == 3
    assert len(server.asked) == 3
    kinema("curate", raw, "-o", copy, *config)
    assert len(server.asked) == 3


def test_an_endpoint_that_fails_costs_no_other_work(raw: Path, copy: Path, server: Server) -> None:
    def fails(question: Any) -> Reply:
        return 401, {}, b"{}"

    kinema("curate", raw, "-o", copy, "filter.rules=[]")
    server.says = fails
    config = f"caption={{endpoint: {server.address}, model: other, retries: 0, backoff_s: 0.01}}"
    done = kinema("curate", raw, "-o", copy, config, "filter.rules=[]", code=1)
    assert "captioned" in done.stderr
    assert "401" in done.stderr
    assert len(rows(copy)) == 5  # the manifest is there, without these captions
    assert not any("caption" in row["dropped_by"] for row in rows(copy))  # which may come yet
    assert computed(copy)["cut"] == 0


def test_cuts_by_a_list_with_captions_and_scores(raw: Path, tmp_path: Path) -> None:
    import pyarrow as pa

    cuts = [[0.5, 2.5, "first", {"umt_score": 0.4}], [4.0, 6.0, "second", {"umt_score": 0.7}]]
    table = pa.table({"path": [str(raw / "two.mp4")], "_cuts": [json.dumps(cuts)]})
    pa_parquet.write_table(table, tmp_path / "cuts.parquet")
    kinema("curate", "cut", tmp_path / "cuts.parquet", "-o", tmp_path / "out")
    found = rows(tmp_path / "out")
    assert [(r["start_s"], r["end_s"], r["text"], r["umt_score"]) for r in found] == [
        (0.5, 2.5, "first", 0.4), (4.0, 6.0, "second", 0.7),
    ]  # fmt: skip
    assert [row["num_frames"] for row in found] == [24, 24]


def test_scenes_alone_are_a_cut_list(raw: Path, tmp_path: Path) -> None:
    kinema("curate", "scenes", raw / "two.mp4", "-o", tmp_path / "cuts.parquet")
    (row,) = pa_parquet.read_table(tmp_path / "cuts.parquet").to_pylist()
    assert [cut[:2] for cut in json.loads(row["_cuts"])] == [[0.0, 3.0], [3.0, 7.0]]


@pytest.mark.parametrize(
    ("stage", "columns"),
    [
        ("probe", {"codec": "h264", "rotation": 0, "audio": False}),
        ("motion", {"camera_motion": "static"}),
        ("quality", {"border_share": 0.0}),
        ("ocr", {"ocr_boxes": 0}),
        ("dedup", {"duplicate_of": ""}),
    ],
)
def test_one_stage_adds_its_columns_to_a_manifest(
    raw: Path, tmp_path: Path, stage: str, columns: dict[str, Any]
) -> None:
    good = ["one.mp4", "two.mp4"]
    given = {
        "path": [*good, "empty.mp4"], "text": ["a", "b", "c"], "num_frames": [36, 84, 9],
        "height": [160, 160, 9], "width": [256, 256, 9], "fps": [12.0] * 3, "mine": [1, 2, 3],
    }  # fmt: skip
    Manifest.from_columns(given, raw).write(tmp_path / "m.parquet")
    done = kinema("curate", stage, tmp_path / "m.parquet", "-o", tmp_path / "new.parquet")
    assert "2 of 3 clips" in done.stdout
    found = pa_parquet.read_table(tmp_path / "new.parquet").to_pylist()
    assert [row["mine"] for row in found] == [1, 2, 3]
    assert [row["dropped_by"] for row in found] == ["", "", "look: empty"]
    assert {name: found[0][name] for name in columns} == columns
    assert Manifest.read(tmp_path / "new.parquet").absolute_path(1) == raw / "two.mp4"


def test_copying_keeps_long_gops_and_says_what_that_costs(raw: Path, tmp_path: Path) -> None:
    import av

    path = tmp_path / "long.mp4"
    frames = np.concatenate([shot(1, 4), shot(2, 4)])
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FPS, options={"sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt = 256, 160, "yuv420p"
        stream.codec_context.gop_size = 60
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    done = kinema("curate", "cut", "--copy", path, "-o", tmp_path / "out")
    assert "key frames they had, 60 frames apart" in done.stderr
    (row,) = rows(tmp_path / "out")
    assert row["gop"] == 60
    kinema("curate", path, "-o", tmp_path / "found", "--copy", "--no-report")
    assert {row["cut_by"] for row in rows(tmp_path / "found")} == {"copy"}
