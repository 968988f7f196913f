"""`kinema data plan`, `order` and `explain`, through the command line where a person meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from kinema.cli.main import app
from kinema.config.errors import ConfigError, KinemaError
from kinema.data.buckets import BucketTable
from kinema.data.manifest import Manifest
from kinema.data.order import NoMicroBatchesError, SampleOrder
from kinema.data.plan import make_plan, quantity, render_plan
from tests.unit.data.clip_tables import generated, order_of, stage

RECIPE = "opensora-1.2/stage2"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "clips.parquet"
    generated(600).with_dropped({5: "blur", 6: "blur", 7: "text"}).write(path)
    return path


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["data", *words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def lines(*words: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run("order", *words).splitlines()]


def only_bucket(folder: Path, resolution: str) -> str:
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"base: {RECIPE}\ndata:\n  buckets: !replace\n    {resolution}: {{1: [1.0, 1]}}\n"
    )
    return str(recipe)


def test_plan_accounts_for_every_row(clips: Path) -> None:
    plan = json.loads(run("plan", str(clips), RECIPE, "--world-size", "4", "--json"))
    assert plan["rows"] == 600
    assert plan["dropped"]["dropped by blur"] == 2
    assert plan["dropped"]["dropped by text"] == 1
    assert plan["samples"] + sum(plan["dropped"].values()) == 600
    assert sum(b["samples"] for b in plan["buckets"]) == plan["samples"]
    assert sum(b["micro_batches"] for b in plan["buckets"]) == plan["micro_batches"]
    assert sum(b["tokens"] for b in plan["buckets"]) == plan["tokens"]
    assert sum(b["flops"] for b in plan["buckets"]) == pytest.approx(plan["flops_per_epoch"])
    assert plan["steps_per_epoch"] * 4 == plan["micro_batches"]
    for b in plan["buckets"]:
        assert b["micro_batches"] >= b["samples"] / b["max_batch"]


def test_order_prints_what_the_plan_counts(clips: Path) -> None:
    plan = json.loads(run("plan", str(clips), RECIPE, "--world-size", "4", "--json"))
    printed = lines(str(clips), RECIPE, "--world-size", "4", "--epoch", "0")
    assert list(printed[0]) == [
        "step", "rank", "num_frames", "height", "width", "rows", "cost",
    ]  # fmt: skip
    assert [(p["step"], p["rank"]) for p in printed] == [
        (s, r) for s in range(plan["steps_per_epoch"]) for r in range(4)
    ]
    rows = [row for p in printed for row in p["rows"]]
    assert len(rows) == len(set(rows)) == plan["samples"]
    assert sum(p["cost"] for p in printed) == pytest.approx(plan["flops_per_epoch"])
    cost = np.array([p["cost"] for p in printed]).reshape(-1, 4)
    assert (cost.mean(axis=1) / cost.max(axis=1)).mean() == pytest.approx(plan["step_balance"])


def test_order_of_some_steps_and_of_another_epoch(clips: Path) -> None:
    whole = lines(str(clips), RECIPE, "--world-size", "2")
    assert lines(str(clips), RECIPE, "--world-size", "2", "--steps", "3:5") == whole[6:10]
    assert lines(str(clips), RECIPE, "--world-size", "2", "--steps", "3:") == whole[6:]
    assert lines(str(clips), RECIPE, "--world-size", "2", "--epoch", "1") != whole
    for steps in ("5", "a:b", "4:4", "-1:2", "99999:"):
        with pytest.raises(ConfigError, match="the epoch has steps"):
            run("order", str(clips), RECIPE, "--steps", steps)


def test_order_with_accumulation_tells_micro_batches_apart(clips: Path) -> None:
    printed = lines(
        str(clips), RECIPE, "accumulation=2", "--world-size", "3", "--steps", ":2", "--seed=7"
    )
    assert [(p["step"], p["rank"], p["micro"]) for p in printed] == [
        (s, r, m) for s in range(2) for r in range(3) for m in range(2)
    ]


def test_plan_for_a_person(clips: Path) -> None:
    text = run("plan", str(clips), RECIPE, "--world-size", "4")
    assert "left out: 2 dropped by blur" in text
    assert "step balance 0.9" in text
    assert "FLOPs per epoch" in text
    assert any(line.split()[:2] == ["480p", "204"] for line in text.splitlines())


def test_plan_counts_clips_without_a_caption() -> None:
    clips = generated(20)
    texts = ["", "  ", *["a cat"] * 18]
    blank = Manifest.from_columns(
        {name: clips.table.column(name) for name in clips.table.column_names} | {"text": texts}, "."
    ).with_dropped({0: "no_caption"})
    order = order_of(blank, 3, 2)
    said = "1 clip without a caption: text-to-video training refuses them"
    assert said in make_plan(blank, order, tokens=lambda b: 1).notes
    assert said not in make_plan(blank, order).notes


def test_a_mistyped_option_is_told_the_right_one(clips: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'world_size'[^$]*try: --world-size"):
        run("plan", str(clips), RECIPE, "--world_size", "8")
    with pytest.raises(ConfigError, match="did you mean 'accumulation'"):
        run("plan", str(clips), RECIPE, "--acumulation", "8")


def test_a_set_too_small_for_one_step_repeats_and_says_so() -> None:
    order = order_of(generated(5), 3, 16)
    plan = make_plan(generated(5), order)
    assert plan.steps_per_epoch == 1
    assert plan.repeated_micro_batches == 11
    assert "11 of 16 micro-batches repeat others" in render_plan(plan)
    assert plan.tokens is None
    assert sum(b.flops for b in plan.buckets) == pytest.approx(plan.flops_per_epoch)


def test_micro_batches_split_over_the_ranks_are_told() -> None:
    table, cost = stage(1)
    clips = Manifest.from_columns(
        {
            "path": [f"{i}.png" for i in range(40)], "text": ["x"] * 40, "num_frames": [1] * 40,
            "height": [144] * 40, "width": [256] * 40, "fps": [None] * 40,
        },
        ".",
    )  # fmt: skip
    plan = make_plan(clips, SampleOrder(clips, table, cost, seed=0, world_size=8))
    assert [b.micro_batches for b in plan.buckets] == [8]
    assert plan.repeated_micro_batches == 0
    assert "less than one step: 1 full micro-batch for 8 ranks" in render_plan(plan)


def test_nothing_to_train_on_is_an_error(clips: Path, tmp_path: Path) -> None:
    huge = only_bucket(tmp_path, "9000x9000")
    with pytest.raises(NoMicroBatchesError, match=r"597 too small.*3 dropped"):
        run("plan", str(clips), huge)


def test_buckets_without_clips_are_named() -> None:
    table = BucketTable({"144p": {51: (1.0, 4), 5000: (1.0, 1)}})
    clips = generated(50, images=0)
    order = SampleOrder(clips, table, lambda b: 1.0, seed=0, world_size=2)
    assert "without a clip: 144p 5000 frames" in render_plan(make_plan(clips, order))


def test_explain_a_row_by_number_and_by_path(clips: Path) -> None:
    by_row = run("explain", "5", RECIPE, "--manifest", str(clips))
    assert by_row == run("explain", "5.mp4", RECIPE, "--manifest", str(clips))
    assert "dropped_by = blur" in by_row
    assert "left out of an epoch" in by_row
    for name in ("600", "no.mp4"):
        with pytest.raises(KinemaError, match="no clip"):
            run("explain", name, RECIPE, "--manifest", str(clips))


def test_explain_a_file(tmp_path: Path) -> None:
    from kinema.media.write import write_image

    picture = tmp_path / "picture.png"
    write_image(picture, np.zeros((144, 256, 3), dtype=np.uint8))
    text = run("explain", str(picture), RECIPE)
    assert "image, 256x144" in text
    assert "100.00%  144p image 256x144" in text
    text = run("explain", str(picture), only_bucket(tmp_path, "1080p"))
    assert "nowhere: it is too small" in text


def test_quantity_reads_well() -> None:
    assert [quantity(n) for n in (0, 999, 1000, 1234567, 3.2e18)] == [
        "0 ", "999 ", "1 k", "1.23 M", "3.2 E",
    ]  # fmt: skip


def test_commands_are_registered() -> None:
    group = typer.main.get_command(app).commands["data"]  # type: ignore[attr-defined]
    assert {"explain", "plan", "order"} <= set(group.commands)
