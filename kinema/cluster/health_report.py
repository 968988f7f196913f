"""What `health` found, as text: a verdict per node, then each finding once with its nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kinema.cluster.health import Health
from kinema.cluster.verdict import STATUSES, Check, Status, listed

EVERYONE = "all together"
Key = tuple[str, str]
"""Node (or EVERYONE), and name of the check."""


def report(health: Health, *, verbose: bool) -> str:
    """Text for people.

    Args:
        verbose: what is right is shown as well.
    """
    width = max((len(node) for node in [*health.nodes, EVERYONE]), default=0)
    lines = [
        f"{node:<{width}}  {health.verdict(node):<7}  {_counted(checks)}"
        for node, checks in health.nodes.items()
    ]
    if health.together:
        status = max((c.status for c in health.together), key=STATUSES.index)
        lines.append(f"{EVERYONE:<{width}}  {status:<7}  {_counted(health.together)}")
    shown: tuple[Status, ...] = ("error", "warning", "ok") if verbose else ("error", "warning")
    for status in shown:
        lines += [""] if status == "ok" else []
        lines += _findings(health, status)
    for check in health.together:
        if check.status == "ok" and not verbose:
            lines += ["", f"{check.name}: {check.value}"]
    return "\n".join(lines)


def _counted(checks: list[Check]) -> str:
    counts = {status: sum(c.status == status for c in checks) for status in STATUSES}
    parts = [
        f"{counts[status]} {status}{'s' if counts[status] > 1 else ''}"
        for status in ("error", "warning")
        if counts[status]
    ]
    of = f"{len(checks)} check{'s' if len(checks) > 1 else ''}"
    return f"{', '.join(parts)} in {of}" if parts else of


def _findings(health: Health, status: Status) -> Iterator[str]:
    """Findings of one status; what many nodes share is said once."""
    same: dict[tuple[str, str, str, bool], dict[str, str]] = {}
    every = {**health.nodes, EVERYONE: health.together}
    for node, checks in every.items():
        for check in checks:
            if check.status == status:
                key = (check.name, check.limit, check.cure, node == EVERYONE)
                same.setdefault(key, {})[node] = check.value
    for (name, limit, cure, _), values in same.items():
        shown = list(dict.fromkeys(values.values()))
        value = shown[0] if len(shown) == 1 else f"{shown[0]} … {shown[-1]}"
        if status != "ok":
            yield ""
        yield f"{status:<7}  {listed(values)}: {name}: {value}"
        if status != "ok":
            if limit:
                yield f"         limit: {limit}"
            if cure:
                yield f"         cure:  {cure}"


def statuses(health: Health) -> dict[Key, Check]:
    """Every check that is not ok, and those that are, by node and name."""
    every: Mapping[str, list[Check]] = {**health.nodes, EVERYONE: health.together}
    return {(node, check.name): check for node, checks in every.items() for check in checks}


def carried(before: Mapping[Key, Check], now: Mapping[Key, Check]) -> dict[Key, Check]:
    """`now`, and what was known before of nodes that do not answer now."""
    silent = {node for node, name in now if name == "connection"}
    return {key: check for key, check in before.items() if key[0] in silent} | dict(now)


def turns(before: Mapping[Key, Check], now: Mapping[Key, Check]) -> list[tuple[Key, Status, str]]:
    """Checks that changed their status from one round to the next: key, status, line.

    A check that is gone is ok: findings that are over are not listed any more.
    """
    found: list[tuple[Key, Status, str]] = []
    for key in dict.fromkeys([*before, *now]):
        was = before[key].status if key in before else "ok"
        check = now.get(key)
        status: Status = check.status if check is not None else "ok"
        if status != was:
            text = str(check) if check is not None else f"{key[1]}: over"
            found.append((key, status, f"{key[0]}: {was} -> {status}: {text}"))
    return found
