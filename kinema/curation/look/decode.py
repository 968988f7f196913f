"""The one pass over a source: every frame once, in presentation order, damage and all.

Frames are numbered as `kinema.media.read` numbers them (by the container's table where frames
agree with it, else by all packets), so that what is found here holds for whoever reads the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import av
import numpy as np
from av import VideoFrame

from kinema.curation.look.frame_view import EXPORTS_VECTORS, DecodedFrame, small_size
from kinema.curation.look.probe import SourceInfo, describe
from kinema.media.container import OpenVideo
from kinema.media.errors import MediaError
from kinema.media.frame_index import FrameIndex, container_index, packet_index
from kinema.media.stores import Place

MOST_DAMAGED = 0.5
"""Share of frames that may be missing or damaged before the file counts as broken."""


class IndexIsWrongError(Exception):
    """The container's table does not describe the frames: to be begun anew by all packets."""


@dataclass
class Source:
    """An open file and what is known of it before the pass."""

    video: OpenVideo
    index: FrameIndex
    info: SourceInfo
    frames: Iterator[VideoFrame]
    """From the first one on."""
    by_table: bool
    """Whether the index is the container's table, which frames may contradict."""


def open_source(path: Place, video: OpenVideo, trust_table: bool = True) -> Source:
    """Index a file and decode its first frame.

    Raises:
        MediaError: the file cannot be used.
    """
    table = container_index(video) if trust_table else None
    index = table or packet_index(path)
    if video.stream.codec_context.name in EXPORTS_VECTORS:
        video.stream.codec_context.options = {"flags2": "+export_mvs"}
    frames = _frames(video)
    first = next(frames, None)
    if first is None:
        raise MediaError("corrupt", path, "no frame can be decoded")
    info = describe(video, index, first)
    return Source(video, index, info, chain([first], frames), table is not None)


@dataclass
class Damage:
    """What was found out about damage while the frames went by."""

    damaged: np.ndarray[tuple[int], np.dtype[np.bool_]]
    """`[N]`: the frame is missing, damaged, or stands between such a one and the next key frame."""


def views(source: Source, damage: Damage) -> Iterator[DecodedFrame]:
    """A view of every frame, as many as the index has, in presentation order.

    In the place of a frame that cannot be decoded comes the one before it (at the start of the
    file: the one after); `damage` notes it.

    Raises:
        IndexIsWrongError: the container's table is wrong.
        MediaError: `corrupt`, if more than half of the frames are damaged, or a frame stands where
            no packet does.
    """
    index, info = source.index, source.info
    seconds = index.seconds()
    size = small_size(info.stored_height, info.stored_width)
    has_vectors = info.codec in EXPORTS_VECTORS
    positions: dict[int | None, int] | None = (
        {int(t): i for i, t in enumerate(index.times)} if index.timed else None
    )
    total, last, view = len(index), -1, None
    for number, frame in enumerate(source.frames):
        position = number if positions is None else positions.get(frame.pts, -1)
        if position < 0:
            if source.by_table:
                raise IndexIsWrongError
            detail = f"a frame at an unexpected time, {frame.time} s"
            raise MediaError("corrupt", source.video.path, detail)
        if not last < position < total:
            continue
        current = DecodedFrame(frame, position, float(seconds[position]), size, has_vectors)
        for missing in range(last + 1, position):
            damage.damaged[missing] = True
            yield (view or current).moved(missing, float(seconds[missing]))
        damage.damaged[position] = frame.is_corrupt
        yield current
        last, view = position, current
    if source.by_table and last + 1 < total:
        raise IndexIsWrongError  # it may promise more than there is; all packets tell
    assert view is not None
    for missing in range(last + 1, total):
        damage.damaged[missing] = True
        yield view.moved(missing, float(seconds[missing]))
    _spread(damage.damaged, index)
    if damage.damaged.mean() > MOST_DAMAGED:
        detail = f"{damage.damaged.sum()} of {total} frames cannot be decoded soundly"
        raise MediaError("corrupt", source.video.path, detail)


def _frames(video: OpenVideo) -> Iterator[VideoFrame]:
    """All frames from the start; packets that cannot be decoded are passed over."""
    try:
        for packet in video.container.demux(video.stream):
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                continue
    except av.error.InvalidDataError:
        return  # the container is damaged from here on


def _spread(damaged: np.ndarray[tuple[int], np.dtype[np.bool_]], index: FrameIndex) -> None:
    """What is predicted from a damaged frame is damaged, to the next key frame."""
    keys = np.append(index.keys, len(index))
    for position in np.flatnonzero(damaged):
        end = keys[np.searchsorted(keys, position, side="right")]
        damaged[position:end] = True
