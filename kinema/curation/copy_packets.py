"""Cutting without decoding: a part of a video's packets, from a key frame on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av import Packet
from av.video.stream import VideoStream

from kinema.media.container import open_video
from kinema.media.errors import MediaError
from kinema.media.frame_index import FrameIndex
from kinema.media.stores import Place

IN_MP4 = frozenset(("h264", "hevc", "av1", "vp9", "mpeg4", "libdav1d", "libvpx-vp9"))
"""Decoders whose packets an mp4 can hold; others are put into Matroska."""
WINDOW_FRAMES = 24
"""Frames of a training clip, for the cost of long GOPs that is told."""


@dataclass(frozen=True)
class Copied:
    """What was written."""

    start: int
    """The source's frame that the clip begins with: a key frame."""
    end: int
    """The frame after its last."""


def copied_suffix(codec: str) -> str:
    """`.mp4` where it can hold the codec, else `.mkv`."""
    return ".mp4" if codec in IN_MP4 else ".mkv"


def copy_packets(path: Place, target: Path, index: FrameIndex, start: int, end: int) -> Copied:
    """Write frames from the first key frame at or after `start` to `end` as they are stored.

    Frames at the end that cannot be decoded without one after `end` are left out.

    Args:
        path: a video file.
        target: ends as `copied_suffix` says.
        index: of all packets of the file (`packet_index`).
        start: first frame wanted.
        end: the frame after the last wanted; `can_copy` has said that this is possible.

    Raises:
        MediaError: the file cannot be used.
        OSError: `target` cannot be written.
    """
    key = first_key(index, start, end)
    positions = {int(t): i for i, t in enumerate(index.times)}
    failed: OSError | None = None
    with open_video(path) as video:
        first = int(index.times[key])
        video.container.seek(first, stream=video.stream)
        packets = _closed(video.container.demux(video.stream), positions, key, end)
        if not packets:
            raise MediaError("corrupt", path, f"no packets from key frame {key} on")
        for packet in packets:
            packet.pts = None if packet.pts is None else packet.pts - first
            packet.dts = None if packet.dts is None else packet.dts - first
        try:
            _write(target, video.stream, packets)
        except OSError as error:
            failed = error  # of the target: not to be taken for one of the source
    if failed is not None:
        raise OSError(failed.errno, failed.strerror, str(target))
    return Copied(key, key + len(packets))


def _write(target: Path, template: VideoStream, packets: list[Packet]) -> None:
    with av.open(str(target), "w", options=_options(target)) as container:
        stream = container.add_stream_from_template(template)
        for packet in packets:
            packet.stream = stream
            container.mux(packet)


def can_copy(index: FrameIndex, start: int, end: int) -> bool:
    """Whether a key frame lies in the range, and frames have usable time stamps."""
    return index.timed and len(_keys(index, start, end)) > 0


def first_key(index: FrameIndex, start: int, end: int) -> int:
    """Where a copy of frames `start` to `end` begins, if `can_copy`."""
    return int(_keys(index, start, end)[0])


def gop_of(index: FrameIndex) -> int:
    """The longest way from one key frame to the next, or to the end, in frames."""
    return int(np.diff(np.append(index.keys, len(index))).max()) if len(index.keys) else len(index)


def long_gop_cost(gop: int, window: int = WINDOW_FRAMES) -> float:
    """Frames decoded for each frame that training reads, on average: a window of `window` frames
    begins anywhere, and all from the key frame before it is decoded."""
    return ((gop - 1) / 2 + window) / window


def copy_warning(gops: list[int]) -> str:
    """What `copy` kept, for the person who chose it, once a run."""
    gop = int(np.median(gops))
    return (
        f"clips were copied with the key frames they had, {gop} frames apart at the median (at "
        f"most {max(gops)}): training decodes {long_gop_cost(gop):.1f} frames for each one it "
        f"reads ({WINDOW_FRAMES} at a time), and {long_gop_cost(30):.1f} with cut.mode=encode"
    )


def _keys(index: FrameIndex, start: int, end: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return index.keys[(index.keys >= start) & (index.keys < end)]


def _options(target: Path) -> dict[str, str]:
    return {"movflags": "+faststart"} if target.suffix == ".mp4" else {}


def _closed(
    packets: Iterator[Packet], positions: dict[int, int], key: int, end: int
) -> list[Packet]:
    """The longest beginning, in decoding order, whose frames are `key`, `key + 1`, ... and before
    `end`: all that any of them is predicted from is among them."""
    taken: list[Packet] = []
    whole, last = 0, key - 1
    for packet in packets:
        if packet.size == 0 or packet.pts is None:
            continue
        place = positions.get(packet.pts, -1)
        if place < key:
            continue  # before the key frame, or predicted from frames before it
        if place >= end:
            break
        taken.append(packet)
        last = max(last, place)
        if last - key + 1 == len(taken):
            whole = len(taken)
    return taken[:whole]
