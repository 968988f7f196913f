"""The stage that writes clips, and the strips of frames that models look at."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kinema.curation.config import CutConfig, FramesConfig
from kinema.curation.files import new_file
from kinema.curation.stage import Bad, Found, Part, Places, Result, Row, Work, result_key
from kinema.media.errors import PASSING, MediaError
from kinema.media.stores import Place, is_url, version_in_store

if TYPE_CHECKING:
    from av import VideoFrame

    from kinema.curation.encode import Timing
    from kinema.curation.frames import Picture
    from kinema.curation.picture import Shape
    from kinema.media.frame_index import FrameIndex

VERSION = 2
SHAPED_BY = ("height", "width", "whole", "source_pixel_aspect")
BORDERS = ("border_top", "border_bottom", "border_left", "border_right")
COLUMNS: dict[str, pa.DataType] = {
    "path": pa.string(),
    "start_frame": pa.int64(),
    "end_frame": pa.int64(),
    "start_s": pa.float64(),
    "end_s": pa.float64(),
    "duration": pa.float64(),
    "num_frames": pa.int64(),
    "height": pa.int32(),
    "width": pa.int32(),
    "aspect_ratio": pa.float64(),
    "resolution": pa.int64(),
    "fps": pa.float64(),
    "file_size": pa.int64(),
    "gop": pa.int32(),
    "cut_by": pa.string(),
    "lost_s": pa.float64(),
    "border_share": pa.float64(),
} | dict.fromkeys(BORDERS, pa.int32())


@dataclass(frozen=True)
class CutStage:
    """Parts `cut` (the clip's file and what it is) and `frames` (its strip).

    `cut_by` says how a clip came: `encode`, `copy`, or `kept` for a file used where it is;
    `lost_s`, what `copy` left out of it because no key frame stands there.
    """

    cut: CutConfig = field(default_factory=CutConfig)
    frames: FramesConfig = field(default_factory=FramesConfig)
    time_limit: float = 60.0

    name = "cut"
    batch = 1
    gpu = False
    threads = 1

    @property
    def parts(self) -> Sequence[Part]:
        look = {
            "version": VERSION,
            "letterbox": self.cut.letterbox,
            "max_side": self.cut.max_side,
            "mode": self.cut.mode,
            "whole": self.cut.whole,
        }
        frames = {"frames": pa.string(), "frames_count": pa.int32()}
        # A file that is used where it is may be moved.
        depends = (*BORDERS, "source") if self.cut.whole == "keep" else BORDERS
        return [
            Part("cut", COLUMNS, {"version": VERSION} | asdict(self.cut), depends, file="path"),
            Part("frames", frames, look | {"strip": asdict(self.frames)}, BORDERS, file="frames"),
        ]

    def time_limit_s(self, row: Row) -> float:
        # Encoding takes as long as the picture is large; the setting is for 720p.
        size = max(1.0, (row.get("resolution") or 0) / (1280 * 720))
        return self.time_limit + 3.0 * size * float(row.get("duration") or 0)

    def open(self, places: Places) -> Work:
        stage = self

        def work(rows: Sequence[Row]) -> list[Result]:
            return [cut_clip(stage, places, row) for row in rows]

        return work


def cut_clip(stage: CutStage, places: Places, row: Row) -> Result:
    """The parts in the row's `todo`; where both are wanted, from one decoding."""
    todo = [part for part in ("cut", "frames") if part in row["todo"]]
    try:
        return _cut(stage, places, row, todo)
    except MediaError as error:
        passing = error.reason in PASSING
        return {part: Bad(error.reason, error.what, passing) for part in todo}


def _cut(stage: CutStage, places: Places, row: Row, todo: Sequence[str]) -> Result:
    from kinema.curation.encode import encode
    from kinema.curation.frames import frame_places

    how = _how(stage.cut, row)
    cut_part, frames_part = stage.parts
    source, start, end = row["source"], row["start_frame"], row["end_frame"]
    shape = _shape(stage.cut, row, how)
    if how == "copy":
        start = _copied_from(source, start, end)
    found: dict[str, Found] = {}
    strip = _Strip(stage.frames, frame_places(start, end, stage.frames.count), shape)
    if "cut" in todo and how == "encode":
        timing = _timing(row)
        place = f"{row['id'][:2]}/{clip_name(row, cut_part)}.mp4"
        wanted = sorted({*timing.places.tolist(), *(strip.places if "frames" in todo else ())})
        frames = decode(source, wanted)
        if "frames" in todo:
            frames = strip.watch(frames, set(timing.places.tolist()))
        with new_file(f"{places.clips}/{place}") as file:
            encode(
                file, frames, timing, shape,
                crf=stage.cut.crf, preset=stage.cut.preset, gop=stage.cut.gop,
            )  # fmt: skip
            path = f"clips/{place}"
            found["cut"] = _encoded(row, timing, shape, path, os.stat(file).st_size, file_gop(file))
    elif "cut" in todo and how == "copy":
        found["cut"] = _copy(places, row, cut_part)
    elif "cut" in todo:
        found["cut"] = _kept(row)
    if "frames" in todo:
        if not strip.pictures:
            for _ in strip.watch(decode(source, sorted(set(strip.places))), set()):
                pass
        place = f"{row['id'][:2]}/{row['id']}-{result_key(row, frames_part)[:8]}.jpg"
        with new_file(f"{places.frames}/{place}") as file:
            strip.write(file)
        found["frames"] = {"frames": f"frames/{place}", "frames_count": len(strip.places)}
    return found


def with_planned_sizes(config: CutConfig, table: pa.Table) -> pa.Table:
    """Clips with the `height` and `width` (and what follows from them) that cutting will give."""
    names = [n for n in (*SHAPED_BY, *BORDERS) if n in table.column_names]
    heights, widths = [], []
    for row in table.select(names).to_pylist():
        how = _how(config, row)
        shape = None if how == "kept" else _shape(config, row, how)
        heights.append(row["height"] if shape is None else shape.height)
        widths.append(row["width"] if shape is None else shape.width)
    height, width = np.array(heights, np.int64), np.array(widths, np.int64)
    planned = {
        "height": height,
        "width": width,
        "aspect_ratio": height / width,
        "resolution": height * width,
    }
    for name, values in planned.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    return table


def _how(config: CutConfig, row: Row) -> str:
    """`kept`, `copy` or `encode`."""
    cropped = config.letterbox == "crop" and any(row.get(side) for side in BORDERS)
    smaller = config.max_side is not None and min(row["height"], row["width"]) > config.max_side
    oblong = (row.get("source_pixel_aspect") or 1.0) != 1.0
    if row["whole"] and config.whole == "keep":
        return "encode" if config.mode == "encode" and (cropped or smaller or oblong) else "kept"
    return config.mode


def _shape(config: CutConfig, row: Row, how: str) -> Shape:
    from kinema.curation.picture import Crop, Shape

    crop = Crop()
    if config.letterbox == "crop" and how == "encode":
        crop = Crop(*(row.get(side) or 0 for side in BORDERS))
    if how != "encode":
        return Shape.of(row["height"], row["width"], crop, None)
    aspect = row.get("source_pixel_aspect") or 1.0
    return Shape.of(row["height"], row["width"], crop, config.max_side, aspect)


def _timing(row: Row) -> Timing:
    from kinema.curation.encode import even_timing, resampled_timing

    if not row["source_variable_rate"]:
        return even_timing(row["start_frame"], row["end_frame"], row["fps"])
    return resampled_timing(known_index(row["source"]), row["start_frame"], row["end_frame"])


def decode(path: Place, places: Sequence[int]) -> Iterator[tuple[int, VideoFrame]]:
    """Frames of a source by place, as `kinema.media.read` numbers them; the index of all packets
    is made once for the clips of a source that come one after the other."""
    from kinema.media.read import decode_frames

    return decode_frames(path, places, known_index)


def known_index(path: Place) -> FrameIndex:
    """`packet_index`, remembered for the last files."""
    from kinema.media.container import check_file

    check_file(path)
    if is_url(path):
        return _indexed(str(path), version_in_store(path))
    status = os.stat(path)
    return _indexed(os.fspath(path), f"{status.st_size}:{status.st_mtime_ns}")


@lru_cache(maxsize=2)
def _indexed(path: str, version: str) -> FrameIndex:
    from kinema.media.frame_index import packet_index

    return packet_index(path)


def file_gop(path: Place) -> int:
    """Frames from one key frame of a new file to the next, at most."""
    from kinema.curation.copy_packets import gop_of
    from kinema.media.frame_index import packet_index

    return gop_of(packet_index(path))


def clip_name(row: Row, part: Part) -> str:
    """`<stem>_<16 digits>`: letters, digits, dots, dashes of the source's name, and digits that
    other settings or another source change, so that what is kept of those stays true."""
    stem = PurePosixPath(str(row["source"])).stem
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._-")[:60] or "clip"
    return f"{safe}_{result_key(row, part)[:16]}"


class _Strip:
    """The frames of a clip for models, picked as they pass."""

    def __init__(self, config: FramesConfig, places: Sequence[int], shape: Shape) -> None:
        from kinema.curation.frames import strip_size

        self.places = places
        self.pictures: dict[int, Picture] = {}
        self._quality = config.quality
        self._shape = shape
        self._size = strip_size(shape.height, shape.width, config.max_side)

    def watch(
        self, frames: Iterator[tuple[int, VideoFrame]], others: set[int]
    ) -> Iterator[tuple[int, VideoFrame]]:
        """Takes its frames; hands on those whose places are among the `others`."""
        wanted = set(self.places)
        for place, frame in frames:
            if place in wanted:
                height, width = self._size
                rgb = self._shape.apply(frame).reformat(
                    width=width, height=height, format="rgb24", interpolation="BICUBIC"
                )
                picture: Any = rgb.to_ndarray()
                self.pictures[place] = picture
            if place in others:
                yield place, frame

    def write(self, file: Any) -> None:
        from kinema.curation.frames import write_strip

        write_strip(file, [self.pictures[place] for place in self.places], self._quality)


def _encoded(
    row: Row, timing: Timing, shape: Shape, path: str, size: int, gop: int
) -> dict[str, Any]:
    rate = float(timing.rate)
    return _columns(row) | {
        "path": path,
        "num_frames": len(timing.places),
        "duration": round(len(timing.places) / rate, 6),
        "fps": rate if row["source_variable_rate"] or not row["fps"] else row["fps"],
        "file_size": size,
        "gop": gop,
        "cut_by": "encode",
        **_sized(shape.height, shape.width),
        **_borders(row, shape),
    }


def _copy(places: Places, row: Row, part: Part) -> Found:
    from kinema.curation.copy_packets import can_copy, copied_suffix, copy_packets

    index = known_index(row["source"])
    seconds = [*index.seconds().tolist(), index.duration_s]
    place = f"{row['id'][:2]}/{clip_name(row, part)}{copied_suffix(row['source_codec'])}"
    start, end = row["start_frame"], row["end_frame"]
    if not can_copy(index, start, end):
        what = f"no key frame between {row['start_s']:.2f} s and {row['end_s']:.2f} s"
        return Bad("no_key_frame", f"{what} to begin a copy at; cut.mode=encode cuts anywhere")
    with new_file(f"{places.clips}/{place}") as file:
        copied = copy_packets(row["source"], file, index, start, end)
        gop = file_gop(file)
        size = os.stat(file).st_size
    start_s, end_s = seconds[copied.start], seconds[copied.end]
    return _columns(row) | {
        "path": f"clips/{place}",
        "start_frame": copied.start,
        "end_frame": copied.end,
        "start_s": round(start_s, 6),
        "end_s": round(end_s, 6),
        "duration": round(end_s - start_s, 6),
        "num_frames": copied.end - copied.start,
        "file_size": size,
        "gop": gop,
        "cut_by": "copy",
        "lost_s": max(0.0, round(row["end_s"] - row["start_s"] - (end_s - start_s), 6)),
    }


def _copied_from(source: Place, start: int, end: int) -> int:
    """Where a copy begins: a model is to see no frame that is not in the clip."""
    from kinema.curation.copy_packets import can_copy, first_key

    index = known_index(source)
    return first_key(index, start, end) if can_copy(index, start, end) else start


def _kept(row: Row) -> dict[str, Any]:
    from kinema.curation.copy_packets import gop_of
    from kinema.media.container import open_video
    from kinema.media.frame_index import container_index

    with open_video(row["source"]) as video:
        index = container_index(video)
        size = video.file_size
    if index is None:
        index = known_index(row["source"])
    return _columns(row) | {
        "path": row["source"],
        "file_size": size,
        "gop": gop_of(index),
        "cut_by": "kept",
    }


def _columns(row: Row) -> dict[str, Any]:
    """What `segment` said; columns that `quality` did not give are null."""
    return {name: row.get(name) for name in COLUMNS} | {"lost_s": 0.0}


def _sized(height: int, width: int) -> dict[str, Any]:
    return {
        "height": height,
        "width": width,
        "aspect_ratio": height / width,
        "resolution": height * width,
    }


def _borders(row: Row, shape: Shape) -> dict[str, Any]:
    """After a crop none are left; without one they are of the scaled picture."""
    if row.get("border_top") is None:
        return {}
    if shape.crop != type(shape.crop)():
        return dict.fromkeys(BORDERS, 0) | {"border_share": 0.0}
    down, across = shape.height / row["height"], shape.width / row["width"]
    return {side: round(row[side] * (down if side in BORDERS[:2] else across)) for side in BORDERS}
