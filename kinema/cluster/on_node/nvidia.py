"""What `nvidia-smi` says, as it says it; making sense of it is the other side's work."""

from __future__ import annotations

import re
from typing import Any

from kinema.cluster.on_node.machine import run

_REFUSED = re.compile(r'Field "([^"]+)" is not a valid field')


def query(what: str, fields: list[list[str]]) -> dict[str, Any]:
    """`nvidia-smi --query-WHAT` with those of `fields` that this driver knows.

    Args:
        what: `gpu`, `compute-apps` or `remapped-rows`.
        fields: each the names of one thing, the newest first: drivers rename them.

    Returns:
        `text` (CSV) and `problem` as `machine.run`, and `fields`: the first name of each column.
    """
    chosen = [list(names) for names in fields]
    while True:
        asked = [names[0] for names in chosen if names]
        words = [f"--query-{what}={','.join(asked)}", "--format=csv,noheader,nounits"]
        said = run("nvidia-smi", *words)
        refused = _REFUSED.search(said["text"] + (said["problem"] or ""))
        if refused is None or refused.group(1) not in asked or len(asked) == 1:
            said["fields"] = [names[0] for names, left in zip(fields, chosen) if left]  # noqa: B905
            return said
        for names in chosen:
            if names and names[0] == refused.group(1):
                del names[0]
