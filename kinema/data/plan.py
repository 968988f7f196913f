"""What an epoch will be: every clip accounted for, every bucket counted, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kinema.data.buckets import REASONS, Bucket
from kinema.data.epoch import Epoch
from kinema.data.manifest import Manifest
from kinema.data.order import SampleOrder

Tokens = Callable[[Bucket], int]
"""Tokens that the transformer sees of one clip of a bucket."""


@dataclass(frozen=True)
class BucketPlan:
    """One bucket's share of the epoch."""

    resolution: str
    num_frames: int
    width: int
    height: int
    max_batch: int
    degree: int
    """Ranks that share a micro-batch."""
    samples: int
    micro_batches: int
    tokens: int | None
    """Transformer tokens of all its samples; None where no transformer trains."""
    flops: float
    """Of all its micro-batches."""


@dataclass(frozen=True)
class Plan:
    """One epoch. Counts of rows and micro-batches add up: nothing is silently missing."""

    epoch: int
    world_size: int
    accumulation: int
    rows: int
    """Of the manifest."""
    samples: int
    """Rows that train in this epoch."""
    dropped: dict[str, int]
    """Reason: rows that do not. `samples` and these add up to `rows`."""
    buckets: list[BucketPlan]
    micro_batches: int
    repeated_micro_batches: int
    """How many of them stand a second time, because there are fewer rows than ranks."""
    steps_per_epoch: int
    step_balance: float
    """Mean over steps of (mean / maximum cost of the ranks)."""
    fill: float
    """Mean over micro-batches of their rows over the most that they may hold."""
    tokens: int | None
    flops_per_epoch: float
    notes: list[str]
    """What a person should know before starting."""

    def to_dict(self) -> dict[str, Any]:
        """JSON types only: what `kinema data plan --json` prints."""
        return asdict(self)


def make_plan(
    manifest: Manifest, order: SampleOrder, *, epoch: int = 0, tokens: Tokens | None = None
) -> Plan:
    """Account for every row of the manifest in one epoch.

    Args:
        order: made for this manifest.
        tokens: transformer tokens of one clip of a bucket; None where no transformer trains.

    Raises:
        NoMicroBatchesError: no row trains; says why.
    """
    laid = order.epoch(epoch)
    dropped = {f"dropped by {name}": count for name, count in manifest.dropped().items()}
    assigned = order.assign(epoch)[manifest.kept]
    dropped |= {
        name: int(count)
        for code, name in REASONS.items()
        if (count := np.count_nonzero(assigned == code))
    }
    buckets = _bucket_plans(laid, order, tokens)
    return Plan(
        epoch=epoch,
        world_size=order.world_size,
        accumulation=order.accumulation,
        rows=len(manifest),
        samples=laid.num_rows,
        dropped=dropped,
        buckets=buckets,
        micro_batches=laid.num_micro_batches,
        repeated_micro_batches=laid.num_repeated,
        steps_per_epoch=laid.num_steps,
        step_balance=laid.step_balance,
        fill=laid.fill,
        tokens=sum(b.tokens or 0 for b in buckets) if tokens else None,
        flops_per_epoch=laid.flops,
        notes=[*_caption_notes(manifest, tokens), *_notes(laid, buckets, order)],
    )


def _bucket_plans(laid: Epoch, order: SampleOrder, tokens: Tokens | None) -> list[BucketPlan]:
    layout, count = laid.layout, len(order.table.buckets)
    samples = np.bincount(layout.bucket, weights=layout.size, minlength=count)
    batches, flops = laid.micro_batches_of(count), laid.flops_of(count)
    return [
        BucketPlan(
            resolution=b.resolution,
            num_frames=b.frames,
            width=b.width,
            height=b.height,
            max_batch=b.max_batch,
            degree=order.degree(b),
            samples=int(samples[b.index]),
            micro_batches=int(batches[b.index]),
            tokens=int(samples[b.index]) * tokens(b) if tokens else None,
            flops=float(flops[b.index]),
        )
        for b in order.table.buckets
        if samples[b.index]
    ]


def _caption_notes(manifest: Manifest, tokens: Tokens | None) -> list[str]:
    if not tokens:
        return []
    if not manifest.text_was_read:
        return ["captions are not looked at here, there are many: kinema data check looks"]
    without = int((manifest.blank & manifest.kept).sum())
    if not without:
        return []
    return [f"{counted(without, 'clip')} without a caption: text-to-video training refuses them"]


def _notes(laid: Epoch, buckets: list[BucketPlan], order: SampleOrder) -> list[str]:
    notes = []
    ranks = order.world_size * order.accumulation
    if laid.num_repeated:
        notes.append(
            f"{laid.num_repeated:,} of {counted(laid.num_micro_batches, 'micro-batch')} repeat "
            f"others, without counting in the loss: {counted(laid.num_rows, 'clip')} cannot fill "
            f"{counted(laid.num_steps, 'step')} of {counted(ranks, 'micro-batch')}"
        )
    full = sum(-(-b.samples // b.max_batch) * b.degree for b in buckets)
    if full < ranks and not laid.num_repeated:
        notes.append(
            f"the epoch is less than one step: {counted(full, 'full micro-batch')} for "
            f"{counted(ranks, 'rank')}, so they are split into smaller ones"
        )
    used = {(b.resolution, b.num_frames) for b in buckets}
    unused = dict.fromkeys((b.resolution, b.frames) for b in order.table.buckets)
    names = [f"{r} {_length(n)}" for r, n in unused if (r, n) not in used]
    if names:
        notes.append(f"buckets without a clip: {', '.join(names)}")
    return notes


def counted(number: int, thing: str) -> str:
    """`1 step`, `2,000 steps`, `3 micro-batches`."""
    plural = "es" if thing.endswith("ch") else "s"
    return f"{number:,} {thing}{'' if number == 1 else plural}"


def _length(frames: int) -> str:
    return "image" if frames == 1 else f"{frames} frames"


def render_plan(plan: Plan, *, width: int = 100) -> str:
    """The plan as text: a table by resolution and frames, then totals and notes."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("bucket", "frames", "sizes"):
        table.add_column(name, justify="right" if name != "bucket" else "left")
    for name in ("clips", "micro-batches", "of at most", "tokens", "FLOPs"):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, int], list[BucketPlan]] = {}
    for b in plan.buckets:
        groups.setdefault((b.resolution, b.num_frames), []).append(b)
    for (resolution, frames), group in groups.items():
        tokens = None if plan.tokens is None else sum(b.tokens or 0 for b in group)
        table.add_row(
            resolution,
            "image" if frames == 1 else str(frames),
            str(len(group)),
            f"{sum(b.samples for b in group):,}",
            f"{sum(b.micro_batches for b in group):,}",
            str(group[0].max_batch) + _shared(group[0].degree),
            "-" if tokens is None else quantity(tokens),
            f"{sum(b.flops for b in group) / plan.flops_per_epoch:.1%}",
        )
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get() + "\n" + "\n".join(_totals(plan)) + "\n"


def _shared(degree: int) -> str:
    return f" on {degree} ranks" if degree > 1 else ""


def _totals(plan: Plan) -> list[str]:
    kept = f"{plan.samples:,} of {plan.rows:,} clips train in epoch {plan.epoch}"
    lines = [kept + ("" if plan.dropped else "; none is left out")]
    lines += [f"  left out: {count:,} {name}" for name, count in plan.dropped.items()]
    accumulated = f" x {plan.accumulation} accumulated" if plan.accumulation > 1 else ""
    lines.append(
        f"{counted(plan.steps_per_epoch, 'step')} of {counted(plan.world_size, 'rank')}"
        f"{accumulated}, {counted(plan.micro_batches, 'micro-batch')}, "
        f"on average {plan.fill:.1%} full"
    )
    lines.append(f"step balance {plan.step_balance:.3f} (mean over maximum cost of the ranks)")
    tokens = "" if plan.tokens is None else f"{quantity(plan.tokens).strip()} tokens, "
    lines.append(f"{tokens}{quantity(plan.flops_per_epoch)}FLOPs per epoch")
    return lines + [f"note: {note}" for note in plan.notes]


def quantity(number: float) -> str:
    """`1.23 M`: three digits and a decimal prefix."""
    for limit, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"),
                          (1e6, "M"), (1e3, "k")):  # fmt: skip
        if number >= limit:
            return f"{number / limit:.3g} {prefix}"
    return f"{number:.3g} "
