"""Reading chosen frames of a video, exactly, without decoding the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from av import VideoFrame

from kinema.media.container import OpenVideo, open_video
from kinema.media.errors import MediaError
from kinema.media.frame_index import FrameIndex, container_index, packet_index
from kinema.media.stores import Place

Picture = np.ndarray[Any, np.dtype[np.uint8]]

_SEEKABLE = {"mov", "matroska", "webm", "avi"}
"""Formats in which a seek lands on a key frame; others are decoded from the start."""


def read_frames(
    path: Place,
    indices: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
) -> Picture:
    """Frames by their place in presentation order.

    Args:
        path: a video file.
        indices: from 0, in any order, repeats allowed; None reads all frames.
        size: (height, width) to scale to (bicubic, in the decoder), as displayed.

    Returns:
        uint8 RGB `[len(indices), H, W, 3]`, upright, in the order asked for. Without `size`,
        frames of a file that changes its resolution come in that of the first frame read.

    Raises:
        MediaError: the file cannot be used, or has fewer frames (`too_short`).
    """
    if indices is None:
        return np.stack([picture for _, picture in iter_frames(path, None, size)])
    slots: dict[int, list[int]] = {}
    for slot, position in enumerate(indices):
        slots.setdefault(int(position), []).append(slot)
    height, width = size or (0, 0)
    result = np.empty((0, height, width, 3), np.uint8)
    for position, picture in iter_frames(path, indices, size):
        if not len(result):
            result = np.empty((len(indices), *picture.shape), np.uint8)
        result[slots[position]] = picture
    return result


def read_at_fps(
    path: Place,
    fps: float,
    num_frames: int,
    start_s: float = 0.0,
    size: tuple[int, int] | None = None,
) -> Picture:
    """The pictures shown at `start_s + i / fps`, whatever the file's own frame rate, even or not.

    Args:
        path: a video file.
        fps: pictures per second of the result, above 0.
        num_frames: how many.
        start_s: seconds after the first frame.
        size: (height, width) to scale to, as displayed.

    Returns:
        uint8 RGB `[num_frames, H, W, 3]`, upright.

    Raises:
        MediaError: the file cannot be used, or ends earlier (`too_short`).
    """
    index = packet_index(path)
    moments = start_s + np.arange(num_frames) / fps
    # A moment that meets a frame's start but for rounding belongs to that frame.
    rounding = 0.5 * float(index.time_base) if index.timed else 1e-6
    if num_frames and moments[-1] > max(index.duration_s - rounding, index.seconds()[-1]):
        detail = f"lasts {index.duration_s:.3f} s, wanted the picture at {moments[-1]:.3f} s"
        raise MediaError("too_short", path, detail)
    positions = np.searchsorted(index.seconds(), moments + rounding, side="right") - 1
    return read_frames(path, [int(p) for p in positions], size)


def iter_frames(
    path: Place,
    indices: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
) -> Iterator[tuple[int, Picture]]:
    """`(index, picture)` for each of the `indices` once, in presentation order, one at a time.

    Arguments and errors as for `read_frames`.
    """
    for position, frame in decode_frames(path, indices):
        picture = upright_rgb(frame, size)
        size = size or (picture.shape[0], picture.shape[1])
        yield position, picture


def count_by_decoding(path: Place) -> int:
    """Decode every frame, as a check of the whole file; their number.

    Raises:
        MediaError: the file cannot be used, or any frame of it cannot be decoded.
    """
    return sum(1 for _ in decode_frames(path, None))


def upright_rgb(frame: VideoFrame, size: tuple[int, int] | None = None) -> Picture:
    """uint8 RGB `[H, W, 3]` as displayed: scaled to `size` (height, width), then rotated."""
    quarter_turns = round(frame.rotation / 90) % 4  # counter-clockwise, as np.rot90 counts
    height, width = size or (None, None)
    if quarter_turns % 2:
        height, width = width, height
    rgb = frame.reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC")
    return np.ascontiguousarray(np.rot90(rgb.to_ndarray(), quarter_turns))


class _IndexIsWrongError(Exception):
    """The frames that come out are not those that the index promised."""


def decode_frames(
    path: Place,
    indices: Sequence[int] | None,
    index_packets: Callable[[Place], FrameIndex] = packet_index,
) -> Iterator[tuple[int, VideoFrame]]:
    """`(index, frame)` for each of the `indices` once, in presentation order, as stored.

    Trusts the container's own table first; should a frame contradict it, goes on by an index of
    all packets, and where there are no usable timestamps, by counting frames from the start.

    Args:
        path: a video file.
        indices: from 0, in any order; None for all frames.
        index_packets: `packet_index`, or what remembers its results.

    Raises:
        MediaError: the file cannot be used, or has fewer frames (`too_short`).
    """
    done = -1
    with open_video(path) as video:
        index = container_index(video)
        if index is not None:
            try:
                for position, frame in _follow(video, index, _wanted(video, index, indices)):
                    yield position, frame
                    done = position
                return
            except _IndexIsWrongError:
                pass
    index = index_packets(path)
    with open_video(path) as video:
        wanted = [p for p in _wanted(video, index, indices) if p > done]
        if index.timed:
            try:
                yield from _follow(video, index, wanted)
            except _IndexIsWrongError as error:
                raise MediaError("corrupt", path, str(error)) from None
        else:
            yield from _count(video, wanted)


def _wanted(video: OpenVideo, index: FrameIndex, indices: Sequence[int] | None) -> list[int]:
    total = len(index)
    positions = list(range(total)) if indices is None else sorted({int(i) for i in indices})
    assert not positions or positions[0] >= 0, "frames are counted from 0"
    if positions and positions[-1] >= total:
        raise MediaError("too_short", video.path, f"{total} frames, wanted number {positions[-1]}")
    return positions


def _follow(
    video: OpenVideo, index: FrameIndex, wanted: list[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """Decode forward to each wanted frame, seeking where a key frame lies in between."""
    positions = {int(t): i for i, t in enumerate(index.times)}
    frames: Iterator[VideoFrame] = iter(())
    current = -1
    for target in wanted:
        key = index.key_before(target)
        if current < 0 or key > current + 1:
            frames = _start_decoding(video, int(index.times[target]))
        for frame in frames:
            if frame.pts not in positions:
                raise _IndexIsWrongError(f"a frame at an unexpected time, {frame.time} s")
            current = positions[frame.pts]
            if current >= target:
                break
        if current != target:
            raise _IndexIsWrongError(f"frame {target} of {len(index)} cannot be decoded")
        if frame.is_corrupt:
            raise MediaError("corrupt", video.path, f"frame {target} of {len(index)}")
        yield target, frame


def _start_decoding(video: OpenVideo, time: int) -> Iterator[VideoFrame]:
    """Frames from the last key frame at or before `time`, or from an earlier one."""
    container, stream = video.container, video.stream
    if _SEEKABLE & set(container.format.name.split(",")):
        container.seek(time, stream=stream)
        frames = _frames_of(video)
        first = next(frames, None)
        if first is not None and first.pts is not None and first.pts <= time:
            return chain([first], frames)
    container.seek(min(0, stream.start_time or 0), stream=stream)
    return _frames_of(video)


def _frames_of(video: OpenVideo) -> Iterator[VideoFrame]:
    """Frames from where the file is, in presentation order."""
    return video.container.decode(video.stream)


def _count(video: OpenVideo, wanted: list[int]) -> Iterator[tuple[int, VideoFrame]]:
    """Decode from the start, for files without usable timestamps."""
    left = iter(wanted)
    target = next(left, None)
    if target is None:
        return
    count = 0
    for count, frame in enumerate(_frames_of(video), start=1):
        if count - 1 == target:
            yield target, frame
            target = next(left, None)
            if target is None:
                return
    raise MediaError("corrupt", video.path, f"only {count} frames can be decoded")
