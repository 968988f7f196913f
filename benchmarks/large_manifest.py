"""A manifest of 30 million clips: `python benchmarks/large_manifest.py [--rows 30000000]`.

Writes a generated Parquet manifest (captions of some 390 bytes; 3.4 GB for 30 million) into a
temporary folder, then runs, each in a process of its own: `kinema data plan` for 192 ranks; the
first look at a caption, which puts the text on disk in a form that can be mapped (13 GB); and the
next process's look. Prints one markdown table of seconds and peak memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet

from kinema.data.like import openvid_like

AT_ONCE = 1_000_000
WORDS = 45
LOOK = (
    "import sys; from kinema.data.manifest import Manifest; "
    "m = Manifest.read(sys.argv[1]); m.text(len(m) // 2); m.path(len(m) - 1); m.fingerprint"
)


def write(path: Path, rows: int) -> None:
    random = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(5000)])
    texts = pa.array([" ".join(words[random.integers(0, 5000, WORDS)]) for _ in range(20_000)])
    writer: pa_parquet.ParquetWriter | None = None
    for start in range(0, rows, AT_ONCE):
        count = min(AT_ONCE, rows - start)
        frames, height, width = openvid_like(count, images=0.2, seed=start)
        names = [f"clips/{i // 1000:06}/{i:09}.mp4" for i in range(start, start + count)]
        columns = {
            "path": pa.array(names),
            "text": texts.take(pa.array(random.integers(0, len(texts), count))),
            "num_frames": frames,
            "height": height,
            "width": width,
            "fps": np.full(count, 24.0),
        }
        table = pa.table(columns)
        if writer is None:
            writer = pa_parquet.ParquetWriter(
                path, table.schema, compression="zstd", use_dictionary=["fps"]
            )
        writer.write_table(table, row_group_size=250_000)
    if writer is not None:
        writer.close()


def measure(name: str, *command: str) -> None:
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{name}: exit code {child.returncode}")
    peak: resource.struct_rusage = used
    print(f"| {name} | {time.perf_counter() - start:.1f} | {peak.ru_maxrss / 1e6:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=30_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clips.parquet"
        write(path, args.rows)
        print(f"{date.today()}, {args.rows:,} rows, {path.stat().st_size / 1e9:.1f} GB\n")
        print("| what | seconds | peak memory, GB |")
        print("|---|---|---|")
        kinema = "from kinema.cli.main import main; main()"
        plan = [sys.executable, "-c", kinema, "data", "plan", str(path)]
        for stage in (1, 2, 3):
            recipe = f"opensora-1.2/stage{stage}"
            measure(f"plan {recipe}, 192 ranks", *plan, recipe, "--world-size", "192")
        measure("first look at the text", sys.executable, "-c", LOOK, str(path))
        measure("every later one", sys.executable, "-c", LOOK, str(path))


if __name__ == "__main__":
    main()
