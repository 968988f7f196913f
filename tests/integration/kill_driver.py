"""Runs training attempts in forked children: PyTorch is imported once for all of them.

    python kill_driver.py MANIFEST OUTPUTS SEED ATTEMPTS OVERRIDE...

Kills each attempt with SIGKILL at a random moment and goes on with `--load`; the last attempt runs
to its end. Every second one is killed while a checkpoint is being written. Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch.distributed.checkpoint  # noqa: F401 (imported before forking, for speed)

from kinema.training import saving
from kinema.training.run import train
from kinema.training.start import Start
from tests.integration.train_fixtures import smoke


def attempt(manifest: Path, outputs: Path, overrides: list[str], beat: Path) -> int:
    """Start one attempt in a child process; it tells of steps and saves through a file."""
    child = os.fork()
    if child:
        return child
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    # The part is written and made valid beside training, in one thread.
    honest_write, honest_complete = saving.write_part, saving.complete

    def write_part(*args: object) -> None:
        beat.write_text("saving")
        honest_write(*args)  # type: ignore[arg-type]

    def complete(*args: object, **more: object) -> object:
        try:
            return honest_complete(*args, **more)  # type: ignore[arg-type]
        finally:
            beat.write_text("training")

    saving.write_part = write_part  # type: ignore[assignment]
    saving.complete = complete  # type: ignore[assignment]
    runs = sorted(p for p in outputs.glob("0*") if (p / "run.json").exists())
    start = Start(load=runs[-1]) if runs else Start()
    try:
        train(smoke(manifest, outputs, *overrides), start, device="cpu")
        os._exit(0)
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)


def wait_for(child: int, beat: Path, state: str) -> bool:
    """Whether the child came to a state before it ended."""
    for _ in range(60_000):
        if beat.exists() and beat.read_text() == state:
            return True
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.001)
    raise TimeoutError(state)


def main() -> None:
    manifest, outputs = Path(sys.argv[1]), Path(sys.argv[2])
    seed, attempts, overrides = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]
    outputs.mkdir()
    rng, beat = random.Random(seed), outputs / ".beat"
    killed = {"saving": 0, "training": 0}
    for number in range(attempts):
        state = "saving" if number % 2 else "training"
        beat.unlink(missing_ok=True)
        if not number:
            beat.write_text("training")
        child = attempt(manifest, outputs, overrides, beat)
        if not wait_for(child, beat, state):
            break
        # A save takes tens of milliseconds; between saves lie some steps.
        time.sleep(rng.uniform(0.0, 0.05 if state == "saving" else 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed[state] += 1
    beat.unlink(missing_ok=True)
    status = os.waitpid(attempt(manifest, outputs, overrides, beat), 0)[1]
    sys.stdout.write(json.dumps({"killed": killed, "status": status}))


if __name__ == "__main__":
    main()
