"""Run folders and checkpoints: numbering, atomic writing, checking, pruning."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinema.checkpoint.errors import CheckpointError, WeightsError
from kinema.checkpoint.run import (
    Checkpoint,
    clean_leftovers,
    latest,
    new_run_folder,
    prune,
    resolve_weights,
    save_checkpoint,
)
from kinema.checkpoint.weights import load_weights


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(4, 3, generator=generator),
        "bias": torch.randn(4, generator=generator),
    }


def optimizer(seed: int) -> dict[str, Tensor]:
    return {"weight.exp_avg": tensors(seed)["weight"], "weight.step": torch.tensor(float(seed))}


def save(run: Path, step: int, epoch: int = 0, **changes: Any) -> Checkpoint:
    given: dict[str, Any] = {
        "model": tensors(step),
        "ema": tensors(step + 1000),
        "optimizer": optimizer(step),
        "state": {"position": [step, None], "fingerprint": "f"},
        "components": {"model": {"type": "linear"}},
        "recipe": "name: test\n",
    }
    return save_checkpoint(run, epoch, step, **(given | changes))


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def test_run_folders_are_numbered(tmp_path: Path) -> None:
    outputs = tmp_path / "deep" / "outputs"
    names = [new_run_folder(outputs, n).name for n in ("STDiT3-XL/2", "a b", "a b")]
    assert names == ["000-STDiT3-XL-2", "001-a-b", "002-a-b"]
    (outputs / "007-by-hand").mkdir()
    (outputs / "notes.txt").touch()
    assert new_run_folder(outputs, "x").name == "008-x"
    assert not [n for n in os.listdir(outputs) if n.startswith(".")]


def _make_runs(outputs: Path, name: str) -> None:
    for _ in range(20):
        new_run_folder(outputs, name)


def test_run_numbers_are_unique_when_several_start_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_make_runs, args=(tmp_path, f"m{i}")) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    numbers = [name.split("-")[0] for name in os.listdir(tmp_path)]
    assert [w.exitcode for w in workers] == [0, 0, 0, 0]
    assert len(numbers) == len(set(numbers)) == 80


def test_everything_comes_back(tmp_path: Path) -> None:
    saved = save(tmp_path, 20, epoch=1)
    assert saved.path == tmp_path / "epoch1-global_step20"
    assert sorted(os.listdir(saved.path)) == [
        "components.json", "ema.safetensors", "model.safetensors", "optimizer", "recipe.yaml",
        "state.json",
    ]  # fmt: skip
    checkpoint = Checkpoint.open(saved.path)
    checkpoint.verify(hashes=True)
    assert (checkpoint.epoch, checkpoint.step) == (1, 20)
    assert checkpoint.state == {"position": [20, None], "fingerprint": "f"}
    assert checkpoint.components == {"model": {"type": "linear"}}
    assert checkpoint.versions["torch"] == torch.__version__
    module = nn.Linear(3, 4)
    assert str(checkpoint.load_model(module)).endswith(
        "loaded 2 tensors (16 numbers), new 0, unexpected 0"
    )
    assert torch.equal(module.weight, tensors(20)["weight"])
    checkpoint.load_model(module, "ema")
    assert torch.equal(module.bias, tensors(1020)["bias"])
    into = {name: torch.zeros_like(t) for name, t in optimizer(0).items()}
    checkpoint.load_optimizer(into)
    assert all(torch.equal(into[n], t) for n, t in optimizer(20).items())


def test_sections_are_optional(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1, ema=None, optimizer=None, recipe=None)
    assert checkpoint.has("model")
    assert not checkpoint.has("ema")
    for attempt in (
        lambda: checkpoint.load_model(nn.Linear(3, 4), "ema"),
        lambda: checkpoint.load_optimizer({}),
        lambda: Checkpoint.open(checkpoint.path, sections=("ema",)),
        lambda: Checkpoint.open(tmp_path, sections=("optimizer",)),
    ):
        with pytest.raises(CheckpointError, match=r"without the (ema|optimizer) section"):
            attempt()


def test_hash_stands_for_the_tensors(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", 3), save(tmp_path / "b", 3)
    assert first.section_hash("model") == second.section_hash("model")
    assert first.section_hash("model") != first.section_hash("ema")
    assert len(first.section_hash("optimizer")) == 64


def test_a_run_gives_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    for epoch, step in ((0, 9), (0, 10), (1, 100)):
        save(tmp_path, step, epoch)
    opened = Checkpoint.open(tmp_path)
    assert (opened.step, opened.warnings) == (100, ())
    damage(tmp_path / "epoch1-global_step100" / "model.safetensors")
    (tmp_path / "epoch0-global_step10" / "state.json").unlink()
    opened = Checkpoint.open(tmp_path)
    assert opened.step == 9
    assert len(opened.warnings) == 2
    assert "epoch1-global_step100" in opened.warnings[0]
    assert "bytes" in opened.warnings[0]
    assert "state.json is missing" in opened.warnings[1]
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 9
    damage(tmp_path / "epoch0-global_step9" / "state.json")
    assert latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="none of its 3 checkpoints is whole"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "file",
    ["model.safetensors", "ema.safetensors", "optimizer/__0_0.distcp", "optimizer/.metadata",
     "components.json", "recipe.yaml", "state.json"],
)  # fmt: skip
@pytest.mark.parametrize("how", ["cut", "missing"])
def test_half_copied_checkpoints_are_told(file: str, how: str, tmp_path: Path) -> None:
    path = save(tmp_path, 5).path
    if how == "cut":
        damage(path / file)
    else:
        (path / file).unlink()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert str(path) in str(caught.value)
    assert "not" in str(caught.value)
    assert "whole" in str(caught.value)


def test_what_cannot_be_read_is_passed_over_too(tmp_path: Path) -> None:
    whole, no_state, no_folder = (save(tmp_path, step) for step in (1, 2, 3))
    (no_state.path / "state.json").unlink()
    (no_state.path / "state.json").mkdir()
    shutil.rmtree(no_folder.path / "optimizer")
    (no_folder.path / "optimizer").touch()
    found = Checkpoint.open(tmp_path)
    assert found.step == whole.step
    assert len(found.warnings) == 2
    assert "cannot be read (Not a directory)" in found.warnings[0]
    assert "cannot be read: Is a directory" in found.warnings[1]


def test_wrong_content_of_the_right_size_needs_hashes(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 5)
    file = checkpoint.path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    checkpoint.verify()
    checkpoint.verify(sections=("ema",), hashes=True)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has other content"):
        checkpoint.verify(hashes=True)


def test_a_copy_without_the_optimizer_generates(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 5).path
    copy = tmp_path / "copy"
    shutil.copytree(path, copy, ignore=shutil.ignore_patterns("optimizer"))
    module = nn.Linear(3, 4)
    Checkpoint.open(copy, sections=("model",)).load_model(module)
    assert torch.equal(module.weight, tensors(5)["weight"])
    with pytest.raises(CheckpointError, match=r"optimizer.*missing(.|\n)*can generate"):
        Checkpoint.open(copy)


def test_what_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    for path, message in (
        (tmp_path / "none", "no such folder"),
        (file, "is a file"),
        (tmp_path, "neither a checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(path)
    state = save(tmp_path, 1).path / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": "kinema-checkpoint-9"}))
    with pytest.raises(CheckpointError, match="this version reads 'kinema-checkpoint-1'"):
        Checkpoint.open(state.parent)


def test_another_models_checkpoint(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    with pytest.raises(WeightsError, match="do not fit Conv1d"):
        checkpoint.load_model(nn.Conv1d(3, 4, 1))


def test_optimizer_must_fit(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    into = {"weight.exp_avg": torch.zeros(3, 4), "other": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="3 differences") as caught:
        checkpoint.load_optimizer(into)
    assert "other is missing" in str(caught.value)
    assert "weight.step is unknown" in str(caught.value)
    assert "[4, 3] in the checkpoint, [3, 4] here" in str(caught.value)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch evil-ran",)


def test_optimizer_cannot_run_code(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = save(tmp_path, 1)
    (checkpoint.path / "optimizer" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="system, which does not belong there"):
        checkpoint.load_optimizer(optimizer(1))
    assert not (tmp_path / "evil-ran").exists()


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 5, state={"second": True})
    assert Checkpoint.open(tmp_path).state == {"second": True}
    assert os.listdir(tmp_path) == ["epoch0-global_step5"]


def test_leftovers_of_killed_saves(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 6)
    shutil.copytree(tmp_path / "epoch0-global_step5", tmp_path / ".saving-epoch0-global_step7")
    shutil.copytree(tmp_path / "epoch0-global_step5", tmp_path / ".deleting-epoch0-global_step3")
    (tmp_path / "epoch0-global_step6").rename(tmp_path / ".replaced-epoch0-global_step6")
    opened = Checkpoint.open(tmp_path)  # a reader finds it and changes nothing
    assert opened.step == 6
    assert len(os.listdir(tmp_path)) == 4
    lines = clean_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["epoch0-global_step5", "epoch0-global_step6"]
    assert len(lines) == 3
    assert clean_leftovers(tmp_path / "not-yet") == []


def test_an_error_while_saving_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path, 5)

    class Unreadable(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            raise RuntimeError("the device is lost")

    with pytest.raises(RuntimeError, match="device is lost"):
        save(tmp_path, 6, ema=Unreadable(tensors(1)))
    assert os.listdir(tmp_path) == ["epoch0-global_step5"]


def test_prune_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    damage(tmp_path / "epoch0-global_step4" / "ema.safetensors")
    assert prune(tmp_path, keep=2) == [tmp_path / "epoch0-global_step1"]
    assert sorted(os.listdir(tmp_path)) == [f"epoch0-global_step{n}" for n in (2, 3, 4)]
    assert prune(tmp_path, keep=5) == []


def test_resolve_weights(tmp_path: Path) -> None:
    path = save(tmp_path, 1).path
    assert resolve_weights(tmp_path) == path
    assert resolve_weights(path, "ema") == path
    file = path / "ema.safetensors"
    assert resolve_weights(file) == file
    module = nn.Linear(3, 4)
    load_weights(module, resolve_weights(tmp_path, "ema"), section="ema")
    assert torch.equal(module.weight, tensors(1001)["weight"])
