"""Curation and training with videos, results and manifests in a store: S3 on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pa_parquet
import pytest

from kinema.cli.main import main
from kinema.config.errors import KinemaError
from kinema.curation.config import ScenesConfig
from kinema.curation.inputs import find_inputs
from kinema.curation.look.look import watch
from kinema.curation.look.scenes import SceneAnalyzer
from kinema.data.manifest import Manifest
from kinema.media import stores
from kinema.media.probe import probe
from kinema.media.read import read_frames
from kinema.media.stores import files_below, read_bytes, upload
from kinema.media.write import write_image, write_video
from tests.integration.train_fixtures import write_clips
from tests.s3_fixture import S3Store, let_pass

KINEMA = (sys.executable, "-c", "from kinema.cli.main import main; main()")
FPS = 8
RECIPE = ("--recipe", "curate/default", "--workers", "1", "scenes.min_s=1", "filter.rules=[]",
          "motion=null")  # fmt: skip
CLIPS = 5
"""In `raw`: two, two and one."""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def refusing(s3: S3Store) -> Iterator[S3Store]:
    """The store, which lets everything pass again in the end."""
    yield s3
    s3.refuse = let_pass


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*KINEMA, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What it wrote to stderr."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    return err


def command(*words: object, code: int = 0) -> None:
    """`kinema` in this process."""
    ended: object = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kinema", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            ended = end.code
    assert (ended or 0) == code


def curate(*arguments: object, code: int = 0) -> str:
    return finish(start("curate", *arguments, *RECIPE), code)


def shot(seed: int, seconds: float) -> np.ndarray[Any, Any]:
    """uint8 `[T, 48, 64, 3]`: a square that moves over smooth colours."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 200, (6, 8, 3)).astype(np.uint8)
    frames = np.repeat(coarse.repeat(8, 0).repeat(8, 1)[None], round(seconds * FPS), 0)
    for number, frame in enumerate(frames):
        frame[4 * seed : 4 * seed + 12, number : number + 12] = 255
    return frames


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos") / "raw"
    write_video(folder / "one.mp4", shot(1, 2), FPS)
    write_video(folder / "two.mp4", np.concatenate([shot(2, 2), shot(3, 2)]), FPS)
    write_video(folder / "a b" / "über #1.mp4", np.concatenate([shot(4, 2), shot(5, 2)]), FPS)
    write_video(folder / ".hidden" / "no.mp4", shot(6, 1), FPS)
    write_video(folder / ".no.mp4", shot(6, 1), FPS)
    write_image(folder / "still.png", shot(7, 1)[0])
    (folder / "cut.mp4").write_bytes((folder / "one.mp4").read_bytes()[:500])
    (folder / "one.txt").write_text("A pattern\nmoves. ")
    (folder / "notes.md").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def stored(s3: S3Store, raw: Path) -> str:
    """The same in a store."""
    url = f"{s3.bucket('material')}/raw"
    for file in raw.rglob("*.*"):
        if file.is_file():
            upload(file, f"{url}/{file.relative_to(raw)}")
    return url


@pytest.fixture(scope="module")
def local_set(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What curation makes of it without a store."""
    out = tmp_path_factory.mktemp("local") / "set"
    command("curate", raw, "-o", out, *RECIPE)
    return out


@pytest.fixture(scope="module")
def stored_set(s3: S3Store, stored: str) -> str:
    """From the store into the store."""
    out = f"{s3.bucket('sets')}/a"
    err = curate(stored, "-o", f"{out}/")
    assert "1 images are left out" in err
    return out


def rows(out: str | Path) -> list[dict[str, Any]]:
    """The manifest, without what depends on where its files are."""
    content = stores.open_place(f"{out}/manifest.parquet")
    table: Any = pa_parquet.read_table(content)
    names = [n for n in table.column_names if n not in ("state", "source", "path", "frames")]
    found: list[dict[str, Any]] = table.select(names).to_pylist()
    return found


def files(out: str | Path, column: str) -> list[bytes]:
    """What the files are that the manifest names in a column."""
    table: Any = pa_parquet.read_table(stores.open_place(f"{out}/manifest.parquet"))
    return [read_bytes(f"{out}/{name}") for name in table.column(column).to_pylist()]


def computed(out: str) -> dict[str, int]:
    run = json.loads(read_bytes(f"{out}/run.json"))
    return {stage["name"]: stage["computed"] for stage in run["stages"]}


def test_from_store_to_store_nothing_is_lost(
    s3: S3Store, stored: str, stored_set: str, local_set: Path
) -> None:
    there = s3.names(stored_set)
    assert {"manifest.parquet", "report.html", "refused.jsonl", "run.json", "recipe.yaml",
            "sources.parquet"} <= there  # fmt: skip
    for folder, count in (("clips", CLIPS), ("frames", CLIPS), ("signals", 9)):
        assert sum(name.startswith(f"{folder}/") for name in there) == count
    parts = {name.split("/")[1] for name in there if name.startswith("stages/")} - {"format.json"}
    assert parts == {"probe", "scenes", "quality", "hashes", "segment", "cut", "frames"}

    assert rows(stored_set) == rows(local_set)
    assert len(rows(stored_set)) == CLIPS
    refused = json.loads(read_bytes(f"{stored_set}/refused.jsonl"))
    assert (refused["path"], refused["reason"]) == (f"{stored}/cut.mp4", "truncated")
    for name in ("path", "frames"):
        here, stored_files = (files(out, name) for out in (local_set, stored_set))
        assert here == stored_files
        assert len(set(here)) == CLIPS
    assert "A pattern moves." in {row["text"] for row in rows(stored_set)}


def test_a_second_run_computes_nothing_and_writes_no_clip(
    s3: S3Store, stored: str, stored_set: str
) -> None:
    before = rows(stored_set)
    s3.requests.clear()
    command("curate", stored, "-o", stored_set, *RECIPE)
    assert set(computed(stored_set).values()) == {0}
    assert rows(stored_set) == before
    written = {path.partition("/a/")[2] for method, path, _ in s3.requests if method == "PUT"}
    assert not [name for name in written if name.startswith(("clips", "frames", "signals"))]
    assert s3.fetched("/raw/") < 100  # a caption, no video


def test_from_here_to_a_store_and_from_a_store_to_here(
    s3: S3Store, raw: Path, stored: str, local_set: Path, tmp_path: Path
) -> None:
    there = f"{s3.bucket('mixed')}/set"
    command("curate", raw, "-o", there, *RECIPE)
    assert rows(there) == rows(local_set)
    command("curate", stored, "-o", tmp_path / "set", *RECIPE)
    assert rows(tmp_path / "set") == rows(local_set)
    clip = Manifest.read(f"{there}/manifest.parquet").absolute_path(0)
    same = Manifest.read(tmp_path / "set" / "manifest.parquet").absolute_path(0)
    assert str(clip).startswith(there)
    assert np.array_equal(read_frames(clip, [3]), read_frames(same, [3]))


def test_a_store_that_takes_nothing_is_one_line(
    refusing: S3Store, stored: str, capfd: pytest.CaptureFixture[str]
) -> None:
    command("curate", stored, "-o", "s3://no-such-bucket/set", *RECIPE, code=1)
    err = capfd.readouterr().err
    assert "error: s3://no-such-bucket/set/stages/format.json: cannot be written" in err
    assert "bucket does not exist" in err
    assert "Traceback" not in err
    refusing.bucket("closed")
    refusing.refuse = lambda method, path: 403 if path.startswith("/closed") else 0
    command("curate", stored, "-o", "s3://closed/set", *RECIPE, code=1)
    err = capfd.readouterr().err
    assert "error: s3://closed/set/stages/format.json: Forbidden" in err
    assert len(err.strip().splitlines()) == 1


def test_a_store_that_goes_away_and_comes_back(
    refusing: S3Store, stored: str, stored_set: str, capfd: pytest.CaptureFixture[str]
) -> None:
    out = f"{refusing.bucket('away')}/set"
    # A video cannot be read now: it is left out, and nothing is remembered of that.
    refusing.refuse = lambda method, path: (
        403 if method == "GET" and path.endswith("one.mp4") else 0
    )
    command("curate", stored, "-o", out, *RECIPE)
    refused = [json.loads(line) for line in read_bytes(f"{out}/refused.jsonl").splitlines()]
    assert {item["reason"] for item in refused} == {"truncated", "unreadable"}
    assert len(rows(out)) == CLIPS - 1

    # No clip can be written any more.
    refusing.refuse = lambda method, path: 403 if method == "PUT" and "/clips/" in path else 0
    capfd.readouterr()
    command("curate", stored, "-o", out, *RECIPE, code=1)
    err = capfd.readouterr().err
    assert f"error: {out}/clips/" in err
    assert "cannot be written: AccessDenied" in err
    assert "goes on where it stopped" in err
    assert "Traceback" not in err

    refusing.refuse = let_pass
    command("curate", stored, "-o", out, *RECIPE)
    found = computed(out)
    assert (found["look"], found["cut"]) == (0, 1)
    assert rows(out) == rows(stored_set)


def test_two_runs_at_once_into_one_store(s3: S3Store, stored: str, stored_set: str) -> None:
    out = f"{s3.bucket('both')}/set"
    runs = [start("curate", stored, "-o", out, *RECIPE) for _ in range(2)]
    for run in runs:
        finish(run)
    assert rows(out) == rows(stored_set)
    command("curate", stored, "-o", out, *RECIPE)
    assert set(computed(out).values()) == {0}


@pytest.fixture(scope="module")
def world(s3: S3Store, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A manifest of captioned clips in a store."""
    folder = tmp_path_factory.mktemp("world")
    write_clips(folder, count=8)
    url = f"{s3.bucket('world')}/set"
    for file in folder.rglob("*.*"):
        upload(file, f"{url}/{file.relative_to(folder)}")
    return f"{url}/clips.parquet"


def test_manifests_in_a_store(
    s3: S3Store, stored_set: str, world: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = f"{stored_set}/manifest.parquet"
    tables = f"{s3.bucket('tables')}/m"
    command("data", "plan", manifest, "tiny/smoke")
    assert f"{CLIPS} of {CLIPS} clips train" in capfd.readouterr().out
    command("data", "check", world, "-o", f"{tables}/checked.parquet", "--workers", 1)
    assert "8 of 8 clips are good" in capfd.readouterr().out
    command("data", "filter", manifest, "duration > 0", "-o", f"{tables}/kept.parquet")
    command("data", "filter", manifest, "num_frames >= 1", "-o", tmp_path / "kept.parquet")
    merged = (f"{tables}/kept.parquet", tmp_path / "kept.parquet")
    command("data", "merge", *merged, "-o", f"{tables}/merged.csv")
    sides = ("-o", f"{tables}/train.parquet", "--validation", f"{tables}/held_out.parquet")
    command("data", "split", f"{tables}/merged.csv", *sides, "--share", 0.5, "--by", "path")
    command("data", "stats", f"{tables}/merged.csv")
    command("data", "explain", 0, "tiny/smoke", "--manifest", manifest)
    capfd.readouterr()
    assert s3.names(tables) == {"checked.parquet", "kept.parquet", "merged.csv", "train.parquet",
                                "held_out.parquet"}  # fmt: skip
    whole = {str(Manifest.read(manifest).absolute_path(row)) for row in range(CLIPS)}
    found = set()
    for name in ("train.parquet", "held_out.parquet"):
        side = Manifest.read(f"{tables}/{name}")
        found |= {str(side.absolute_path(row)) for row in range(len(side))}
    assert found == whole

    # Relative paths, and the folder in the store that they are below.
    here = tmp_path / "here.csv"
    here.write_text("path,text,num_frames,height,width,fps\none.mp4,a,16,48,64,8\n")
    command("data", "check", here, "--data-root", "s3://material/raw", "--workers", 1)
    assert "1 of 1 clips are good" in capfd.readouterr().out


def test_training_reads_clips_from_a_store(
    world: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    common = ("--data-path", world, "--device", "cpu")
    steps = ("max_steps=2", "tracking.tensorboard=false")
    command("train", "tiny/smoke", *common, "--outputs", tmp_path / "runs", *steps)
    log = (tmp_path / "runs" / "000-smoke" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2]
    command("latents", "encode", "tiny/smoke", *common, "-o", tmp_path / "latents")
    assert "8 clips encoded, 0 left out" in capfd.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ("data", "index", "s3://world/set", "-o", "x.parquet"),
        ("data", "import", "csv", "t.csv", "--videos", "s3://world/set", "-o", "x.parquet"),
        ("latents", "encode", "tiny/smoke", "-o", "s3://world/latents"),
        ("text", "encode", "tiny/smoke", "-o", "s3://world/captions"),
        ("train", "tiny/smoke", "--outputs", "s3://world/runs"),
    ],
)
def test_what_has_to_be_on_this_machine_says_so(
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command(*words, code=2)
    assert "s3://world/" in (err := capfd.readouterr().err)
    assert "has to be on this machine" in err
    assert not list(tmp_path.iterdir())


def test_a_page_of_clips_in_a_store(world: str, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    testclient = pytest.importorskip("starlette.testclient")
    from kinema.serving.browse.app import make_app
    from kinema.serving.browse.edits import Edits
    from kinema.serving.browse.posters import Posters

    manifest = Manifest.read(world)
    edits = Edits(tmp_path / "edits.jsonl", manifest.path, len(manifest))
    posters = Posters(manifest, workers=1, folder=tmp_path / "posters")
    try:
        app = make_app(manifest, edits, posters, token=None)
        with testclient.TestClient(app, base_url="http://127.0.0.1") as page:
            assert page.get("/media/0/file").content == read_bytes(str(manifest.absolute_path(0)))
    finally:
        posters.close()


def test_what_a_folder_of_a_store_holds(stored: str, raw: Path) -> None:
    there, here = find_inputs([stored]), find_inputs([str(raw)])
    for name in ("id", "name", "text"):
        assert there.table.column(name).to_pylist() == here.table.column(name).to_pylist()
    assert there.images == here.images == 1
    assert set(there.table.column("path").to_pylist()) == {
        f"{stored}/{name}" for name in ("one.mp4", "two.mp4", "a b/über #1.mp4", "cut.mp4")
    }
    assert all(there.table.column("state").to_pylist())
    assert there.table.equals(find_inputs([f"{stored}/"]).table)


def test_lists_and_tables_in_a_store(stored: str, s3: S3Store, tmp_path: Path) -> None:
    base = f"{s3.bucket('lists')}/a"

    def put(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        upload(tmp_path / name, f"{base}/{name}")
        return f"{base}/{name}"

    def paths(*given: str, **more: str) -> list[str]:
        table = find_inputs(given, **more).table
        assert all(table.column("state").to_pylist())
        found: list[str] = sorted(table.column("path").to_pylist())
        return found

    whole = put("whole.txt", f"# a comment\n{stored}/one.mp4\n\n{stored}/two.mp4\n")
    assert paths(whole) == [f"{stored}/one.mp4", f"{stored}/two.mp4"]
    below = put("below.txt", "raw/one.mp4\n")
    assert paths(below, data_root=stored.rsplit("/", 1)[0]) == [f"{stored}/one.mp4"]
    table = put("table.csv", "path,text\none.mp4,words\n")
    assert paths(table, data_root=stored) == [f"{stored}/one.mp4"]
    beside = f"{base}/beside"
    upload(tmp_path / "table.csv", f"{beside}/table.csv")
    (tmp_path / "one.mp4").write_bytes(read_bytes(f"{stored}/one.mp4"))
    upload(tmp_path / "one.mp4", f"{beside}/one.mp4")
    assert paths(f"{beside}/table.csv") == [f"{beside}/one.mp4"]
    assert paths(f"{stored}/one.mp4", whole) == [f"{stored}/one.mp4", f"{stored}/two.mp4"]

    captions = put("captions.csv", "path,text\na b/über #1.mp4,from the table\n")
    found = find_inputs([stored], captions=captions).table
    texts = dict(zip(found["name"].to_pylist(), found["text"].to_pylist(), strict=True))
    assert texts["raw/a b/über #1.mp4"] == "from the table"
    assert texts["raw/one.mp4"] is None

    gone = find_inputs([put("gone.txt", f"{stored}/gone.mp4\n")])
    assert gone.table.column("state").to_pylist() == [""]
    for missing in (f"{base}/none", "s3://no-such-bucket/x", f"{base}/none.txt", f"{base}/n.csv",
                    f"{stored}/gone.mp4"):  # fmt: skip
        with pytest.raises(KinemaError, match="does not exist"):
            find_inputs([missing])


def test_a_store_that_does_not_list_is_named(refusing: S3Store, stored: str) -> None:
    refusing.refuse = lambda method, path: 403
    with pytest.raises(KinemaError, match=f"{stored}: cannot be listed"):
        find_inputs([stored])


def test_runs_in_a_folder_are_no_material(s3: S3Store, stored_set: str) -> None:
    bucket = stored_set.rsplit("/", 1)[0]
    with pytest.raises(KinemaError, match=f"only {CLIPS} clips of a curation run"):
        find_inputs([bucket])
    assert find_inputs([f"{stored_set}/clips"]).table.num_rows == CLIPS


def test_a_large_source_is_read_in_blocks(
    s3: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (40, 96, 128, 3), dtype=np.uint8)
    write_video(tmp_path / "large.mp4", frames, FPS, crf=8)
    url = f"{s3.bucket('large')}/large.mp4"
    upload(tmp_path / "large.mp4", url)
    size = (tmp_path / "large.mp4").stat().st_size
    monkeypatch.setattr(stores, "WHOLE_BYTES", 10_000)
    monkeypatch.setattr(stores, "BLOCK_BYTES", 20_000)
    assert size > 400_000
    s3.requests.clear()
    assert probe(url) == probe(tmp_path / "large.mp4")
    assert 0 < s3.fetched("large.mp4") < size / 4

    s3.requests.clear()
    seen = watch(url, lambda info: {"scenes": SceneAnalyzer(ScenesConfig(), info)})
    assert len(seen.damaged) == 40
    assert size / 2 < s3.fetched("large.mp4") < 1.5 * size


def test_files_below(stored: str, raw: Path) -> None:
    names = files_below(stored)
    there = {str(f.relative_to(raw)) for f in raw.rglob("*") if f.is_file()}
    assert there <= set(names)
    assert names["one.mp4"] == stores.version_in_store(f"{stored}/one.mp4")
    assert list(files_below(f"{stored}/one.mp4")) == [""]
    assert files_below(f"{stored}/none") == {}
