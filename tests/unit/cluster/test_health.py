"""Checks of nodes from what the probes bring, comparisons, verdicts, the report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from kinema.cluster import (
    bandwidth,
    clocks,
    gpu,
    gpu_checks,
    health_report,
    link_checks,
    node_checks,
    same,
)
from kinema.cluster.bandwidth import Found
from kinema.cluster.clocks import Clock
from kinema.cluster.health import Health
from kinema.cluster.hostfile import Host
from kinema.cluster.plan import Node
from kinema.cluster.verdict import Check, Limits, passed, worst
from kinema.config.errors import KinemaError
from tests.unit.cluster import hardware
from tests.unit.cluster.hardware import app_row, csv, gpu_row, rows_row

GIB = 2**30
MISSING = {"text": "", "problem": "not installed"}


def look(**changes: Any) -> dict[str, Any]:
    """What `look_over` brings of a node that is well."""
    port = {
        "port": "mlx5_0:1",
        "state": "4: ACTIVE",
        "phys_state": "5: LinkUp",
        "rate": "400 Gb/sec (4X NDR)",
        "link_layer": "InfiniBand",
        "counters": {"link_downed": "0"},
    }
    healthy: dict[str, Any] = {
        "gpu": csv([gpu_row(0), gpu_row(1)], gpu.names(gpu.HEALTH_FIELDS)),
        "apps": csv([], gpu.app_names()),
        "rows": csv([rows_row(0), rows_row(1)], gpu.rows_names()),
        "nvlink": {"text": hardware.NVLINK.format(link="26.562 GB/s"), "problem": None},
        "nvlink_errors": {"text": hardware.NVLINK_QUIET, "problem": None},
        "pci": ["nvidia0", "nvidia1"],
        "kernel_log": {"text": "", "problem": None},
        "uptime_s": 10_000.0,
        "chronyc": {"text": hardware.CHRONY.format(leap="Normal"), "problem": None},
        "timedatectl": MISSING,
        "infiniband": [port],
        "ethernet": [{"name": "eth0", "state": "up", "speed": "25000", "counters": {}}],
        "modules": ["nvidia_peermem"],
        "disks": {
            "/out": {
                "exists": True,
                "at": "/out",
                "free": 500 * GIB,
                "latency_ms": {"median": 1.0, "most": 2.0},
                "error": None,
            }
        },
        "shared_memory": {"total": 64 * GIB, "free": 60 * GIB},
        "limits": {"memlock": -1, "nofile": 1 << 20},
        "cores": 64,
    }
    return healthy | changes


def gpus(*rows: dict[str, object]) -> dict[str, object]:
    return csv(list(rows), gpu.names(gpu.HEALTH_FIELDS))


def port(**changes: str) -> dict[str, Any]:
    return look()["infiniband"][0] | changes


def card(**changes: str) -> dict[str, Any]:
    return look()["ethernet"][0] | changes


def disk(**changes: Any) -> dict[str, Any]:
    return {"/out": look()["disks"]["/out"] | changes}


def checks(of: dict[str, Any], slots: int | None = 2) -> list[Check]:
    limits = Limits()
    return [
        *gpu_checks.check(of, slots, limits),
        *link_checks.check(of),
        *node_checks.check(of, limits),
    ]


def wrong(found: Iterable[Check]) -> dict[str, Check]:
    return {check.name: check for check in found if check.status != "ok"}


def test_a_node_that_is_well_has_nothing_wrong() -> None:
    found = checks(look())
    assert wrong(found) == {}
    assert {"gpus", "gpu xid", "gpu ecc", "nvlink", "gpudirect", "shared memory"} <= {
        check.name for check in found
    }


def test_a_node_without_gpus_is_well_too() -> None:
    bare = look(gpu=MISSING, rows=None, nvlink=None, nvlink_errors=None, pci=[], infiniband=[])
    assert wrong(checks(bare)) == {}


OFF = {"text": "", "problem": "ended with code 15: Unable to determine the device handle"}
FAULTS: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("tool fails", {"gpu": OFF}, "gpus", "error", "device handle"),
    ("driver missing", {"gpu": MISSING}, "gpus", "error", "not installed"),
    ("garbage", {"gpu": gpus() | {"text": "oops"}}, "gpus", "error", "could not be read: 'oops'"),
    ("one lost", {"gpu": gpus(gpu_row(0))}, "gpus", "error", "1 × NVIDIA"),
    ("xid", {"kernel_log": {"text": hardware.XID_79, "problem": None}},
     "gpu xid 0000:3b:00 79", "error", "1.6 h ago"),
    ("old xid", {"kernel_log": {"text": hardware.XID_79, "problem": None}, "uptime_s": 2e5},
     "gpu xid 0000:3b:00 79", "warning", "54.4 h ago"),
    ("program's xid", {"kernel_log": {"text": hardware.XID_31_IN_JOURNAL, "problem": None}},
     "gpu xid 0000:86:00 31", "warning", "page fault"),
    ("log closed", {"kernel_log": {"text": "", "problem": "dmesg: not permitted"}},
     "gpu xid", "warning", "not permitted"),
    ("needs reset", {"gpu": gpus(gpu_row(0), gpu_row(1, power__draw="[GPU requires reset]"))},
     "gpu 1 answers", "error", "requires reset"),
    ("ecc", {"gpu": gpus(gpu_row(0, ecc__errors__uncorrected__volatile__total=2), gpu_row(1))},
     "gpu 0 ecc", "error", "2 uncorrected"),
    ("ecc once", {"gpu": gpus(gpu_row(0, ecc__errors__uncorrected__aggregate__total=5),
                              gpu_row(1))}, "gpu 0 ecc", "warning", "5 uncorrected"),
    ("ecc off", {"gpu": gpus(gpu_row(0), gpu_row(1, ecc__mode__current="Disabled"))},
     "gpu ecc", "warning", "GPUs 1"),
    ("rows pending", {"rows": csv([rows_row(1, pending="Yes")], gpu.rows_names())},
     "gpu 1 rows", "warning", "waits"),
    ("rows failed", {"rows": csv([rows_row(0, failure="Yes")], gpu.rows_names())},
     "gpu 0 rows", "error", "could not be replaced"),
    ("power brake", {"gpu": gpus(gpu_row(0), gpu_row(1, clocks_event_reasons__active="0x80"))},
     "gpu 1 throttling", "warning", "power brake"),
    ("hot", {"gpu": gpus(gpu_row(0, temperature__gpu=93), gpu_row(1))},
     "gpu 0 throttling", "warning", "93 °C"),
    ("lanes", {"gpu": gpus(gpu_row(0, pcie__link__width__current=8), gpu_row(1))},
     "gpu 0 pcie", "warning", "×8 of ×16"),
    ("persistence", {"gpu": gpus(gpu_row(0, persistence_mode="Disabled"), gpu_row(1))},
     "gpu persistence", "warning", "unloaded"),
    ("slices", {"gpu": gpus(gpu_row(0, mig__mode__current="Enabled"), gpu_row(1))},
     "gpu mig", "warning", "slices"),
    ("nvlink down", {"nvlink": {"text": hardware.NVLINK.format(link="<inactive>"),
                                "problem": None}}, "nvlink gpu 1", "error", "1 of 2 links"),
    ("nvlink slow", {"nvlink": {"text": hardware.NVLINK.format(link="13.281 GB/s"),
                                "problem": None}}, "nvlink gpu 1", "error", "13.281 GB/s"),
    ("nvlink odd", {"nvlink": {"text": hardware.NVLINK.format(link="?"), "problem": None}},
     "nvlink", "warning", "could not be read"),
    ("nvlink errors", {"nvlink_errors": {"text": hardware.NVLINK_ERRORS, "problem": None}},
     "nvlink gpu 1 errors", "warning", "7 errors"),
    ("no subnet manager", {"infiniband": [port(state="2: INIT")]},
     "infiniband mlx5_0:1", "error", "INIT"),
    ("port errors", {"infiniband": [port() | {"counters": {"symbol_error": "9"}}]},
     "infiniband mlx5_0:1 errors", "warning", "symbol_error 9"),
    ("rate odd", {"infiniband": [port(rate="fast")]},
     "infiniband mlx5_0:1", "warning", "could not be read"),
    ("no peermem", {"modules": []}, "gpudirect", "warning", "not loaded"),
    ("not synchronised", {"chronyc": {"text": hardware.CHRONY.format(leap="Not synchronised"),
                                      "problem": None}},
     "time synchronisation", "error", "Not synchronised"),
    ("chrony odd", {"chronyc": {"text": "506 Cannot talk to daemon", "problem": None}},
     "time synchronisation", "warning", "could not be read: '506"),
    ("systemd no", {"chronyc": MISSING,
                    "timedatectl": {"text": "NTP=yes\nNTPSynchronized=no\n", "problem": None}},
     "time synchronisation", "error", "not synchronised"),
    ("nobody knows", {"chronyc": MISSING}, "time synchronisation", "warning", "not known"),
    ("disk low", {"disks": disk(free=50 * GIB)}, "disk /out", "warning", "50.0 GiB"),
    ("disk full", {"disks": disk(free=GIB)}, "disk /out", "error", "1.0 GiB"),
    ("disk refuses", {"disks": disk(error="Read-only disk")}, "disk /out", "error", "Read-only"),
    ("no room", {"disks": disk(error="No space left")}, "disk /out", "error", "No space"),
    ("disk slow", {"disks": disk(latency_ms={"median": 300.0, "most": 9e3})},
     "latency /out", "warning", "300.0 ms"),
    ("shm", {"shared_memory": {"total": GIB // 16, "free": GIB // 16}},
     "shared memory", "error", "0.1 of 0.1 GiB"),
    ("no shm", {"shared_memory": None}, "shared memory", "warning", "no /dev/shm"),
    ("files", {"limits": {"memlock": -1, "nofile": 1024}}, "open files", "warning", "1,024"),
    ("memlock", {"limits": {"memlock": 1 << 26, "nofile": -1}},
     "locked memory", "error", "0.0625 GiB"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "name", "status", "said"),
    [fault[1:] for fault in FAULTS],
    ids=[fault[0] for fault in FAULTS],
)
def test_each_fault_is_found(changes: dict[str, Any], name: str, status: str, said: str) -> None:
    found = wrong(checks(look(**changes)))
    assert set(found) == {name} or (name == "gpus" and "gpus" in found)
    assert found[name].status == status
    assert said in found[name].value
    assert "No space" not in said or "delete old checkpoints" in found[name].cure


def test_systemd_says_that_a_clock_is_synchronised() -> None:
    yes = {"text": "NTPSynchronized=yes\n", "problem": None}
    assert wrong(checks(look(chronyc=MISSING, timedatectl=yes))) == {}


def test_links_and_gpus_are_compared_with_the_other_nodes() -> None:
    def odd(**changes: Any) -> dict[str, Check]:
        found = same.hardware({"a": look(), "b": look(**changes), "c": look()})
        assert wrong(found["a"]) == wrong(found["c"]) == {}
        return wrong(found["b"])

    assert odd() == {}
    half = odd(infiniband=[port(rate="200 Gb/sec (2X NDR)")])["infiniband mlx5_0:1 rate"]
    assert (half.status, half.value) == ("error", "200 Gb/s")
    assert half.limit == "400 Gb/s as on a, c"
    down = odd(infiniband=[port(state="1: DOWN", phys_state="2: Polling")])
    assert down["infiniband mlx5_0:1 rate"].value == "does not work"
    gone = odd(infiniband=[])
    assert gone["infiniband mlx5_0:1 rate"].value == "does not work"
    assert odd(ethernet=[card(speed="1000")])["ethernet eth0 rate"].value == "1,000 Mb/s"
    older = odd(gpu=gpus(*(gpu_row(i, driver_version="535.54.03") for i in (0, 1))))
    assert older["gpu driver"].status == "error"
    assert older["gpu driver"].limit == "570.124.06 as on a, c"
    assert odd(gpu=gpus(*(gpu_row(i, name="NVIDIA A100") for i in (0, 1))))["gpu kind"]
    assert odd(gpu=gpus(gpu_row(0)))["gpu count"].limit == "2 as on a, c"
    one_less = hardware.NVLINK.format(link="<inactive>")
    assert odd(nvlink={"text": one_less, "problem": None})["nvlink count"].value.startswith("3 ")


def test_an_extra_card_of_one_node_is_nobodys_fault() -> None:
    extra = look(ethernet=[card(), card(name="docker0")])
    found = same.hardware({"a": look(), "b": extra, "c": look()})
    assert not any(wrong(one) for one in found.values())


def versions(**changes: Any) -> dict[str, Any]:
    usual = {"python": "3.11.7", "torch": "2.13.0", "nccl": "2.28.3", "kinema": "0.1.0"}
    one = {"size": 10, "sha256": "a" * 64}
    return usual | {"code": "123abc", "files": {"w.safetensors": one}} | changes


def test_versions_and_weights_are_compared() -> None:
    def odd(**changes: Any) -> dict[str, Check]:
        found = same.software({"a": versions(), "b": versions(**changes), "c": versions()})
        assert wrong(found["a"]) == wrong(found["c"]) == {}
        return wrong(found["b"])

    assert odd() == {}
    for name, label in [("python", "python"), ("nccl", "nccl"), ("code", "kinema code")]:
        assert odd(**{name: "other"})[label].status == "error"
    assert odd(nccl=None)["nccl"].value == "missing"
    other = odd(files={"w.safetensors": {"size": 10, "sha256": "b" * 64}})
    assert other["weights w.safetensors"].cure == "kinema cluster sync weights w.safetensors"
    assert "bbbb" in other["weights w.safetensors"].value
    absent = odd(files={"w.safetensors": {"error": "No such file or directory"}})
    assert absent["weights w.safetensors"].value == "No such file or directory"
    # Of two that differ, the first, which rank 0 runs on, is the measure.
    two = same.software({"a": versions(), "b": versions(torch="2.12.0")})
    assert (wrong(two["a"]), set(wrong(two["b"]))) == ({}, {"torch"})
    nowhere = same.software({"a": versions(torch=None), "b": versions(torch=None)})
    assert wrong(nowhere["b"])["torch"].value == "not installed"


def test_the_clock_that_differs_is_named_whoever_has_it() -> None:
    apart = clocks.against_the_middle(
        {"a": Clock(0.001, 0.002), "b": Clock(3.2, 0.002), "c": Clock(0.0, 0.002)}
    )
    states = {name: node_checks.clock(clock, Limits()).status for name, clock in apart.items()}
    assert states == {"a": "ok", "b": "error", "c": "ok"}
    # This machine's own clock is the wrong one: no node is.
    apart = clocks.against_the_middle({name: Clock(-5.0, 0.001) for name in "abc"})
    assert {node_checks.clock(clock, Limits()).status for clock in apart.values()} == {"ok"}
    # Of two nodes this machine's clock says which one it is.
    apart = clocks.against_the_middle({"a": Clock(0.001, 0.002), "b": Clock(3.2, 0.002)})
    assert node_checks.clock(apart["a"], Limits()).status == "ok"
    # What the measurement cannot tell is not held against a node.
    assert node_checks.clock(Clock(0.2, 0.19), Limits()).status == "ok"
    assert node_checks.clock(Clock(0.2, 0.01), Limits()).status == "warning"


def test_the_fastest_round_trip_tells_the_clock() -> None:
    times = iter([0.0, 1.0, 10.0, 10.1, 20.0, 20.5])  # round trips of 1, 0.1 and 0.5 s
    there = iter([7.9, 15.06, 27.0])  # the clock is 5 s ahead
    clock = clocks.estimate(lambda: next(there), round_trips=3, here=lambda: next(times))
    assert clock.bound_s == pytest.approx(0.05)
    assert clock.offset_s == pytest.approx(5.01)
    assert abs(clock.offset_s - 5.0) <= clock.bound_s


def result(pairs: dict[tuple[int, int], float], *, correct: bool = True) -> dict[str, Any]:
    size = {"bytes": 2**30, "time_s": 1.0, "algorithm_gb_s": 1.0, "bus_gb_s": 2.0}
    return {
        "backend": "nccl",
        "processes": 8,
        "nodes": 4,
        "sizes": [size | {"correct": correct}],
        "pairs": [
            {"nodes": list(nodes), "bus_gb_s": speed, "correct": correct}
            for nodes, speed in pairs.items()
        ],
    }


NAMES = ("a", "b", "c", "d")
NODES = [Node(Host(name), 2) for name in NAMES]
SLOW_C = {(0, 1): 40.0, (2, 3): 20.0, (0, 2): 19.0, (1, 3): 41.0, (0, 3): 39.0, (1, 2): 21.0}


def test_the_slow_node_is_named_and_its_partners_are_not() -> None:
    found = bandwidth.judge(Found(NAMES, result(SLOW_C)), Limits())
    assert set(wrong(check for one in found.values() for check in one)) == {"bandwidth in pairs"}
    (bad,) = [name for name, one in found.items() if worst(one) == "error"]
    assert bad == "c"
    assert "21.00 GB/s with its best partner" in found["c"][0].value
    assert "median" in found["c"][0].limit
    assert not any(
        worst(one) == "error"
        for one in bandwidth.judge(
            Found(NAMES, result(SLOW_C)), Limits(bandwidth_part=0.4)
        ).values()
    )


def test_a_node_is_slow_only_if_it_is_so_twice() -> None:
    fast = dict.fromkeys(SLOW_C, 40.0)
    answers = iter([result(SLOW_C), result(fast)])
    found = bandwidth.examine(NODES, lambda nodes, _: Found(NAMES, next(answers)), Limits())
    assert {worst(one) for one in found.values()} == {"ok"}
    answers = iter([result(SLOW_C), result(SLOW_C)])
    found = bandwidth.examine(NODES, lambda nodes, _: Found(NAMES, next(answers)), Limits())
    assert worst(found["c"]) == "error"


def test_gpus_in_use_are_left_in_peace() -> None:
    assert not gpu_checks.in_use(look())
    assert not gpu_checks.in_use(look(apps=None))
    assert gpu_checks.in_use(look(apps=csv([app_row(7)], gpu.app_names())))


def test_wrong_sums_are_an_error() -> None:
    found = bandwidth.judge(Found(("a",), result({}, correct=False)), Limits())
    assert worst(found[""]) == "error"


@pytest.mark.parametrize("culprit", NAMES)
def test_a_node_that_makes_all_fail_is_found(culprit: str) -> None:
    def measure(nodes: Any, rounds: int) -> Found:
        names = tuple(node.host.name for node in nodes)
        failed = culprit in names
        return Found(names, None if failed else result({}), "no result" if failed else "")

    found = bandwidth.examine(NODES, measure, Limits())
    assert set(found) == {"", culprit}
    assert "fails with" in found[culprit][0].value
    assert worst(found[""]) == "error"


def test_verdicts() -> None:
    warning, error = Check("x", "warning", "v"), Check("y", "error", "v")
    assert worst([]) == "ok"
    assert worst([warning, error]) == "error"
    assert passed(["ok", "warning"], strict=False)
    assert not passed(["ok", "warning"], strict=True)
    assert not passed(["ok", "error"], strict=False)


def test_limits_are_set_by_name() -> None:
    assert Limits().with_given(["skew_error_ms=100"]).skew_error_ms == 100
    with pytest.raises(KinemaError, match="open_files"):
        Limits().with_given(["nothing=1"])
    with pytest.raises(KinemaError, match="has no number"):
        Limits().with_given(["open_files=many"])


def test_a_finding_of_many_nodes_is_said_once() -> None:
    few = Check("open files", "warning", "1,024", "65,536", "raise it")
    nodes = {f"n{number}": [few] for number in range(5)}
    health = Health(nodes, [Check("bandwidth", "ok", "40 GB/s")])
    text = health_report.report(health, verbose=False)
    assert text.count("raise it") == 1
    assert "n0, n1 and 3 more: open files: 1,024" in text
    assert "bandwidth: 40 GB/s" in text
    assert health.as_dict()["verdict"] == "warning"


def test_only_changes_of_status_are_told() -> None:
    well = {("a", "disk"): Check("disk", "ok", "50")}
    full = {("a", "disk"): Check("disk", "error", "1", cure="delete")}
    assert health_report.turns(well, well) == []
    ((key, status, text),) = health_report.turns(well, full)
    assert (key, status) == (("a", "disk"), "error")
    assert text == "a: ok -> error: disk: 1 -> delete"
    assert health_report.turns(full, {})[0][2] == "a: error -> ok: disk: over"
    gone = {("a", "connection"): Check("connection", "error", "refused")}
    merged = health_report.carried(full, gone)
    assert [one[0] for one in health_report.turns(full, merged)] == [("a", "connection")]
