"""Saves and resumes on several ranks in forked children: PyTorch is imported once for all of them.

    python -m tests.integration.checkpoint_driver double|single MANIFEST OUTPUTS

`double` computes in float64 throughout, where a layout of ranks leaves no more than rounding in the
sixteenth place. Each scenario leaves a run folder `OUTPUTS/NAME/000-smoke`, the rows that every
rank trained on in `OUTPUTS/NAME/rows.jsonl`, and what a rank raised in
`OUTPUTS/NAME/error-RANK.txt`.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

if sys.argv[1] == "double":  # before anything of kinema looks at a dtype
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float64
    Tensor.float = Tensor.double  # type: ignore[method-assign]

import functools
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch._dynamo  # like the next two imported before forking, for speed
import torch.distributed.checkpoint
import torch.distributed.fsdp

import kinema.checkpoint.run as checkpoint_run
from kinema.checkpoint.shares import share_out
from kinema.config.errors import KinemaError
from kinema.data.loader import Batch
from kinema.parallel.world import open_world
from kinema.training import saving
from kinema.training.feed import Feed
from kinema.training.run import train
from kinema.training.start import Start
from tests.integration.checkpoint_layouts import check_layouts
from tests.integration.train_fixtures import smoke

MANIFEST, OUTPUTS = Path(sys.argv[2]), Path(sys.argv[3])
EPS = "optim.eps=0.01"
"""With a large eps an update is proportional to its gradient, also where that is next to zero."""

# Weights in several files, though they are small.
checkpoint_run.share_out = functools.partial(share_out, small=20_000)
saving.LEAVING_WITHIN_S = 0.5


def record_rows(folder: Path, rank: int) -> None:
    honest = Feed.epoch

    def epoch(self: Feed, number: int, start: int) -> tuple[int, Iterator[Batch]]:
        steps, batches = honest(self, number, start)

        def noted() -> Iterator[Batch]:
            for batch in batches:
                if batch.weight and rank % batch.degree == 0:
                    line = {"epoch": number, "rank": rank, "rows": batch.rows.tolist()}
                    with (folder / "rows.jsonl").open("a") as file:
                        file.write(json.dumps(line) + "\n")
                yield batch

        return steps, noted()

    Feed.epoch = epoch  # type: ignore[method-assign]


def run(
    name: str,
    ranks: int,
    *overrides: str,
    load: bool = False,
    before: Callable[[int, Path], None] = lambda rank, folder: None,
    killed: bool = False,
) -> None:
    """Train in forked ranks.

    Args:
        before: called in every rank before it trains.
        killed: one of them will be.
    """
    folder = OUTPUTS / name
    folder.mkdir(exist_ok=True)
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
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        start = Start(load=folder / "000-smoke") if load else Start()
        try:
            record_rows(folder, rank)
            before(rank, folder)
            train(
                smoke(MANIFEST, folder, "name=smoke", "max_steps=100", EPS, *overrides),
                start,
                device="cpu",
            )
        except KinemaError as error:
            (folder / f"error-{rank}.txt").write_text(str(error))
        except BaseException:
            if not killed:
                traceback.print_exc()
            os._exit(1)
        os._exit(0)
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert killed or not any(codes), (name, codes)


def in_double() -> None:
    """One epoch in each layout, against all of them in one process."""
    run("alone", 1, "epochs=4", "accumulation=4")
    run("moved", 4, "epochs=1", "parallel.shard=zero3")
    run("moved", 2, "epochs=2", "accumulation=2", "parallel.shard=zero2", load=True)
    run("moved", 1, "epochs=3", "accumulation=4", load=True)
    run("moved", 2, "epochs=4", "accumulation=2", "parallel.shard=zero3", load=True)


def nth(call: int, action: Callable[[], None]) -> None:
    """Do something as the part of the n-th save is about to be written, in its thread."""
    honest, count = saving.write_part, itertools.count(1)

    def write_part(*args: Any) -> None:
        if next(count) == call:
            action()
        honest(*args)

    saving.write_part = write_part  # type: ignore[assignment]


def dies_in_second_save(rank: int, folder: Path) -> None:
    def die() -> None:
        (hidden,) = (folder / "000-smoke").glob(".saving-*")
        (hidden / "half-written").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        nth(2, die)


def full_in_second_save(rank: int, folder: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    if rank == 1:
        nth(2, limit)


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def layouts() -> None:
    def check(rank: int, folder: Path) -> None:
        with open_world("cpu") as world:
            check_layouts(world, folder)
        os._exit(0)

    run("layouts", 4, before=check)


def in_single() -> None:
    """On two ranks, two steps an epoch: whole, killed while a checkpoint is written, out of space;
    then on one."""
    sharded = ("parallel.shard=zero3", "ckpt_every=1", "keep_checkpoints=9")
    run("even", 2, "max_steps=3", *sharded)
    shutil.copytree(OUTPUTS / "even", OUTPUTS / "altered")
    flip_a_byte(OUTPUTS / "altered/000-smoke/epoch1-global_step3/optimizer/__1_0.distcp")
    run("killed", 2, "max_steps=3", *sharded, before=dies_in_second_save, killed=True)
    (OUTPUTS / "killed.txt").write_text("\n".join(os.listdir(OUTPUTS / "killed/000-smoke")))
    shutil.copytree(OUTPUTS / "killed", OUTPUTS / "fewer")
    run("killed", 2, "max_steps=3", *sharded, load=True)
    (OUTPUTS / "fewer/rows.jsonl").write_text(rows_until(OUTPUTS / "fewer/rows.jsonl", 1))
    run("fewer", 1, "epochs=1", load=True)
    run("altered", 1, "max_steps=3", load=True)
    run("full", 2, "max_steps=99", "ckpt_every=1", before=full_in_second_save)
    layouts()


def rows_until(file: Path, steps: int) -> str:
    """What each rank trained on in its first steps; what a killed run did after its last
    checkpoint does not count."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [one for rank in (0, 1) for one in [x for x in lines if x["rank"] == rank][:steps]]
    return "".join(json.dumps(one) + "\n" for one in kept)


if __name__ == "__main__":
    OUTPUTS.mkdir()
    {"double": in_double, "single": in_single}[sys.argv[1]]()
