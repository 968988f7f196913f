"""What curation costs: `python benchmarks/curation.py [--repeats 5] [--files 4] [--keep FOLDER]`.

The footage is made here: 20 s of 1280x720 at 30 frames/s, H.264 at about 4 Mbit/s, five shots (a
pan, a fixed camera with a moving block, a zoom, shaking hands, a dark scene) with film grain.

The first table is the one pass over a source, on one thread: decoding alone, the pass that looks
at nothing, each part alone, and all of them; CPU seconds, the best of the repeats, which work that
others do on the machine disturbs least. The second is whole stages in 1 and 2 worker processes,
each over copies of the file: wall clock, best of the repeats. Nothing is taken from a store.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from fractions import Fraction
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa

from kinema.curation.clips import clip_table
from kinema.curation.config import HashConfig, MotionConfig, QualityConfig, ScenesConfig
from kinema.curation.cut import CutStage
from kinema.curation.look.analyzer import Analyzer, FrameView, Signal
from kinema.curation.look.look import ANALYZERS, LookStage, watch
from kinema.curation.look.probe import SourceInfo
from kinema.curation.look.segment import SegmentStage
from kinema.curation.stage import Bad, Places, Result, Row, Stage, row_id
from kinema.media.container import open_video

HEIGHT, WIDTH, FPS, SHOT, SHOTS = 720, 1280, 30, 120, 5
FRAMES = SHOT * SHOTS
SECONDS = FRAMES / FPS
BIT_RATE = 4_000_000
SETTINGS: dict[str, Any] = {
    "scenes": ScenesConfig(),
    "motion": MotionConfig(),
    "quality": QualityConfig(),
    "hashes": HashConfig(),
}
LIMIT = 1.5
"""What scenes, motion and quality together may cost, in decodings."""


def make_footage(path: Path) -> None:
    draw = np.random.default_rng(0)
    grain = draw.normal(0, 4, (8, HEIGHT, WIDTH, 1)).astype(np.float32)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FPS, options={"preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate, stream.codec_context.gop_size = BIT_RATE, 250
        for shot in range(SHOTS):
            wall = _wall(draw)
            hands = np.cumsum(draw.normal(0, 2, (SHOT, 2)), 0)
            for t in range(SHOT):
                picture = _picture(wall, shot, t, hands[t]) + grain[t % 8]
                rgb = np.clip(picture, 0, 255).astype(np.uint8)
                frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
                frame.pts, frame.time_base = shot * SHOT + t, Fraction(1, FPS)
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _wall(draw: np.random.Generator) -> Any:
    wall = np.zeros((2 * HEIGHT, 2 * WIDTH, 3), np.float32)
    for size in (5, 23, 111):
        shape = 2 * HEIGHT // size + 2, 2 * WIDTH // size + 2, 3
        coarse = draw.normal(0, 30, shape).astype(np.float32)
        wall += cv2.resize(coarse, (2 * WIDTH, 2 * HEIGHT), interpolation=cv2.INTER_CUBIC)
    return wall + 110


def _picture(wall: Any, shot: int, t: int, hands: Any) -> Any:
    zoom = 1 + 0.003 * t if shot == 2 else 1.0
    left, top = WIDTH / 2 + (3.0 * t if shot == 0 else 0.0), HEIGHT / 2
    if shot == 3:
        left, top = left + hands[0], top + hands[1]
    matrix = np.array([[1 / zoom, 0, left], [0, 1 / zoom, top]])
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    picture: Any = cv2.warpAffine(wall, matrix, (WIDTH, HEIGHT), flags=how)
    if shot == 1:
        picture[260:460, 5 * t : 5 * t + 250] = (230, 60, 40)
    return picture / 5 if shot == 4 else picture


class LooksAtNothing:
    """An analyzer, so that the pass decodes."""

    def frame(self, view: FrameView) -> None:
        pass

    def signals(self) -> dict[str, Signal]:
        return {}


def decode_only(path: Path) -> None:
    with open_video(path) as video:
        for _ in video.container.decode(video.stream):
            pass


def look_for(path: Path, names: Sequence[str]) -> None:
    def make(info: SourceInfo) -> dict[str, Analyzer]:
        made: dict[str, Analyzer] = {} if names else {"nothing": LooksAtNothing()}
        for name in names:
            module, kind = ANALYZERS[name]
            made[name] = getattr(import_module(module), kind)(SETTINGS[name], info)
        return made

    watch(path, make)


def pass_table(path: Path, repeats: int) -> None:
    three = ["scenes", "motion", "quality"]
    runs: dict[str, Callable[[], None]] = {
        "decoding alone": lambda: decode_only(path),
        "the pass, looking at nothing": lambda: look_for(path, []),
    }
    for names in (*([name] for name in ANALYZERS), three, list(ANALYZERS)):
        runs["with " + ", ".join(names)] = lambda names=names: look_for(path, names)
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):  # in turn, so that a busy while hits all of them
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name] = min(seconds[name], time.process_time() - start)
    floor = seconds["decoding alone"]
    print("| one thread | ms per frame | times real time | decodings |")
    print("|---|---|---|---|")
    for name, taken in seconds.items():
        rate = SECONDS / taken
        print(f"| {name} | {1e3 * taken / FRAMES:.2f} | {rate:.1f} | {taken / floor:.2f} |")
    cost = seconds["with " + ", ".join(three)] / floor
    print(f"\nscenes, motion and quality: {cost:.2f} decodings; at most {LIMIT} wanted.\n")


@dataclass(frozen=True)
class Job:
    """Rows of a stage, and what came of them."""

    stage: Stage
    places: Places
    rows: list[Row]


def call(job: Job) -> tuple[list[Result], float]:
    """In a worker: results and CPU seconds."""
    work = _opened(job.stage, job.places)
    start = time.process_time()
    return work(job.rows), time.process_time() - start


_works: dict[str, Any] = {}


def _opened(stage: Stage, places: Places) -> Any:
    if stage.name not in _works:
        _works[stage.name] = stage.open(places)
    return _works[stage.name]


def stage_table(source: Path, folder: Path, files: int, repeats: int) -> None:
    sources: list[Row] = []
    for number in range(files):
        path = folder / f"{number}.mp4"
        shutil.copy(source, path)
        sources.append(
            {
                "id": row_id(number),
                "name": path.name,
                "state": "",
                "path": str(path),
                "file_size": path.stat().st_size,
                "todo": ["probe", *ANALYZERS],
            }
        )
    places = Places.below(str(folder / "out"))
    print("| stage | processes | clips/s | hours of video per hour | per core-hour |")
    print("|---|---|---|---|---|")
    for processes in (1, 2):
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            total = 0.0
            rows, found = sources, []
            for stage in (LookStage(), SegmentStage(), CutStage()):
                job = [Job(stage, places, [row]) for row in rows]
                list(pool.map(call, job[:processes]))  # the workers start
                wall, cpu, found = _best(pool, job, 1 if stage.name == "cut" else repeats)
                clips = _clip_count(stage, rows, found)
                _line(stage.name, processes, clips, files, wall, cpu)
                total += wall
                rows = _next_rows(rows, found)
            _line("all", processes, len(rows), files, total, None)


def _best(pool: Any, jobs: list[Job], repeats: int) -> tuple[float, float, list[Result]]:
    best, cpu, found = float("inf"), float("inf"), []
    for _ in range(repeats):
        start = time.perf_counter()
        answers = list(pool.map(call, jobs))
        best = min(best, time.perf_counter() - start)
        cpu = min(cpu, sum(seconds for _, seconds in answers))
        found = [result for results, _ in answers for result in results]
    for result in found:
        for part in result.values():
            if isinstance(part, Bad):
                raise SystemExit(part.message)
    return best, cpu, found


def _clip_count(stage: Stage, rows: list[Row], found: list[Result]) -> int:
    return len(rows) if stage.name == "cut" else SHOTS * len(found)


def _next_rows(rows: list[Row], found: list[Result]) -> list[Row]:
    """Rows with what was found; clips, once there are any."""
    merged = []
    for row, result in zip(rows, found, strict=True):
        full = dict(row)
        for part in result.values():
            assert not isinstance(part, Bad)
            full |= part
        merged.append(full | {"todo": ["segment"]})
    if "_clips" not in merged[0]:
        return merged
    clips = clip_table(pa.Table.from_pylist(merged)).to_pylist()
    return [clip | {"todo": ["cut", "frames"]} for clip in clips]


def _line(
    name: str, processes: int, clips: int, files: int, wall: float, cpu: float | None
) -> None:
    video = files * SECONDS
    per_core = "" if cpu is None else f"{video / cpu:.1f}"
    print(f"| {name} | {processes} | {clips / wall:.2f} | {video / wall:.1f} | {per_core} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--files", type=int, default=4, help="copies of the file, for the stages; 0: no stages"
    )
    parser.add_argument("--keep", type=Path, help="folder in which the footage stays")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = (args.keep or folder) / "footage.mp4"
        if not source.exists():
            source.parent.mkdir(parents=True, exist_ok=True)
            make_footage(source)
        megabits = source.stat().st_size * 8 / 1e6 / SECONDS
        versions = f"PyAV {av.__version__}, OpenCV {cv2.__version__}"
        print(f"{date.today()}, {platform.machine()}, {versions}, {megabits:.1f} Mbit/s\n")
        pass_table(source, args.repeats)
        if args.files:
            stage_table(source, folder, args.files, max(1, args.repeats // 2))


if __name__ == "__main__":
    main()
