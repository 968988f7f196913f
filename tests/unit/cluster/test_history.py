"""A node against its own past: one word for each change, none for noise."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from kinema.cluster.clocks import Clock
from kinema.cluster.health import Health
from kinema.cluster.history import CONFIRM, ENOUGH, QUIET, Change, History
from kinema.cluster.readings import KINDS, readings, summary
from kinema.cluster.rounds import Rounds
from tests.unit.cluster import hardware
from tests.unit.cluster.hardware import gpu_row
from tests.unit.cluster.test_health import gpus, look

POWER, HEAT, CLOCK = "gpu0/power_w", "gpu0/temperature_c", "gpu0/sm_mhz"
RATE, ERRORS = "infiniband/mlx5_0:1/rate_gbit_s", "infiniband/mlx5_0:1/errors"


def feed(history: History, name: str, values: list[float]) -> list[list[Change]]:
    return [history.add("n", {name: value}, "ok") for value in values]


def steady(middle: float, scatter: float, count: int) -> list[float]:
    draw = random.Random(0)
    return [middle + draw.uniform(-scatter, scatter) for _ in range(count)]


def test_noise_is_no_news() -> None:
    assert not any(feed(History(None), POWER, steady(650, 30, 200)))
    assert not any(feed(History(None), HEAT, steady(65, 4, 200)))


def test_a_small_change_of_something_steady_is_no_news() -> None:
    assert not any(feed(History(None), POWER, [650.0] * 20 + [600.0] * 5))
    assert not any(feed(History(None), HEAT, [65.0] * 20 + [70.0] * 5))


def test_a_drop_is_told_once_and_so_is_its_end() -> None:
    history = History(None)
    feed(history, POWER, steady(650, 10, 30))
    told = [change for one in feed(history, POWER, [300.0] * 50) for change in one]
    assert len(told) == 1
    assert told[0].state == "worse"
    assert "power fell to 300 W from its usual 65" in told[0].text
    assert str(told[0]).startswith("n: gpu0: power fell")
    back = [change for one in feed(history, POWER, [650.0] * 50) for change in one]
    assert [change.state for change in back] == ["better"]


def test_one_odd_reading_is_no_change() -> None:
    assert CONFIRM == 2
    history = History(None)
    assert not any(feed(history, POWER, [650.0] * 20 + [100.0] + [650.0] * 20))


def test_levels_are_worse_on_one_side_only() -> None:
    assert not any(feed(History(None), POWER, [300.0] * 20 + [650.0] * 5))
    history = History(None)
    assert not any(feed(history, HEAT, [70.0] * 20 + [40.0] * 5))
    (told,) = [c for one in feed(history, HEAT, [70.0] * 20 + [95.0] * 5) for c in one]
    assert "temperature rose to 95 °C" in told.text


def test_a_level_needs_a_past() -> None:
    history = History(None)
    assert not any(feed(history, POWER, [650.0] * (ENOUGH - 1) + [100.0] * CONFIRM))


def test_a_link_that_gets_slower_is_told_at_once() -> None:
    history = History(None)
    told = [c for one in feed(history, RATE, [400, 200, 200, 200, 400]) for c in one]
    assert [(c.state, c.text) for c in told] == [
        ("worse", "link rate fell to 200 Gb/s from 400 Gb/s"),
        ("better", "link rate is back at 400 Gb/s"),
    ]


def test_a_slow_link_does_not_become_usual() -> None:
    history = History(None)
    feed(history, RATE, [400, *[200.0] * 500])
    (told,) = [c for one in feed(history, RATE, [200, 400]) for c in one]
    assert told.state == "better"


def test_counts_that_grow() -> None:
    history = History(None)
    told = [c for one in feed(history, ERRORS, [5, 5, 6, 7, 8, *[8] * QUIET, 8, 9]) for c in one]
    assert [c.text for c in told] == [
        "errors grow: 6, before 5",
        "errors stand still at 8",
        "errors grow: 9, before 8",
    ]
    assert not any(feed(history, ERRORS, [0, 0]))  # the node was restarted


def test_what_is_not_reported_any_more_is_news() -> None:
    history = History(None)
    history.add("n", {RATE: 400, CLOCK: 1700}, "ok")
    (told,) = history.add("n", {}, "ok")  # an idle GPU's clock is no reading
    assert told.text == "link rate is not reported any more"
    assert history.add("n", {}, "ok") == []
    (back,) = history.add("n", {RATE: 400}, "ok")
    assert back.state == "better"


def test_the_past_is_kept_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "history.jsonl"
    feed(History(path), RATE, [400, 400])
    with path.open("a") as file:
        file.write('{"node": "n", "readings": {"x/unknown_unit": 1}}\nnot json\n{"torn": ')
        file.write("\n")
    (told,) = History(path).add("n", {RATE: 100}, "warning")
    assert "from 400 Gb/s" in told.text
    last = json.loads(path.read_text().splitlines()[-1])
    assert last["readings"] == {RATE: 100}
    assert (last["node"], last["verdict"]) == ("n", "warning")


def test_a_full_disk_ends_the_file_and_not_the_watch(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    (tmp_path / "history.jsonl").symlink_to("/dev/full")
    (said,) = history.add("n1", {"gpu0/power_w": 600.0}, "ok")
    assert (
        str(said)
        == f"here: {tmp_path}/history.jsonl: the history ends here: No space left on device"
    )
    assert history.add("n1", {"gpu0/power_w": 600.0}, "ok") == []
    (gone,) = history.add("n1", {}, "ok")
    assert "power is not reported any more" in str(gone)


def test_a_full_run_folder_is_said_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    found, lines = Health({"n1": []}), list[str]()
    nobody: Any = None
    Rounds(nobody, found, found, tmp_path / "h.jsonl", tmp_path, tell=lines.append)._say("x")
    full = f"{tmp_path}: no more of this in its events: No space left on device"
    assert lines[0] == full
    assert lines[1].endswith("  x")
    assert len(lines) == 2


def test_readings_of_a_node() -> None:
    busy, idle = gpu_row(0), gpu_row(1, utilization__gpu=0, power__draw="[N/A]")
    found = readings(
        look(
            gpu=gpus(busy, idle),
            kernel_log={"text": hardware.XID_79, "problem": None},
        ),
        Clock(-0.030, 0.010),
    )
    assert found[POWER] == 652.31
    assert "gpu1/power_w" not in found
    assert found["gpu1/temperature_c"] == 64
    assert found[CLOCK] == 1755
    assert "gpu1/sm_mhz" not in found
    assert found["gpu0/nvlink_gb_s"] == 53.124
    assert found[RATE] == 400
    assert found["ethernet/eth0/speed_mbit_s"] == 25000
    assert found["xid/errors"] == 1
    assert abs(found["skew_ms"] - 20) < 0.01
    assert all(name.rpartition("/")[2] in KINDS for name in found)
    short = summary(found)
    assert short["power_w"] == 652.3
    assert short["rate_gbit_s"] == 400
