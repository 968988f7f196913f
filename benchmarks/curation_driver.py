"""What the driver of `kinema curate` costs at a given size, with nothing decoded.

    python benchmarks/curation_driver.py --sources 100000 --clips 10

The sources are empty files, named by a table. A run first takes made-up results from an executor
that does nothing else (what the engine costs per row), then again with all of them known (what
stands between a person who changed a rule and the new manifest), then with one rule that leaves
half of the clips uncut. Step by step: seconds, and peak memory until then.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet

from kinema.config.recipe import load_recipe
from kinema.curation import pipeline
from kinema.curation.config import CurateRecipe
from kinema.curation.executor import Done, Task, after
from kinema.curation.report import write_report
from kinema.curation.stage import Places, Result, Row, Stage, row_id

STEPS = (
    "find_inputs", "_open", "_sources", "clip_table", "_cut_and_score", "_compare", "_caption",
    "_judge", "_write_refused", "_summary",
)  # fmt: skip
"""Of `pipeline`, in the order in which they are called."""
SECONDS, FPS = 6.0, 30.0


class MadeUp:
    """An executor that answers at once."""

    name = "made up"

    def __init__(self, clips: int) -> None:
        self.clips = clips
        self.seconds = 0.0
        """That making things up took, which is nobody's cost."""

    def workers(self, stage: Stage) -> int:
        return 1

    def stream(
        self, stages: Sequence[Stage], tasks: Iterator[Task], places: Places
    ) -> Iterator[Done]:
        for task in tasks:
            for number, todo in enumerate(task.todo):
                result: Result = {}
                if todo:
                    start = time.perf_counter()
                    result = {part: getattr(self, part)(task.row) for part in todo}
                    self.seconds += time.perf_counter() - start
                    yield Done(task.number, number, task.row, result, 0.001)
                task = after(task, number, result)

    def close(self) -> None:
        pass

    def probe(self, row: Row) -> Row:
        seconds = self.clips * SECONDS
        return {
            "width": 1280, "height": 720, "aspect_ratio": 720 / 1280, "fps": FPS,
            "num_frames": round(seconds * FPS), "duration": seconds, "codec": "h264",
            "bit_rate": 4_000_000, "rotation": 0, "audio": True, "variable_rate": False,
            "file_size": round(seconds * 500_000),
        }  # fmt: skip

    def scenes(self, row: Row) -> Row:
        return self._signals(row, "scenes") | {"damaged": 0}

    def motion(self, row: Row) -> Row:
        return self._signals(row, "motion")

    def quality(self, row: Row) -> Row:
        return self._signals(row, "quality")

    def hashes(self, row: Row) -> Row:
        return self._signals(row, "hashes")

    def _signals(self, row: Row, part: str) -> Row:
        return {f"_signals_{part}": f"{row['id'][:2]}/{row['id']}.{part}-0123abcd.npz"}

    def segment(self, row: Row) -> Row:
        draw = np.random.default_rng(int(row["id"][:8], 16))
        clips = []
        for number in range(self.clips):
            start, end = round(number * SECONDS * FPS), round((number + 1) * SECONDS * FPS)
            score = draw.random(9).tolist()
            if not number or draw.random() > 0.1:  # else a copy of the clip before
                hashes = draw.integers(0, 1 << 63, 5, np.uint64)
            clips.append(
                {
                    "id": row_id(row["id"], start, end),
                    "start_frame": start, "end_frame": end, "whole": False,
                    "start_s": start / FPS, "end_s": end / FPS, "duration": SECONDS,
                    "num_frames": end - start, "height": 720, "width": 1280,
                    "aspect_ratio": 720 / 1280, "resolution": 720 * 1280, "fps": FPS,
                    "file_size": None, "motion_mv": score[0], "motion_mv_patch": score[1],
                    "flow": score[2], "static_share": score[3], "camera_motion": "pan_left",
                    "jitter": score[4], "sharpness": score[5], "brightness": 255 * score[6],
                    "dark_share": score[7], "bright_share": score[8], "duplicate_share": 0.0,
                    "blockiness": 0.1, "border_top": 0, "border_bottom": 0, "border_left": 0,
                    "border_right": 0, "border_share": 0.0,
                    "phash": " ".join(f"{int(h):016x}" for h in hashes),
                }
            )  # fmt: skip
        return {"_clips": json.dumps(clips), "clips": len(clips), "no_clips": None}

    def cut(self, row: Row) -> Row:
        from kinema.curation.cut import COLUMNS

        path = self._file(f"clips/{row['id'][:2]}/video_{row['id'][:8]}.mp4")
        given = {name: row.get(name) for name in COLUMNS}
        return given | {"path": path, "file_size": 3_000_000, "gop": 30, "cut_by": "encode",
                        "lost_s": 0.0}  # fmt: skip

    def frames(self, row: Row) -> Row:
        path = self._file(f"frames/{row['id'][:2]}/{row['id']}.jpg")
        return {"frames": path, "frames_count": 3}

    def ocr(self, row: Row) -> Row:
        return {"ocr_boxes": 1, "ocr_area": int(row["id"][:4], 16) / 65536, "ocr_text": "EXIT"}

    def _file(self, name: str) -> str:
        """A file that need not be there: nobody looks for those that are used where they are."""
        return f"/made/up/{name}"


class Timed:
    """Tells of each step how long it took."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, float, float]] = []
        for name in STEPS:
            setattr(pipeline, name, self.watch(name, getattr(pipeline, name)))

    def watch(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            found = work(*given, **named)
            self.lines.append((name.strip("_"), time.perf_counter() - start, peak()))
            return found

        return timed

    def show(self, title: str) -> None:
        total = sum(seconds for _, seconds, _ in self.lines)
        print(f"\n| {title} | seconds | peak, GB |\n|---|---|---|")
        for name, seconds, memory in self.lines:
            print(f"| {name} | {seconds:.1f} | {memory:.1f} |")
        print(f"| all | {total:.1f} | {peak():.1f} |", flush=True)
        self.lines.clear()


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def make_sources(folder: Path, count: int) -> Path:
    """Empty files, and a table of them."""
    names = [f"videos/{number % 256:02x}/video_{number:08d}.mp4" for number in range(count)]
    for number in range(256):
        (folder / f"videos/{number:02x}").mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    table = folder / "sources.parquet"
    pa_parquet.write_table(pa.table({"path": names, "topic": [name[7:9] for name in names]}), table)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=int, default=100_000)
    parser.add_argument("--clips", type=int, default=10, help="per source")
    parser.add_argument("--keep", type=Path, help="folder in which results stay")
    parser.add_argument("--profile", type=int, default=0, help="lines of a profile of each run")
    asked = parser.parse_args()
    timed = Timed()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.keep or Path(temporary)
        table = make_sources(folder, asked.sources)
        runs = {
            "made up": ["ocr={}"],
            "all known": ["ocr={}"],
            "half not cut": ["ocr={}", "filter.rules=[sharpness >= 0.5, ocr_area <= 0.9]"],
        }
        for title, changes in runs.items():
            recipe = load_recipe("curate/default", CurateRecipe, changes)
            profile = cProfile.Profile()
            if asked.profile:
                profile.enable()
            made_up = MadeUp(asked.clips)
            pipeline.curate([str(table)], str(folder / "out"), recipe, executor=made_up, say=print)
            timed.watch("report", write_report)(folder / "out")
            profile.disable()
            timed.show(f"{asked.sources:,} sources, {asked.sources * asked.clips:,} clips: {title}")
            print(f"\nof which making up results: {made_up.seconds:.1f} s")
            if asked.profile:
                pstats.Stats(profile).sort_stats("tottime").print_stats(asked.profile)


if __name__ == "__main__":
    main()
