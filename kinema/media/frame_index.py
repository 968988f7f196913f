"""Where each frame of a video stands in time: what makes random access exact."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from kinema.media.container import OpenVideo, open_video
from kinema.media.errors import MediaError
from kinema.media.stores import Place

_SHOW_FRAME = 0x10  # of the first byte of a VP8 packet; others only feed the reference buffers


@dataclass(frozen=True)
class FrameIndex:
    """Frames in presentation order."""

    times: np.ndarray[Any, np.dtype[np.int64]]
    """`[N]` ascending, in units of `time_base`; made up (0, 1, 2, ...) unless `timed`."""
    end: int
    """When the last frame stops being shown, in units of `time_base`."""
    time_base: Fraction
    """Seconds."""
    keys: np.ndarray[Any, np.dtype[np.int64]]
    """Positions of frames at which decoding can start, ascending."""
    timed: bool
    """False if the file has no usable timestamps: frames can only be counted from the start."""

    def __len__(self) -> int:
        return len(self.times)

    def key_before(self, position: int) -> int:
        """The last position at or before `position` at which decoding can start."""
        place = int(np.searchsorted(self.keys, position, side="right"))
        return int(self.keys[place - 1]) if place else 0

    def seconds(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """`[N]` time of each frame after the first one's."""
        return (self.times - self.times[0]) * float(self.time_base)

    @property
    def duration_s(self) -> float:
        return float((self.end - int(self.times[0])) * self.time_base)

    @property
    def variable_rate(self) -> bool:
        """Frame distances differ by more than rounding to the container's clock explains."""
        steps = np.diff(self.times)
        return bool(len(steps)) and int(np.ptp(steps)) > max(2, 0.01 * float(steps.mean()))


def container_index(video: OpenVideo) -> FrameIndex | None:
    """The index from the table of an mp4 or mov, without reading the frames; None if it cannot be.

    The table gives decoding times. Where these are evenly spaced, so are presentation times;
    readers check that against the frames they get.

    Raises:
        MediaError: `truncated`, if the table points beyond the end of the file.
    """
    stream = video.stream
    if "mov" not in video.container.format.name.split(",") or stream.time_base is None:
        return None
    entries = list(stream.index_entries)
    if not entries or len(entries) != stream.frames:
        return None
    last_byte = max(e.pos + e.size for e in entries)
    if last_byte > video.file_size:
        whole = sum(e.pos + e.size <= video.file_size for e in entries)
        detail = f"{whole} of {len(entries)} frames are there"
        raise MediaError("truncated", video.path, detail)
    steps = np.diff([e.timestamp for e in entries])
    if not len(steps) or steps.min() != steps.max() or steps[0] <= 0 or stream.start_time is None:
        return None
    if any(e.is_discard for e in entries) or not entries[0].is_keyframe:
        return None
    step = int(steps[0])
    times = stream.start_time + step * np.arange(len(entries), dtype=np.int64)
    keys = np.array([i for i, e in enumerate(entries) if e.is_keyframe], dtype=np.int64)
    return FrameIndex(times, int(times[-1]) + step, stream.time_base, keys, timed=True)


def packet_index(path: Place) -> FrameIndex:
    """The index from all packets of the file, without decoding them.

    Raises:
        MediaError: the file cannot be used; `no_frames` or `zero_duration` if nothing is shown.
    """
    with open_video(path) as video:
        return _index_packets(video)


def _index_packets(video: OpenVideo) -> FrameIndex:
    stream = video.stream
    is_vp8 = stream.codec_context.name in ("vp8", "libvpx")
    times: list[int | None] = []
    key_times: list[int | None] = []
    durations: list[int] = []
    discarded, begun = 0, False
    for packet in video.container.demux(stream):
        # A video that was trimmed without encoding it anew (an edit list) begins with packets that
        # are decoded and not shown; its key frame is one of them.
        begun |= packet.is_keyframe and packet.size > 0
        if packet.is_discard:
            discarded += 1
        if packet.size == 0 or packet.is_discard:
            continue
        if packet.is_corrupt and video.container.format.name != "mpegts":
            detail = f"after {len(times)} frames"
            raise MediaError("truncated", video.path, detail)
        if packet.is_keyframe:
            key_times.append(packet.pts)
        if not begun:
            continue  # cut from the middle of a stream: cannot be decoded before a key frame
        if is_vp8 and not bytes(packet)[0] & _SHOW_FRAME:
            continue
        times.append(packet.pts)
        durations.append(packet.duration or 0)
    if not times:
        raise MediaError("zero_duration" if discarded else "no_frames", video.path)
    if video.container.format.name == "avi" and stream.codec_context.has_b_frames:
        times = [None] * len(times)  # AVI holds no presentation times, FFmpeg's guesses are wrong
    return _sorted_index(times, key_times, durations, stream.time_base, _nominal_rate(video))


def _sorted_index(
    times: list[int | None],
    key_times: list[int | None],
    durations: list[int],
    time_base: Fraction | None,
    rate: Fraction,
) -> FrameIndex:
    known = sorted(t for t in times if t is not None)
    timed = len(set(known)) == len(times) and time_base is not None
    if not timed:
        count = np.arange(len(times), dtype=np.int64)
        return FrameIndex(count, len(times), 1 / rate, count[:1], timed=False)
    assert time_base is not None
    ordered = np.array(known, dtype=np.int64)
    last = durations[times.index(known[-1])]
    if last <= 0 and len(ordered) > 1:
        last = round((ordered[-1] - ordered[0]) / (len(ordered) - 1))
    keys = np.searchsorted(ordered, sorted(t for t in key_times if t is not None))
    return FrameIndex(ordered, int(ordered[-1]) + last, time_base, np.unique(keys), timed=True)


def _nominal_rate(video: OpenVideo) -> Fraction:
    stream = video.stream
    return stream.average_rate or stream.guessed_rate or Fraction(25)
