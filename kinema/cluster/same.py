"""What must be the same on all nodes, and which node is the odd one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kinema.cluster.gpu import UnreadableError
from kinema.cluster.gpu_checks import gpus_of
from kinema.cluster.link_checks import PORT_CURE, nvlink_rates, rate_gbit_s, speed_mbit_s
from kinema.cluster.verdict import Check, Status, listed, most_have

SOFTWARE = {
    "python": "the same Python on all nodes: kinema cluster setup",
    "torch": "kinema cluster setup",
    "nccl": "kinema cluster setup; NCCL comes with torch",
    "kinema": "kinema cluster setup",
    "code": "kinema cluster setup: the code of this node is another than the others'",
}
Found = dict[str, list[Check]]
"""Node -> checks."""
One = dict[str, Check]
"""Node -> check."""


def software(versions: Mapping[str, Mapping[str, Any]]) -> Found:
    """Compare what `on_node/versions.py` found.

    Args:
        versions: by node.
    """
    found: Found = {node: [] for node in versions}
    for name, cure in SOFTWARE.items():
        label = "kinema code" if name == "code" else name
        values = {node: value[name] for node, value in versions.items()}
        for node, check in _compare(label, values, cure).items():
            if check.value == "None" and check.status == "ok":
                if name in ("torch", "kinema"):
                    check = Check(label, "error", "not installed", "installed", cure)
                else:
                    continue  # no NCCL without GPUs; code that is no folder
            found[node].append(check)
    names = dict.fromkeys(file for value in versions.values() for file in value["files"])
    for file in names:
        _files(file, versions, found)
    return found


def _files(file: str, versions: Mapping[str, Mapping[str, Any]], found: Found) -> None:
    cure = f"kinema cluster sync weights {file}"
    there = {node: value["files"][file] for node, value in versions.items()}
    whole = {node: _file(one) for node, one in there.items() if "error" not in one}
    for node, one in there.items():
        if "error" in one:
            check = Check(f"weights {file}", "error", one["error"], "the same on all nodes", cure)
            found[node].append(check)
    for node, check in _compare(f"weights {file}", whole, cure).items():
        found[node].append(check)


def _file(one: Mapping[str, Any]) -> str:
    return f"{one['size']:,} bytes, sha256 {one['sha256'][:12]}"


def hardware(looks: Mapping[str, Mapping[str, Any]]) -> Found:
    """Compare drivers, GPUs and links.

    Args:
        looks: by node, what `on_node/look_over.py` found.
    """
    found: Found = {node: [] for node in looks}

    def add(checks: Mapping[str, Check]) -> None:
        for node, check in checks.items():
            found[node].append(check)

    all_gpus = {node: gpus_of(look) for node, look in looks.items()}
    drivers = {
        node: gpus[0].values.get("driver_version", "?") for node, gpus in all_gpus.items() if gpus
    }
    add(_compare("gpu driver", drivers, "install the same driver on all nodes"))
    kinds = {node: ", ".join(sorted({g.name for g in gpus})) for node, gpus in all_gpus.items()}
    kinds = {node: kind for node, kind in kinds.items() if kind}
    add(_odd("gpu kind", kinds, "train on nodes of one kind: the slowest GPU sets the pace"))
    counts = {node: float(len(gpus)) for node, gpus in all_gpus.items() if gpus}
    add(_fewer("gpu count", counts, "GPUs", "see gpu xid; restart the node"))
    links = {}
    for node, look in looks.items():
        try:
            links[node] = float(sum(len(rates) for rates in nvlink_rates(look).values()))
        except UnreadableError:
            continue  # its own check says so
    add(_fewer("nvlink count", links, "active links", "nvidia-smi nvlink --status"))
    _ports(looks, found, "infiniband", lambda p: str(p["port"]), rate_gbit_s, _is_active, "Gb/s")
    _ports(looks, found, "ethernet", lambda c: str(c["name"]), speed_mbit_s, _is_up, "Mb/s")
    return found


def _is_active(port: Mapping[str, Any]) -> bool:
    return "ACTIVE" in (port["state"] or "")


def _is_up(card: Mapping[str, Any]) -> bool:
    return card["state"] in ("up", "unknown")


def _ports(
    looks: Mapping[str, Mapping[str, Any]],
    found: Found,
    kind: str,
    name_of: Callable[[Mapping[str, Any]], str],
    rate_of: Callable[[Mapping[str, Any]], float | None],
    works: Callable[[Mapping[str, Any]], bool],
    unit: str,
) -> None:
    """A port that is slower than, or missing beside, the one of its name on the other nodes."""
    rates: dict[str, dict[str, float]] = {}
    for node, look in looks.items():
        for port in look[kind]:
            try:
                rate = rate_of(port) if works(port) else 0.0
            except UnreadableError:
                continue  # its own check says so
            if rate is not None:
                rates.setdefault(name_of(port), {})[node] = rate
    for port_name, of_nodes in rates.items():
        working = [node for node, rate in of_nodes.items() if rate]
        best = max(of_nodes.values())
        fast = [node for node in working if of_nodes[node] == best]
        # A card that only a few nodes have is nobody's fault, one that only a few lack is.
        most_have_it = 2 * len(working) > len(looks)
        for node in looks:
            rate = of_nodes.get(node, 0.0 if most_have_it else best)
            if rate < best:
                value = f"{rate:,.0f} {unit}" if rate else "does not work"
                limit = f"{best:,.0f} {unit} as on {listed(fast)}"
                name = f"{kind} {port_name} rate"
                found[node].append(Check(name, "error", value, limit, PORT_CURE))


def _compare(name: str, values: Mapping[str, Any], cure: str, wrong: Status = "error") -> One:
    """Name the nodes whose value is another than that of most."""
    if not values:
        return {}
    common = most_have(values)
    same = [node for node, value in values.items() if value == common]
    limit = f"{common} as on {listed(same)}"
    return {
        node: Check(name, "ok", str(value))
        if value == common
        else Check(name, wrong, "missing" if value is None else str(value), limit, cure)
        for node, value in values.items()
    }


def _odd(name: str, values: Mapping[str, Any], cure: str) -> One:
    """As `_compare`, as a warning, and only those that differ."""
    compared = _compare(name, values, cure, "warning")
    return {node: check for node, check in compared.items() if check.status != "ok"}


def _fewer(name: str, values: Mapping[str, float], unit: str, cure: str) -> One:
    """Name the nodes that have fewer than the most of any node."""
    most = max(values.values(), default=0)
    best = [node for node, value in values.items() if value == most]
    limit = f"{most:.0f} as on {listed(best)}"
    return {
        node: Check(name, "error", f"{value:.0f} {unit}", limit, cure)
        for node, value in values.items()
        if value < most
    }
