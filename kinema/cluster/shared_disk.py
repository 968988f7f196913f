"""Which hosts share a disk: a home folder on the network is one place with many doors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kinema.cluster.hostfile import Host
from kinema.cluster.plan import new_name
from kinema.cluster.remote import Answer, ask
from kinema.cluster.ssh import Ssh

TIMEOUT_S = 60.0


def first_with_it(
    ssh: Ssh, hosts: Sequence[Host], path: str, *, python: str = "python3"
) -> dict[str, str]:
    """Of each host the first one, in the order of the hosts, that has the same disk at `path`.

    Args:
        path: folder on the hosts, or the nearest above it that exists; `~` is the home folder.
        python: interpreter on the hosts.

    A host that does not answer, or may not write there, shares with nobody.
    """
    if len(hosts) < 2:
        return {host.name: host.name for host in hosts}
    names = [host.name for host in hosts]
    given: dict[str, Any] = {"path": path, "name": f".kinema-{new_name()}", "others": names}
    each = {name: {"host": name} for name in names}

    def tell(step: str) -> list[Answer]:
        return ask(
            *(ssh, hosts, "shared_disk"),
            timeout_s=TIMEOUT_S,
            python=python,
            each=each,
            step=step,
            **given,
        )

    try:
        tell("make")
        looked = tell("look")
    finally:
        tell("remove")
    sees = {a.host.name: a.value["sees"] for a in looked if a.problem is None}
    return {name: next(iter(sees.get(name, ())), name) for name in names}
