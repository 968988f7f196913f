"""A data set of a million rows: `python benchmarks/import_tables.py [--rows 1000000]`.

Writes a table like OpenVid-1M's (captions of some 390 bytes, a hundredth with line breaks and
quotes) and as many empty files in 200 folders into a temporary folder, and runs `kinema data
import`'s parts on them, all but looking into the files: reading the table, listing the folder,
matching rows with files, writing the manifest. Then a list of ranges like Panda-70M's, three to a
video, to a cut list. Prints one markdown table of seconds on one core.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from kinema.curation.importers.catalog import data_set
from kinema.curation.importers.cut_list import cut_table, write_cut_list
from kinema.curation.importers.dataset import Request
from kinema.curation.importers.findings import Findings
from kinema.curation.importers.resolve import resolve
from kinema.curation.importers.rows import read_rows
from kinema.curation.importers.run import write_clips
from kinema.curation.importers.video_folder import VideoFolder

FOLDERS = 200
WORDS = 60
Value = TypeVar("Value")
seconds: dict[str, float] = {}


def timed(what: str, call: Callable[[], Value]) -> Value:
    start = time.perf_counter()
    value = call()
    seconds[what] = time.perf_counter() - start
    return value


def captions(rows: int) -> pa.Array:
    random = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(5000)])
    texts = [" ".join(words[random.integers(0, 5000, WORDS)]) for _ in range(10_000)]
    texts[::100] = [f'{text[:200]}\nand "{text[200:]}"' for text in texts[::100]]
    return pa.array(texts).take(pa.array(np.arange(rows) % len(texts)))


def openvid(root: Path, rows: int) -> Path:
    names = [f"{number:011x}_{number % 40}_0to{number % 300}.mp4" for number in range(rows)]
    for folder in range(FOLDERS):
        (root / "videos" / f"part{folder}").mkdir(parents=True)
    for number, name in enumerate(names):
        (root / "videos" / f"part{number % FOLDERS}" / name).touch()
    random = np.random.default_rng(1)
    path = root / "OpenVid-1M.csv"
    pa_csv.write_csv(
        pa.table(
            {
                "video": names,
                "caption": captions(rows),
                "aesthetic score": random.normal(5, 0.5, rows),
                "motion score": random.gamma(2, 3, rows),
                "temporal consistency score": random.random(rows),
                "camera motion": np.array(["static", "pan_left", "zoom_in"])[np.arange(rows) % 3],
                "frame": np.full(rows, 180),
                "fps": np.full(rows, 30.0),
                "seconds": np.full(rows, 6.0),
            }
        ),
        path,
    )
    return path


def panda(root: Path, videos: int) -> Path:
    path = root / "panda70m_training_2m.csv"
    times = "[['0:01:20.880', '0:01:23.983'], ['0:02:31.151', '0:02:34.3'], ['0:03:28', '0:03:33']]"
    texts = "['A neuron in a black background.', \"It's a woman, talking.\", 'A whiteboard.']"
    names = [f"{number:011x}" for number in range(videos)]
    (root / "panda").mkdir()
    for name in names:
        (root / "panda" / f"{name}.mp4").touch()
    pa_csv.write_csv(
        pa.table(
            {
                "videoID": names,
                "url": [f"https://www.youtube.com/watch?v={name}" for name in names],
                "timestamp": [times] * videos,
                "caption": [texts] * videos,
                "matching_score": ["[0.451416015625, 0.4990234375, 0.434814453125]"] * videos,
            }
        ),
        path,
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        table = timed("(making the table and the files)", lambda: openvid(root, rows))
        run_openvid(table, root, rows)
        run_panda(panda(root, rows // 4), root)
    print(f"{date.today()}, {rows:,} rows\n")
    print("| part | seconds |\n|---|---|")
    for what, value in seconds.items():
        print(f"| {what} | {value:.1f} |")


def run_openvid(table: Path, root: Path, rows: int) -> None:
    entry, findings = data_set("openvid-1m"), Findings()
    request = Request((table,), root / "videos")
    size = table.stat().st_size / 1e6
    found = timed(
        f"reading the table ({size:.0f} MB of CSV)", lambda: read_rows(entry, request, findings)
    )
    videos = timed("listing the folder", lambda: VideoFolder(root / "videos"))
    clips = timed(
        "matching rows with files, tidying captions",
        lambda: resolve(entry, found, videos, findings),
    )
    assert len(clips.files) == rows
    facts = np.tile([180.0, 720.0, 1280.0, 30.0, 1e6], (rows, 1))
    kept = np.arange(rows)
    timed(
        "writing the manifest",
        lambda: write_clips(clips, kept, facts, root / "m.parquet", root, findings),
    )


def run_panda(table: Path, root: Path) -> None:
    entry, findings = data_set("panda-70m"), Findings()
    request = Request((table,), root / "panda")
    found = timed(
        "Panda-70M: reading the lists, three clips to a video",
        lambda: read_rows(entry, request, findings),
    )
    videos = VideoFolder(root / "panda")
    cuts = timed(
        f"Panda-70M: matching {found.table.num_rows:,} ranges",
        lambda: resolve(entry, found, videos, findings),
    )

    def write() -> None:
        paths = videos.paths.take(pa.array(cuts.files))
        sources = cut_table(paths, cuts.start_s, cuts.end_s, cuts.text, {})
        write_cut_list(root / "cuts.parquet", sources, data_root=root)

    timed("Panda-70M: writing the cut list", write)


if __name__ == "__main__":
    main()
