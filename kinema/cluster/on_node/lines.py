"""One connection for many questions: a line comes in, the answer goes out as a line of JSON.

So a live view does not log in again for each reading, and the time of a round trip is that of the
network and not of a login.
"""

from __future__ import annotations

import importlib
import json
import sys


def main(module: str) -> None:
    """Answer each line of stdin with the module's `answer(question)` until stdin ends.

    Args:
        module: name of a file of this folder.
    """
    answer = importlib.import_module(f"kinema.cluster.on_node.{module}").answer
    for line in sys.stdin.buffer:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()
