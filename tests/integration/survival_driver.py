"""Runs training that fails in the ways that a night brings.

    python -m tests.integration.survival_driver MANIFEST OUTPUTS        (all of them, forked)
    torchrun ... survival_driver.py elastic MANIFEST OUTPUTS            (killed, then asleep)

Forked scenarios leave a run folder `OUTPUTS/NAME/000-smoke` and the exit codes of both ranks in
`OUTPUTS/NAME/codes.json`.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint  # before forking, for speed

from kinema.config.errors import KinemaError
from kinema.data.loader import Batch
from kinema.media.channel import Channel
from kinema.media.pool import DecodePool
from kinema.parallel.world import open_world
from kinema.training.draws import Draws
from kinema.training.feed import Feed
from kinema.training.restart import Launch
from kinema.training.run import train
from kinema.training.start import Start
from kinema.training.tasks import LossReport, TextToVideo
from tests.integration.train_fixtures import smoke

WATCHED = ("watchdog={timeout_s: 3, first_step_s: 60}", "async_save=false")
GUARDED = (
    "guard={window: 3, factor: 3, skips: 2, rollbacks: 2}",
    *("ckpt_every=2", "epochs=20"),
)
ALL_AT_ONCE = (*GUARDED, "parallel.shard=zero2", "accumulation=2", "keep_checkpoints=1")
"""Spikes while the state is sharded, a step has several micro-batches and a save is in flight."""


def at_call(number: int, act: Callable[[], Any]) -> None:
    """Do something before the `number`-th micro-batch of this process, from 1."""
    honest, count = TextToVideo.loss, itertools.count(1)

    def loss(self: TextToVideo, model: Any, batch: Batch, draws: Draws) -> LossReport:
        if next(count) == number:
            act()
        return honest(self, model, batch, draws)

    TextToVideo.loss = loss  # type: ignore[method-assign]


def sleep_in_a_function() -> None:
    time.sleep(1000)


def stop_this_process() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang_the_decoder() -> None:
    """The pool's own limit has no effect, and in the second epoch its worker is frozen: as if the
    thread that watches it were lost."""
    run, receive, count = DecodePool.submit, Channel.receive, itertools.count(1)
    frozen: list[int] = []

    def patient(self: Channel, timeout: float | None = None) -> Any:
        return receive(self)

    def submit(self: DecodePool, *args: Any) -> Any:
        if next(count) == 15 and not frozen:
            while not self.worker_pids():
                time.sleep(0.01)
            frozen.extend(self.worker_pids())
            os.kill(frozen[0], signal.SIGSTOP)
        return run(self, *args)

    Channel.receive = patient  # type: ignore[method-assign]
    DecodePool.submit = submit  # type: ignore[method-assign]


def be_out_of_memory() -> None:
    """In the first pass of this rank, as a GPU would be."""

    def exhaust() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    at_call(1, exhaust)


def be_slow() -> None:
    """Every step takes this rank so much more that a busy machine makes no difference."""
    honest = TextToVideo.loss

    def loss(self: TextToVideo, model: Any, batch: Batch, draws: Draws) -> LossReport:
        with self._spans("forward"):
            time.sleep(1.2)
        return honest(self, model, batch, draws)

    TextToVideo.loss = loss  # type: ignore[method-assign]


def poison(factor: float, *, steps: range) -> None:
    """In some steps of the third epoch the losses of rank 1 are far too large."""
    honest, epoch = TextToVideo.loss, Feed.epoch
    bad: set[int] = set()

    def noted(self: Feed, number: int, start: int) -> tuple[int, Iterator[Batch]]:
        bad.clear()
        order = self.order.epoch(number)
        for step in steps if number == 2 else ():
            bad.update(order.micro_batch(step, 1).rows.tolist())
        return epoch(self, number, start)

    def loss(self: TextToVideo, model: Any, batch: Batch, draws: Draws) -> LossReport:
        report = honest(self, model, batch, draws)
        return LossReport(report.loss * factor) if bad & set(batch.rows.tolist()) else report

    Feed.epoch = noted  # type: ignore[method-assign]
    TextToVideo.loss = loss  # type: ignore[method-assign]


def fork(
    manifest: Path,
    outputs: Path,
    name: str,
    act: Callable[[int], None],
    *more: str,
    load: bool = False,
) -> None:
    """Two ranks; `act` gets the rank before training begins."""
    folder = outputs / name
    folder.mkdir(exist_ok=True)
    children, port = [], free_port()
    for rank in range(2):
        child = os.fork()
        if child:
            children.append(child)
            continue
        set_rank(rank, port)
        try:
            act(rank)
            start = Start(load=folder / "000-smoke") if load else Start()
            train(smoke(manifest, folder, "name=smoke", *more), start, device="cpu")
        except KinemaError as error:
            (folder / f"error-{rank}.txt").write_text(str(error))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / "codes.json").write_text(json.dumps(codes))


def two_spikes(rank: int) -> None:
    if rank == 1:
        poison(100.0, steps=range(2))


def one_spike(rank: int) -> None:
    if rank == 1:
        poison(float("nan"), steps=range(1, 2))


def hopeless(rank: int) -> None:
    """Every loss from the fifth on."""
    honest, count = TextToVideo.loss, itertools.count()

    def loss(self: TextToVideo, model: Any, batch: Batch, draws: Draws) -> LossReport:
        report = honest(self, model, batch, draws)
        return LossReport(report.loss * float("nan")) if next(count) > 3 else report

    TextToVideo.loss = loss  # type: ignore[method-assign]


def patience(outputs: Path) -> None:
    """Rank 1 comes to a barrier late, where rank 0 waits half a second at most."""
    port = free_port()
    children = []
    for rank in range(2):
        child = os.fork()
        if child:
            children.append(child)
            continue
        set_rank(rank, port)
        try:
            with open_world("cpu") as world:
                world.barrier()
                world.wait_at_most(0.5)
                time.sleep(3.0 * rank)
                world.barrier()
        except RuntimeError as error:
            (outputs / f"patience-{rank}.txt").write_text(str(error))
        os._exit(0)
    for child in children:
        os.waitpid(child, 0)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def set_rank(rank: int, port: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def on(rank: int, act: Callable[[], Any]) -> Callable[[int], None]:
    return lambda this: act() if this == rank else None


def elastic(manifest: Path, outputs: Path) -> None:
    """Under torchrun: rank 1 is killed in its sixth step, then sleeps in its second, then is
    well."""
    start, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    if rank == "1" and start == "0":
        at_call(6, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if rank == "1" and start == "1":
        at_call(2, sleep_in_a_function)
    wanted = (*WATCHED, "max_steps=8", "epochs=9", "ckpt_every=2")
    recipe = smoke(manifest, outputs, "name=smoke", *wanted)
    with Launch(recipe.outputs).final_errors():
        train(recipe, device="cpu")


def main() -> None:
    if sys.argv[1] == "elastic":
        elastic(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    manifest, outputs = Path(sys.argv[1]), Path(sys.argv[2])
    outputs.mkdir(exist_ok=True)
    patience(outputs)
    plain = ("max_steps=8", "epochs=9")
    fork(manifest, outputs, "well", lambda rank: None, *plain)
    stop = on(1, lambda: at_call(4, stop_this_process))
    fork(manifest, outputs, "stopped", stop, *WATCHED, *plain)
    decoding = ("data.decode_timeout_s=2", *WATCHED, *plain)
    fork(manifest, outputs, "decoder", on(1, hang_the_decoder), *decoding)
    slow = ("watchdog={timeout_s: 60, first_step_s: 60, slow_factor: 3}", *plain)
    fork(manifest, outputs, "slow", on(1, be_slow), *slow, "max_steps=5")
    sharded = ("parallel={shard: zero3, sequence: 2, sequence_tokens: 4}", "max_steps=2")
    fork(manifest, outputs, "cold", lambda rank: None, *sharded)
    fork(manifest, outputs, "warm", lambda rank: None, *sharded, "warm_up=yes")
    fork(manifest, outputs, "too-large", on(1, be_out_of_memory), *plain, "warm_up=yes")
    fork(manifest, outputs, "guarded", two_spikes, *ALL_AT_ONCE, "max_steps=9")
    fork(manifest, outputs, "guarded-on", two_spikes, *ALL_AT_ONCE, "max_steps=5")
    fork(manifest, outputs, "guarded-on", two_spikes, *ALL_AT_ONCE, "max_steps=7", load=True)
    fork(manifest, outputs, "guarded-on", two_spikes, *ALL_AT_ONCE, "max_steps=9", load=True)
    fork(manifest, outputs, "one-spike", one_spike, *GUARDED, "max_steps=9")
    fork(manifest, outputs, "hopeless", hopeless, *GUARDED, "max_steps=9")


if __name__ == "__main__":
    main()
