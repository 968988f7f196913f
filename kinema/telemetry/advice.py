"""What to try next, by the shares of a step: rules of thumb, in the order of what they may gain."""

from __future__ import annotations

from dataclasses import dataclass

from kinema.telemetry.trace import Breakdown

LOADER_PCT = 10.0
COMMUNICATION_PCT = 10.0
WAITING_PCT = 15.0
MEMORY_PCT = 5.0
FULL_PCT = 85.0
"""From these shares on, a rule speaks."""
TOP_OPERATORS = 15


@dataclass(frozen=True)
class Facts:
    """What a recipe has set already, so that it is not advised again.

    Attributes:
        ranks: of the run.
        shard: `parallel.shard`.
        hybrid: weights are sharded over fewer than all ranks.
        compile: `compile`.
        recompute: `recompute`.
        latents_cached: latents are read or remembered instead of encoded.
        workers: decode workers of each rank.
    """

    ranks: int = 1
    shard: str = "none"
    hybrid: bool = False
    compile: bool = False
    recompute: str = "none"
    latents_cached: bool = False
    workers: int = 1


def advise(found: Breakdown, facts: Facts) -> list[str]:
    """One sentence for each thing that stands out."""
    share = {row: found.percent(row) for row in found.rows}
    result = []
    if share["loader"] >= LOADER_PCT:
        more = f"more decode workers (data.num_workers is {facts.workers})"
        cached = "" if facts.latents_cached else "; or latents encoded ahead of time (latent_cache)"
        result.append(f"Waiting for data takes {share['loader']:.0f}% of a step: {more}{cached}.")
    if share["communication"] >= COMMUNICATION_PCT:
        result.append(
            f"Communication that nothing hides takes {share['communication']:.0f}%: "
            f"{_less_communication(facts)}."
        )
    waiting = share["CPU"] + share["other"]
    if found.gpu and waiting >= WAITING_PCT:
        ways = [] if facts.compile else ["compile: true"]
        ways.append("larger micro-batches (data.buckets), for fewer and longer kernels")
        result.append(f"The GPU waits for the host {waiting:.0f}% of a step: {'; '.join(ways)}.")
    if share["memory copy"] >= MEMORY_PCT:
        less = "" if facts.latents_cached else "; latents encoded ahead of time move no pixels"
        result.append(
            f"Copies take {share['memory copy']:.0f}%: the trace shows what is moved or cast{less}."
        )
    if share["memory set"] >= MEMORY_PCT:
        result.append(
            f"Filling memory takes {share['memory set']:.0f}%: most of it is zeroing gradients; "
            "more accumulation or larger micro-batches do it less often."
        )
    if share["kernel"] >= FULL_PCT:
        ways = [] if facts.recompute == "none" else ["recompute less, where memory allows"]
        ways += [] if facts.compile else ["compile: true"]
        ways.append("beyond that, only faster kernels or more GPUs help")
        result.append(f"Kernels fill {share['kernel']:.0f}% of a step: {'; '.join(ways)}.")
    return result or ["No share stands out."]


def _less_communication(facts: Facts) -> str:
    if facts.shard == "zero3":
        return "parallel.shard: zero2 gathers weights once a step, if memory allows" + (
            "" if facts.hybrid else "; or shard_over: node, to keep gathering inside a machine"
        )
    if facts.shard == "zero2" and not facts.hybrid:
        return "parallel.shard_over: node keeps gathering inside a machine; or more accumulation"
    return "larger micro-batches or more accumulation send gradients less often"


def render(found: Breakdown, facts: Facts) -> str:
    """The table, the host's own times and what to try next, as a person reads them."""
    step = found.total / found.steps
    lines = [
        f"{found.steps} steps of {step:.4g} s; seconds are those of one step",
        "",
        f"{'':15}{'seconds':>10}{'of a step':>12}{'at work':>10}",
    ]
    for row, seconds in found.rows.items():
        lines.append(
            f"{row:15}{seconds / found.steps:>10.4f}{found.percent(row):>11.1f}%"
            f"{found.busy[row] / found.steps:>10.4f}"
        )
    if not found.gpu:
        lines += ["(no GPU took part: the work is done in the row `CPU`)"]
    lines += ["", f"{'host, by phase':42}{'seconds':>10}{'of a step':>12}"]
    lines += _times(found.spans, found)
    lines += ["", f"{'host, by operator (own time)':42}{'seconds':>10}{'of a step':>12}"]
    lines += _times(dict(list(found.operators.items())[:TOP_OPERATORS]), found)
    return "\n".join([*lines, "", "what to try next:", *(f"- {a}" for a in advise(found, facts))])


def _times(values: dict[str, float], found: Breakdown) -> list[str]:
    return [
        f"{name[:41]:42}{seconds / found.steps:>10.4f}{100 * seconds / found.total:>11.1f}%"
        for name, seconds in values.items()
        if seconds > 0
    ]
