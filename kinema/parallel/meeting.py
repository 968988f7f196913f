"""How the processes of a run find each other, also after torchrun started them anew.

torchrun's agents keep one key-value store for all starts of a launch, and a process that starts
anew can read addresses there that processes now dead have left (gloo: "connectFullMesh failed …
Connection refused"). The number of the restart is no remedy: an agent that joins later counts its
own. So the processes first agree on a name for this start, and keep their keys below it.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

BETWEEN_LOOKS_S = 0.02


def meet(store: dist.Store, rank: int, size: int, *, timeout: timedelta) -> dist.Store:
    """A part of `store` that only the processes of this start know of. Collective.

    Every process says hello with a word of its own. Rank 0 answers each word with the name of this
    start, and goes on answering until each process has confirmed that very name: words that an
    earlier start has left get an answer that nobody reads.

    Args:
        store: that all processes see; may hold anything of earlier starts.
        timeout: how long to wait for the others.

    Raises:
        TimeoutError: on rank 0: some did not come; names them.
    """
    if rank:
        word = uuid.uuid4().hex
        store.set(f"kinema/hello/{rank}", word)
        store.wait([f"kinema/answer/{word}"], timeout)
        name = store.get(f"kinema/answer/{word}").decode()
        store.set(f"kinema/confirm/{name}/{rank}", "here")
    else:
        name = uuid.uuid4().hex
        missing = set(range(1, size))
        answered: dict[int, bytes] = {}
        until = time.monotonic() + timeout.total_seconds()
        while missing:
            for other in sorted(missing):
                if store.check([f"kinema/hello/{other}"]):
                    word_of = store.get(f"kinema/hello/{other}")
                    if answered.get(other) != word_of:
                        store.set(f"kinema/answer/{word_of.decode()}", name)
                        answered[other] = word_of
                if store.check([f"kinema/confirm/{name}/{other}"]):
                    missing.discard(other)
            if missing and time.monotonic() > until:
                ranks = ", ".join(map(str, sorted(missing)[:16]))
                raise TimeoutError(f"waited {timeout} for ranks that did not come: {ranks}")
            time.sleep(BETWEEN_LOOKS_S if missing else 0)
    return dist.PrefixStore(f"kinema/start/{name}", store)
