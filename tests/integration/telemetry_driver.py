"""Runs training on one and two ranks, for what the records say of it; PyTorch is imported once.

    python -m tests.integration.telemetry_driver MANIFEST HELD_OUT OUTPUTS

Each scenario leaves a run folder `OUTPUTS/NAME/000-smoke`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401

from kinema.training.run import train
from kinema.training.start import Start
from kinema.training.waits import Waits
from tests.integration.train_fixtures import smoke

MANIFEST, HELD_OUT, OUTPUTS = (Path(argument) for argument in sys.argv[1:])
STILL = "optim.lr=1e-30"
"""Updates that leave the weights as they are."""


def _count_waits() -> Counter[str]:
    """How often each of FSDP2's methods was timed."""
    honest, counts = Waits._timed, Counter[str]()

    def timed(self: Waits, method: Callable[..., Any]) -> Callable[..., Any]:
        inner = honest(self, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[method.__name__] += 1
            return inner(*args, **kwargs)

        return counted

    Waits._timed = timed  # type: ignore[method-assign]
    return counts


def run(name: str, ranks: int, *overrides: str, start: Start | None = None) -> None:
    folder = OUTPUTS / name
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        counts = _count_waits()
        try:
            wanted = smoke(MANIFEST, folder, "name=smoke", "watchdog=null", *overrides)
            train(wanted, start, device="cpu")
            if rank == 0:
                (folder / "waits.json").write_text(json.dumps(counts))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert not any(codes), (name, codes)


def main() -> None:
    OUTPUTS.mkdir()
    run("start", 1, "max_steps=5", "optim.lr=0.01", "optim.schedule.warmup_steps=0")
    start = Start(ckpt_path=OUTPUTS / "start" / "000-smoke")
    # Five clips in two buckets: the last one has no partner on two ranks, and a clip of the longer
    # bucket takes more passes than one of the shorter.
    held_out = (
        f"validation.path='{HELD_OUT}'",
        "validation.every=2",
        "validation.clips_per_bucket=5",
        "validation.timesteps=5",
        'data.buckets={"16x16": {3: [1.0, 5]}}',
    )
    run("alone", 1, "max_steps=3", "accumulation=2", STILL, *held_out, start=start)
    run("two", 2, "max_steps=3", STILL, *held_out, start=start)
    run("zero3", 2, "max_steps=3", STILL, "parallel.shard=zero3", *held_out, start=start)


if __name__ == "__main__":
    main()
