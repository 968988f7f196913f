"""End training processes that a person was shown, and say what remains."""

from __future__ import annotations

from typing import Any

from kinema.cluster.on_node.processes import Process, end, find


def main(
    host: str,
    others: list[str],
    launches: list[str],
    grace_s: float,
    launch: str | None = None,
) -> dict[str, Any]:
    """End what belongs to `launches`; helpers that these started meanwhile go with them.

    Args:
        host, others, launch: as `processes.find`.
        launches: names of the launches that were shown.
    """

    def look() -> list[Process]:
        return [p for p in find(host, others, launch) if p["launch"] in launches]

    return end(look, grace_s)
