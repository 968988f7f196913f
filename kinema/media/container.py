"""Opening files for reading: every way to fail becomes a MediaError with its reason."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from kinema.media.cut_off import cut_off
from kinema.media.errors import MediaError
from kinema.media.stores import Place, is_url, open_place, size_in_store

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@dataclass(frozen=True)
class OpenVideo:
    """An open file and the video stream that is read from it."""

    path: Path | str
    container: InputContainer
    stream: VideoStream
    file_size: int


def check_file(path: Place) -> int:
    """Size in bytes of a file that can be read. Never blocks on a FIFO: it is not opened.

    Raises:
        MediaError: `missing`, `unreadable`, `not_a_file` or `empty`.
        StoreError: a URL of a store that this machine cannot read from.
    """
    with file_errors(path):
        if is_url(path):
            size = size_in_store(path)
            if size == 0:
                raise MediaError("empty", path)
            return size
        status = os.stat(path)
        for is_kind, name in _KINDS:
            if is_kind(status.st_mode):
                raise MediaError("not_a_file", path, name)
        if status.st_size == 0:
            raise MediaError("empty", path)
        with open(path, "rb"):
            return status.st_size


@contextmanager
def open_video(path: Place) -> Iterator[OpenVideo]:
    """Open a video with one decoder thread; closes decoder and file at the end of the block.

    Errors of FFmpeg inside the block become MediaError as well.

    Args:
        path: a path, or the URL of a store (`kinema.media.stores`).

    Raises:
        MediaError: with the reason.
        StoreError: a URL of a store that this machine cannot read from.
    """
    size = check_file(path)
    # "file:" keeps FFmpeg from reading a colon in the name as a protocol, the white list keeps
    # play lists from reaching for the network.
    name, options = f"file:{os.fspath(path)}", {"protocol_whitelist": "file"}
    with file_errors(path), open_place(path) as file:
        missing = cut_off(file)
        if missing:
            raise MediaError("truncated", path, missing)
        file.seek(0)
        source: Any = file if is_url(path) else name
        try:
            container = av.open(source, options=options, metadata_errors="replace")
        except av.error.InvalidDataError:
            raise MediaError("not_media", path) from None
        with container:
            here = os.fspath(path) if is_url(path) else Path(path)
            yield OpenVideo(here, container, _video_stream(container, path), size)


@contextmanager
def file_errors(path: Place) -> Iterator[None]:
    """Turn errors of the operating system and of FFmpeg into MediaError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise MediaError("missing", path) from None
    except av.error.DecoderNotFoundError as error:
        raise MediaError("unsupported", path, str(error.strerror)) from None
    except av.error.FFmpegError as error:
        raise MediaError("corrupt", path, str(error.strerror)) from None
    except OSError as error:
        raise MediaError("unreadable", path, error.strerror or str(error)) from None


def _video_stream(container: InputContainer, path: Place) -> VideoStream:
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        kinds = sorted({s.type for s in container.streams})
        raise MediaError("no_video_stream", path, f"streams: {', '.join(kinds) or 'none'}")
    stream = streams[0]
    if stream.codec_context is None:
        raise MediaError("unsupported", path)
    stream.codec_context.thread_count = 1
    return stream
