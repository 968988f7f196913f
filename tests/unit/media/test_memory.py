"""Reading a thousand files needs no more memory than reading a hundred."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from kinema.media.clip import load_clip
from kinema.media.pool import DecodePool
from kinema.media.probe import probe
from kinema.media.write import write_video
from tests.unit.media.clips import pictures

FILES, WARM = 1000, 100
ALLOWED_MB = 30


def resident_mb(pool: DecodePool) -> float:
    pids = [os.getpid(), *pool.worker_pids()]
    return float(sum(psutil.Process(p).memory_info().rss for p in pids)) / 2**20


def growth_from_warm_to_last(paths: list[Path]) -> float:
    # No worker is replaced, so that what a worker loses stays lost.
    with DecodePool(2, 60, calls_per_worker=10 * FILES) as pool:
        call = lambda path: (path, [1, 3, 6], (32, 32))  # noqa: E731
        infos, clips = pool.map(probe, paths), pool.map(load_clip, paths, call=call)
        pids, before = set(), 0.0
        for number, ((_, info), (_, clip)) in enumerate(zip(infos, clips, strict=True), start=1):
            assert not isinstance(info, Exception)
            assert not isinstance(clip, Exception)
            assert info.num_frames >= 8
            assert clip.shape == (3, 3, 32, 32)
            if number == WARM:
                before, pids = resident_mb(pool), set(pool.worker_pids())
        growth = resident_mb(pool) - before
        assert set(pool.worker_pids()) == pids
        assert len(pids) == 2
    return growth


def test_memory_from_file_100_to_file_1000(tmp_path: Path) -> None:
    for i in range(4):
        write_video(tmp_path / f"clip{i}.mp4", pictures(8 + i, 32, 32), fps=8)
    for i in range(FILES):
        os.link(tmp_path / f"clip{i % 4}.mp4", tmp_path / f"{i:04}.mp4")
    # A process of its own: what other tests left in this one's heap is not what is measured.
    measured = subprocess.run(
        [sys.executable, "-m", "tests.unit.media.test_memory", tmp_path],
        check=True,
        capture_output=True,
        text=True,
    )
    assert float(measured.stdout) < ALLOWED_MB, f"{measured.stdout.strip()} MB more"


if __name__ == "__main__":
    sys.stdout.write(str(growth_from_warm_to_last(sorted(Path(sys.argv[1]).glob("0*.mp4")))))
