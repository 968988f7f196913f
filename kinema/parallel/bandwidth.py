"""How fast the processes of a run can sum tensors: all of them, and any two nodes.

    torchrun --nproc-per-node 8 -m kinema.parallel.bandwidth
    torchrun ... -m kinema.parallel.bandwidth --pairs 5 --json

`kinema cluster health` runs it on all nodes. Bandwidths are as nccl-tests define them
(https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md): the algorithm's is bytes of
the tensor over time; the bus's is that times 2(n-1)/n, what each link has to carry, and so can be
compared with the hardware's figure and between numbers of processes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from kinema.config.errors import KinemaError
from kinema.parallel.world import World, open_world

SIZES = {"cuda": "1M,16M,256M,1G", "cpu": "64K,1M,16M"}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
GIGA = 1e9


@dataclass(frozen=True)
class Speed:
    """All-reduce of one size.

    Attributes:
        bytes: of the tensor, float32.
        time_s: of one all-reduce, mean over the iterations, of the slowest process.
        algorithm_gb_s, bus_gb_s: 10^9 bytes a second.
        correct: the sums were right on every process.
    """

    bytes: int
    time_s: float
    algorithm_gb_s: float
    bus_gb_s: float
    correct: bool


@dataclass(frozen=True)
class PairSpeed:
    """All-reduce of the largest size between the processes of two nodes.

    Attributes:
        nodes: their numbers, as torchrun has them.
    """

    nodes: tuple[int, int]
    bus_gb_s: float
    correct: bool


@dataclass(frozen=True)
class Bandwidth:
    """What `measure` found; the same on every process."""

    backend: str
    processes: int
    nodes: int
    sizes: tuple[Speed, ...]
    pairs: tuple[PairSpeed, ...]


def measure(
    world: World,
    sizes: Sequence[int],
    *,
    iterations: int,
    warm_up: int,
    node: int = 0,
    pair_rounds: int = 0,
) -> Bandwidth:
    """Time all-reduces over all processes, then between pairs of nodes.

    Collective: every process calls it with the same arguments but `node`.

    Args:
        sizes: bytes, multiples of four; rising. Pairs take the last.
        iterations, warm_up: all-reduces that are timed, and before them.
        node: number of this process's machine.
        pair_rounds: how many partners each node is timed with; nodes are paired disjointly, so
            all pairs of a round run at the same time.

    Raises:
        KinemaError: there is one process only.
    """
    if world.size < 2:
        raise KinemaError(
            "one process has nobody to talk to",
            hint="torchrun --nproc-per-node 2 -m kinema.parallel.bandwidth, or on several nodes",
        )
    everyone = list(range(world.size))
    whole = tuple(
        _timed(world, size, None, everyone, iterations=iterations, warm_up=warm_up)
        for size in sizes
    )
    node_of = world.gather(node)
    nodes = sorted(set(node_of))
    pairs: list[PairSpeed] = []
    for meeting in rounds(len(nodes))[:pair_rounds]:
        mine: tuple[tuple[int, int], Any, list[int]] | None = None
        for one, other in meeting:
            couple = (nodes[one], nodes[other])
            members = [rank for rank in everyone if node_of[rank] in couple]
            # Collective over all processes, also over those that are not members.
            group = dist.new_group(members, timeout=timedelta(minutes=2))
            if world.rank in members:
                mine = couple, group, members
        world.barrier()
        found: PairSpeed | None = None
        if mine is not None:
            couple, group, members = mine
            speed = _timed(world, sizes[-1], group, members, iterations=iterations, warm_up=warm_up)
            found = PairSpeed(couple, speed.bus_gb_s, speed.correct)
            dist.destroy_process_group(group)
        pairs += sorted({pair for pair in world.gather(found) if pair}, key=lambda p: p.nodes)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    return Bandwidth(backend, world.size, len(nodes), whole, tuple(pairs))


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Who meets whom so that everyone meets everyone once, in as few rounds as can be.

    The circle method: the first stays, the others move on by one place each round. With an odd
    count one sits out in each round.
    """
    seats: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    plan = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        meeting = zip(seats[:half], reversed(seats[half:]), strict=True)
        plan.append(
            sorted((min(a, b), max(a, b)) for a, b in meeting if a is not None and b is not None)
        )
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return plan


def _timed(
    world: World, size: int, group: Any, members: list[int], *, iterations: int, warm_up: int
) -> Speed:
    count = len(members)
    values = torch.full((size // 4,), float(members.index(world.rank) + 1), device=world.device)
    dist.all_reduce(values, group=group)
    right = bool((values == count * (count + 1) / 2).all())
    values.zero_()  # sums of zeros stay finite, however often they are taken
    for _ in range(warm_up):
        dist.all_reduce(values, group=group)
    _finish(world)
    start = time.perf_counter()
    for _ in range(iterations):
        dist.all_reduce(values, group=group)
    _finish(world)
    seconds = (time.perf_counter() - start) / iterations
    # Agreed by the group under test: the slowest process counts, and one wrong sum is wrong.
    verdict = torch.tensor([seconds, 0.0 if right else 1.0], device=world.device)
    dist.all_reduce(verdict, op=dist.ReduceOp.MAX, group=group)
    seconds, wrong = verdict.tolist()
    algorithm = size / seconds / GIGA
    return Speed(size, seconds, algorithm, algorithm * 2 * (count - 1) / count, wrong == 0)


def _finish(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def parse_sizes(text: str) -> list[int]:
    """`1M,16M,1G` (or plain bytes), in rising order.

    Raises:
        KinemaError: not a size, or less than four bytes.
    """
    sizes = []
    for word in text.split(","):
        number, unit = word.strip().upper(), 1
        if number[-1:] in _UNITS:
            number, unit = number[:-1], _UNITS[number[-1]]
        if not number.isdecimal() or int(number) * unit < 4:
            raise KinemaError(f"{word!r} is no size", where="--sizes", hint="--sizes 64K,1M,1G")
        sizes.append(int(number) * unit // 4 * 4)
    return sorted(set(sizes))


def report(found: Bandwidth) -> str:
    """A table for people."""
    where = f"{found.nodes} node{'s' if found.nodes > 1 else ''}"
    lines = [
        f"all-reduce over {found.processes} processes on {where} ({found.backend})",
        f"{'bytes':>14} {'time ms':>10} {'algorithm GB/s':>15} {'bus GB/s':>10}",
    ]
    for one in found.sizes:
        lines.append(
            f"{one.bytes:>14,} {one.time_s * 1e3:>10.3f} {one.algorithm_gb_s:>15.2f}"
            f" {one.bus_gb_s:>10.2f}" + ("" if one.correct else "  WRONG SUMS")
        )
    for pair in found.pairs:
        lines.append(
            f"nodes {pair.nodes[0]} and {pair.nodes[1]}: bus {pair.bus_gb_s:.2f} GB/s"
            + ("" if pair.correct else "  WRONG SUMS")
        )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """The command; see `--help`. Rank 0 speaks."""
    parser = argparse.ArgumentParser(
        prog="python -m kinema.parallel.bandwidth",
        description="All-reduce bandwidth of the processes that torchrun started.",
    )
    parser.add_argument("--sizes", help="bytes of the tensors, as 64K,1M,1G")
    parser.add_argument("--iterations", type=int, default=20, help="timed all-reduces a size")
    parser.add_argument("--warm-up", type=int, default=5, help="all-reduces before them")
    parser.add_argument("--pairs", type=int, default=0, help="partners to time each node with")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: GPUs where there are")
    parser.add_argument("--timeout", type=float, default=120, help="seconds to wait for the others")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(words)
    if given.iterations < 1 or given.warm_up < 0 or given.pairs < 0:
        parser.error("--iterations is at least 1, --warm-up and --pairs at least 0")
    try:
        with open_world(given.device, timeout=timedelta(seconds=given.timeout)) as world:
            found = measure(
                world,
                parse_sizes(given.sizes or SIZES[world.device.type]),
                iterations=given.iterations,
                warm_up=given.warm_up,
                node=int(os.environ.get("GROUP_RANK", "0")),
                pair_rounds=given.pairs,
            )
            if world.is_main:
                text = json.dumps(asdict(found)) if given.json else report(found)
                sys.stdout.write(text + "\n")
                sys.stdout.flush()
    except KinemaError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
