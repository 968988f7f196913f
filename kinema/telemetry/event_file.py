"""TensorBoard event files, written without torch or TensorFlow."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class EventFile:
    """One writer's event file in a folder that TensorBoard reads.

    Args:
        resume_step: the run goes on after this step: TensorBoard forgets what earlier files say
            about later steps.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        self._writer = EventFileWriter(str(folder))
        if resume_step is not None:
            self.forget_after(resume_step)

    def forget_after(self, step: int) -> None:
        """Later steps come anew: TensorBoard forgets what it was told about them."""
        start = SessionLog(status=SessionLog.START)
        self._add(Event(step=step + 1, session_log=start))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by tag."""
        entries = [Summary.Value(tag=k, simple_value=float(v)) for k, v in values.items()]
        self._add(Event(step=step, summary=Summary(value=entries)))

    def video(self, tag: str, frames: NDArray[np.uint8], fps: float, step: int) -> None:
        """A clip as an animated image: TensorBoard's own video call needs moviepy and, without
        it, drops the video in silence.

        Args:
            frames: uint8 `[T, H, W, 3]`, RGB.
        """
        _, height, width, _ = frames.shape
        image = Summary.Image(
            height=height,
            width=width,
            colorspace=3,
            encoded_image_string=animated_gif(frames, fps),
        )
        self._add(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)])))

    def close(self) -> None:
        self._writer.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.add_event(event)
        self._writer.flush()  # a killed run keeps what it has logged


def animated_gif(frames: NDArray[np.uint8], fps: float) -> bytes:
    """A GIF that loops for ever. GIF counts hundredths of a second: 24 fps play as 25.

    Args:
        frames: uint8 `[T, H, W, 3]`, RGB.
    """
    images = [Image.fromarray(frame) for frame in frames]
    hundredths = max(2, round(100 / fps))  # browsers slow down anything shorter than 20 ms
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=hundredths * 10,
        loop=0,
    )
    return buffer.getvalue()
