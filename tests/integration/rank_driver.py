"""Runs training on several ranks in forked children: PyTorch is imported once for all of them.

    python -m tests.integration.rank_driver MANIFEST OUTPUTS

Each scenario leaves a run folder `OUTPUTS/NAME/000-smoke`, the rows that every rank trained on in
`OUTPUTS/NAME/rows.jsonl`, and what a rank raised in `OUTPUTS/NAME/error-RANK.txt`.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint  # noqa: F401 (imported before forking, for speed)

from kinema.config.errors import KinemaError
from kinema.data.loader import Batch, SkippedRow
from kinema.training.draws import Draws
from kinema.training.feed import Feed
from kinema.training.run import train
from kinema.training.start import Start
from kinema.training.tasks import LossReport, TextToVideo
from tests.integration.train_fixtures import smoke

MANIFEST, OUTPUTS = Path(sys.argv[1]), Path(sys.argv[2])


def _record_rows(folder: Path, rank: int) -> None:
    honest = Feed.epoch

    def epoch(self: Feed, number: int, start: int) -> tuple[int, Iterator[Batch]]:
        steps, batches = honest(self, number, start)

        def noted() -> Iterator[Batch]:
            for batch in batches:
                if batch.weight:
                    line = {"epoch": number, "rank": rank, "rows": batch.rows.tolist()}
                    with (folder / "rows.jsonl").open("a") as file:
                        file.write(json.dumps(line) + "\n")
                yield batch

        return steps, noted()

    Feed.epoch = epoch  # type: ignore[method-assign]


def _lose(rank: int, faulty: int) -> None:
    """One rank cannot read the second row of its first micro-batch."""
    honest = Feed.epoch

    def epoch(self: Feed, number: int, start: int) -> tuple[int, Iterator[Batch]]:
        steps, batches = honest(self, number, start)

        def without() -> Iterator[Batch]:
            batch = next(batches)
            row = int(batch.rows[1])
            bad = SkippedRow(row, self.path(row), "timeout", "took too long")
            yield replace(batch.without([row]), skipped=[*batch.skipped, bad])
            yield from batches

        return steps, without()

    if rank == faulty:
        Feed.epoch = epoch  # type: ignore[method-assign]


def _spoil(rank: int, faulty: int) -> None:
    honest, count = TextToVideo.loss, itertools.count()

    def loss(self: TextToVideo, model: Any, batch: Batch, draws: Draws) -> LossReport:
        report = honest(self, model, batch, draws)
        return LossReport(report.loss * float("nan")) if next(count) == 1 else report

    if rank == faulty:
        TextToVideo.loss = loss  # type: ignore[method-assign]


def run(
    name: str,
    ranks: int,
    *overrides: str,
    recipe: str = "tiny/smoke",
    load: bool = False,
    lose: int = -1,
    spoil: int = -1,
    stop: int = -1,
) -> None:
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
        _record_rows(folder, rank)
        _lose(rank, lose)
        _spoil(rank, spoil)

        def on_step(step: int, _: dict[str, Any] | None) -> None:
            if stop >= 0 and step == 1:
                os.kill(children[stop] if stop < len(children) else os.getpid(), signal.SIGTERM)

        start = Start(load=folder / "000-smoke") if load else Start()
        try:
            wanted = smoke(MANIFEST, folder, "name=smoke", *overrides, name=recipe)
            train(wanted, start, device="cpu", on_step=on_step)
        except KinemaError as error:
            (folder / f"error-{rank}.txt").write_text(str(error))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert not any(codes), (name, codes)


def main() -> None:
    OUTPUTS.mkdir()
    # With a large eps an update is proportional to its gradient, also where that is next to zero.
    eps = "optim.eps=0.01"
    run("whole", 2, "max_steps=5", eps)
    run("resumed", 2, "max_steps=2", eps)
    shutil.copytree(OUTPUTS / "resumed", OUTPUTS / "fewer")
    run("resumed", 2, "max_steps=5", eps, load=True)
    run("fewer", 1, "max_steps=1000", "epochs=1", eps, load=True)
    run("alone", 1, "max_steps=5", "accumulation=2", eps)
    # IDDPM with frame masks: of three steps, one resumed after the second.
    run("masked", 2, "max_steps=3", eps, recipe="tiny/smoke-1.1")
    run("masked-resumed", 2, "max_steps=2", eps, recipe="tiny/smoke-1.1")
    run("masked-resumed", 2, "max_steps=3", eps, recipe="tiny/smoke-1.1", load=True)
    run("masked-alone", 1, "max_steps=3", "accumulation=2", eps, recipe="tiny/smoke-1.1")
    # Two ranks share every clip; a file that one of them cannot read is left out by both.
    sharing = "parallel={sequence: 2, sequence_tokens: 2}"
    run("shared", 2, "max_steps=3", eps, sharing, lose=1)
    run("shared-alone", 1, "max_steps=3", eps, lose=0)
    run("shared-in-thirds", 3, "max_steps=3", sharing)
    run("spoiled", 2, "max_steps=5", "ckpt_every=1", spoil=1)
    run("stopped", 2, "max_steps=5", stop=0)


if __name__ == "__main__":
    main()
