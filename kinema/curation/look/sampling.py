"""Which frames are looked at closely."""

from __future__ import annotations


class Samples:
    """The first frame at or after each multiple of 1 / `per_s` seconds.

    Args:
        per_s: samples per second of video, above 0; more than the video has: every frame.
    """

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._next = 0

    def due(self, time_s: float) -> bool:
        """Whether the frame at this time is one; to be asked of every frame, in order."""
        # Frame times are rounded to the container's clock, often to a millisecond.
        step = int((time_s + 0.0015) * self._per_s)
        if step < self._next:
            return False
        self._next = step + 1
        return True
