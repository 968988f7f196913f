"""`kinema plan` and `kinema train --find-batch-size` as a person runs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from kinema.cli.main import main
from tests.integration.train_fixtures import write_clips

PLAN = ["plan", "tiny/smoke", "--gpus", "4", "--gpu", "4090"]
LIKE = ["--like", "openvid", "--scale", "0.0002"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), count=12)


def kinema(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Exit code, stdout, stderr; in this process, which spares seconds of imports."""
    monkeypatch.setattr(sys, "argv", ["kinema", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    return int(stopped.value.code or 0), said.out, said.err


def test_a_plan_in_words_and_in_json(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encodes = "task.remember_latents=false"
    code, text, _ = kinema(monkeypatch, capsys, *PLAN, "--manifest", manifest, encodes)
    assert code == 0, text
    said = " ".join(text.split())
    for words in (
        "4 x 4090", "RTX 4090", "efficiency 15%", "16x16 5 frames", "12 of 12 clips", "GPU hours",
        "cores a machine", "a checkpoint has", "recompute full", "latent cache", "originals' rule",
    ):  # fmt: skip
        assert words in said, words
    lines = yaml.safe_load(text[text.index("data:\n") :].replace("!replace", ""))
    assert lines["data"]["buckets"]["16x16"][5][0] == 1.0

    code, text, _ = kinema(
        monkeypatch, capsys, *PLAN, "--manifest", manifest, "--json", "--no-suggest"
    )
    plan = json.loads(text)
    assert code == 0
    assert plan["steps_per_epoch"] == 1  # 12 clips, 4 at once on each of 4 GPUs
    assert plan["published_steps"] == 0  # 3 full micro-batches for 4 GPUs
    assert plan["suggested"] is None
    (length,) = plan["lengths"]
    assert length["fits"]
    assert sum(plan["fixed_bytes"].values()) < length["needed"] < plan["gpu"]["memory"]


def test_options_and_overrides_have_their_effect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [*LIKE, "--json", "--no-suggest"]

    def numbers(*more: object) -> dict[str, float]:
        code, text, said = kinema(monkeypatch, capsys, *PLAN, *quick, "max_steps=null", *more)
        assert code == 0, said
        found = json.loads(text)
        assert isinstance(found, dict)
        return found

    usual = numbers()
    assert usual["plan"]["rows"] == 204  # type: ignore[index]
    twice = numbers("--efficiency", "0.3")
    assert twice["step_seconds"] == pytest.approx(usual["step_seconds"] / 2)
    assert numbers("--epochs", "7")["steps"] == 7 * usual["steps_per_epoch"]
    spread = numbers("--gpus-per-node", "2", "--network", "100")
    sent, before = (n["communication"]["seconds"] for n in (spread, usual))  # type: ignore[index]
    assert sent > 2 * before
    assert spread["decode_cores"] == pytest.approx(usual["decode_cores"] / 2)
    sharded = numbers("parallel={shard: zero2}")
    assert (
        sharded["fixed_bytes"]["optimizer"] < usual["fixed_bytes"]["optimizer"]  # type: ignore[index]
    )


def test_what_does_not_fit_fails_with_a_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    buckets = 'data.buckets=!replace {"720p": {51: [1.0, 4000]}}'
    code, text, _ = kinema(monkeypatch, capsys, *PLAN, *LIKE, buckets, "--no-suggest")
    assert code == 1
    assert "does not fit: 720p 51 frames" in text
    assert "4000 clips" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PLAN, *LIKE, "--gpu", "5090"], "did you mean 4090"),
        (PLAN, "one of --manifest and --like"),
        ([*PLAN, "--like", "imagenet"], "openvid+miradata"),
        ([*PLAN, "--manifest", "gone.csv"], "does not exist"),
        ([*PLAN, "--manifest", "gone.csv", "--scale", "2"], "--scale goes with --like"),
        ([*PLAN, *LIKE, "--eficiency", "0.3"], "--efficiency"),
        (["train", "tiny/smoke", "--memory-limit", "2GB"], "goes with --find-batch-size"),
        (["train", "tiny/smoke", "--for-gpus", "2"], "goes with --find-batch-size"),
        (["train", "tiny/smoke", "--memory-fraction", "0.5"], "goes with --find-batch-size"),
    ],
)
def test_mistakes_get_one_message(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, said = kinema(monkeypatch, capsys, *arguments)
    assert code != 0
    assert message in said


def test_find_batch_size_prints_a_table_and_lines(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data-path", manifest, "--device", "cpu", "--find-batch-size"]
    arguments += ["--memory-limit", "1GB", "--memory-fraction", "0.5"]
    code, text, said = kinema(monkeypatch, capsys, "train", "tiny/smoke", *arguments)
    assert code == 0, said
    assert "16x16 5 frames 16x16" in text
    assert "477 MiB" in text
    largest, equal = text.split("# equal step times")
    for part in (largest[largest.index("data:\n") :], equal):
        found = yaml.safe_load(part.replace("!replace", ""))
        assert found["data"]["buckets"]["16x16"] == {1: [1.0, 4], 5: [1.0, 12]}


def test_ranks_that_a_recipe_does_not_fit_are_refused_before_anything_is_counted(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    three = ["plan", "tiny/smoke", "--gpus", "3", "--manifest", manifest]
    shared = [*three, "parallel.shard=zero2"]
    alone = [*shared, "--gpus-per-node", "1"]
    for command, where in (
        ([*three, "parallel.sequence=2"], "parallel.sequence"),
        ([*shared, "parallel.shard_over=2"], "parallel.shard_over"),
        ([*alone, "parallel.shard_over=node"], "parallel.shard_over"),
    ):
        code, text, said = kinema(monkeypatch, capsys, *command)
        assert code == 1
        assert not text
        assert said.startswith(f"error: {where}: ")


def test_a_plan_is_as_wide_as_the_terminal(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, text, _ = kinema(monkeypatch, capsys, *PLAN, "--manifest", manifest)
    assert code == 0
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "0 MiB" not in text  # a small model has KiB
    assert " 0.0 " not in text


def test_options_that_say_nothing_alone_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "tiny/smoke"]
    code, _, said = kinema(monkeypatch, capsys, *train, "--profile-steps", "3")
    assert (code, "--profile-steps goes with --profile" in said) == (2, True)
    code, _, said = kinema(monkeypatch, capsys, *train, "--profile", "--profile-steps", "0")
    assert (code, "profile-steps" in said) == (2, True)
    code, _, said = kinema(monkeypatch, capsys, *train, "--profile")
    assert (code, "and the run ends after 4" in said) == (1, True)
    code, _, said = kinema(monkeypatch, capsys, *train, "--profile", "--find-batch-size")
    assert (code, "there is nothing to profile" in said) == (2, True)


def test_where_not_one_clip_fits_nothing_is_suggested(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = ["train", "tiny/smoke", "--data-path", manifest, "--find-batch-size"]
    code, text, _ = kinema(monkeypatch, capsys, *find, "--device", "cpu", "--memory-limit", "1KB")
    assert code == 1
    assert "not one clip of 16x16 5 frames" in text
    assert "buckets:" not in text


def test_ranks_but_the_first_name_themselves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, begin in (("0", "error: "), ("3", "error on rank 3: ")):
        monkeypatch.setenv("RANK", rank)
        code, _, said = kinema(monkeypatch, capsys, "plan", "tiny/smok", "--like", "openvid")
        assert code
        assert said.startswith(begin)
