"""A small manifest of real clips, and a server of its page on a free port."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kinema.data.tables import write_table
from kinema.media.write import write_video

XSS = '<img src=x onerror="window.harmed = true">a clip "of" one & two'


def make_clips(folder: Path, **columns: Any) -> Path:
    """A manifest of five videos (the last one's file is missing), `folder/m.parquet`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        frames = np.full((24, 72, 128, 3), 30 + 50 * number, np.uint8)
        for time in range(24):
            frames[time, 20:52, 4 * time : 4 * time + 24] = (240, 60, 40)
        write_video(folder / f"{number}.mp4", frames, 12)
    text = ["A red box moves right", XSS, "a RED box, brighter", "Ünïcode caption", "it is gone"]
    table = {
        "path": [f"{number}.mp4" for number in range(5)],
        "text": text,
        "num_frames": [24] * 5,
        "height": [72] * 5,
        "width": [128] * 5,
        "fps": [12.0] * 5,
        "aesthetic": pa.array([4.1, 5.2, None, 6.3, 3.0], pa.float32()),
        "camera_motion": ["static", "pan_left", "static", None, "static"],
        "dropped_by": ["", "", "", "", ""],
    }
    write_table(pa.table(table | columns), folder / "m.parquet")
    return folder / "m.parquet"


@contextmanager
def served(
    manifest: Path, *options: str, cache: Path
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The page's address while `kinema data browse` runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from kinema.cli.main import main; main()", "data", "browse",
         str(manifest), "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        address = ""
        for line in process.stdout:
            if line.startswith("http://"):
                address = line.split()[0]
                break
        assert address, process.communicate()[1]
        yield address.rstrip("/")
    finally:
        process.terminate()
        process.communicate(timeout=20)
