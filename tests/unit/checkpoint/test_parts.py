"""What many ranks write of one checkpoint: shares, parts, and what makes them valid."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kinema.checkpoint import parts
from kinema.checkpoint.disk import FileRecord
from kinema.checkpoint.errors import CheckpointError, WeightsError
from kinema.checkpoint.optimizer import OptimizerShare, read_optimizer, write_contents
from kinema.checkpoint.parts import AbandonedError, Content, SavePlan, complete, write_part
from kinema.checkpoint.run import Checkpoint, begin, plan_save
from kinema.checkpoint.shards import fill_tensors
from kinema.checkpoint.shares import index_of, share_out
from kinema.checkpoint.source import TensorSource
from kinema.checkpoint.weights import save_weights


def state(count: int = 8, rows: int = 100) -> dict[str, Tensor]:
    return {f"w{i}": torch.full((rows, 5), float(i)) for i in range(count)}


BYTES = 8 * 100 * 5 * 4


@pytest.mark.parametrize(
    ("ranks", "small", "most", "names", "writers"),
    [
        (1, 100, BYTES, 1, [0, 0]),  # alone: one file whatever its size
        (8, BYTES, BYTES, 1, [0, 4]),  # small: one file, the average on another rank
        (8, BYTES // 2, BYTES, 2, [0, 2, 4, 6]),  # as far from each other as can be
        (2, 1, BYTES, 2, [0, 0, 1, 1]),  # not more files than ranks ...
        (2, 1, BYTES // 4, 4, [0, 0, 0, 0, 1, 1, 1, 1]),  # ... unless they would be too large
    ],
)
def test_who_writes_which_weights(
    ranks: int, small: int, most: int, names: int, writers: list[int]
) -> None:
    sections = {"model": state(), "ema": state()}
    files = share_out(sections, ranks, small=small, most=most)
    assert [file.rank for file in files] == writers
    of_model = [file for file in files if file.section == "model"]
    assert len(of_model) == names
    assert [n for file in of_model for n in file.sizes] == list(state()), "in their order, once"
    assert len({sum(file.sizes.values()) for file in of_model}) == 1, "equal sizes"
    if names == 1:
        assert of_model[0].name == "model.safetensors"
    else:
        assert of_model[-1].name == f"model-0000{names}-of-0000{names}.safetensors"
        index = json.loads(index_of(of_model))
        assert index["weight_map"]["w7"] == of_model[-1].name
        assert index["metadata"]["total_size"] == BYTES


def test_a_tensor_larger_than_a_file_should_be_has_one_of_its_own() -> None:
    sections = {"model": {"a": torch.zeros(1), "large": torch.zeros(10_000), "b": torch.zeros(1)}}
    files = share_out(sections, 4, small=1000, most=10**6)
    assert sorted(n for file in files for n in file.sizes) == ["a", "b", "large"]
    assert all(file.sizes for file in files)
    assert len({file.name for file in files}) == len(files)


def test_ranks_that_hold_the_same_moments_write_each_once(tmp_path: Path) -> None:
    tensors = state(9) | {f"w{i}.step": torch.tensor(float(i)) for i in range(9)}
    shares = [OptimizerShare(tensors, rank, 4) for rank in range(4)]
    assert sorted(n for share in shares for n in share.tensors) == sorted(tensors)
    sizes = [sum(t.nbytes for t in share.tensors.values()) for share in shares]
    assert max(sizes) - min(sizes) <= 100 * 5 * 4 + 16
    chunks = []
    for rank, share in enumerate(shares):
        # What was put aside is written, not what the tensors are by then.
        aside = {name: t + 1 for name, t in share.tensors.items()}
        written = share.write(tmp_path, aside)
        assert {c.file for c in written} == {f"__{rank}_0.distcp"}
        chunks += written
    write_contents(tmp_path, chunks)
    into = {name: torch.zeros_like(t) for name, t in tensors.items()}
    read_optimizer(tmp_path, into)
    assert all(torch.equal(into[name], t + 1) for name, t in tensors.items())


def test_a_rank_with_nothing_to_write_writes_no_file(tmp_path: Path) -> None:
    share = OptimizerShare({"w": torch.zeros(3)}, 1, 2)
    assert share.write(tmp_path / "optimizer", {}) == []
    assert not (tmp_path / "optimizer").exists()


def plan_for(run: Path, ranks: int = 2) -> tuple[SavePlan, dict[str, dict[str, Tensor]]]:
    weights = {"model": state(), "ema": state()}
    plan = plan_save(run, 0, 7, weights, state(), ranks=ranks)
    begin(plan)
    return plan, weights


def write(plan: SavePlan, rank: int, weights: dict[str, dict[str, Tensor]]) -> None:
    share = OptimizerShare(state(), rank, plan.ranks)
    write_part(plan, rank, weights, share, share.tensors)


def test_rank_0_waits_for_all_parts_and_leaves_no_trace_of_them(tmp_path: Path) -> None:
    plan, weights = plan_for(tmp_path)
    assert plan.needs == 3 * BYTES
    write(plan, 0, weights)
    done: list[Checkpoint] = []
    thread = threading.Thread(target=lambda: done.append(complete(plan, Content({"a": 1}, {}))))
    thread.start()
    thread.join(0.2)
    assert not done
    assert not plan.final.exists()
    write(plan, 1, weights)
    thread.join()
    (checkpoint,) = done
    assert checkpoint.state == {"a": 1}
    assert os.listdir(tmp_path) == [plan.final.name]
    assert sorted(os.listdir(plan.final)) == [
        "components.json", "ema.safetensors", "model.safetensors", "optimizer", "state.json",
    ]  # fmt: skip
    ranks = {name: r.rank for files in checkpoint.files.values() for name, r in files.items()}
    assert ranks["ema.safetensors"] == ranks["optimizer/__1_0.distcp"] == 1
    assert ranks["model.safetensors"] == ranks["optimizer/.metadata"] == 0


def test_rank_0_stops_waiting_when_told(tmp_path: Path) -> None:
    plan, weights = plan_for(tmp_path)
    write(plan, 0, weights)
    answers = iter([False, False, True])
    with pytest.raises(AbandonedError):
        complete(plan, Content({}, {}), abandoned=lambda: next(answers))
    assert not plan.final.exists()


def test_what_rank_0_sees_otherwise_than_it_was_written_is_no_checkpoint(tmp_path: Path) -> None:
    plan, weights = plan_for(tmp_path)
    for rank in range(2):
        write(plan, rank, weights)
    file = plan.folder / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"ema\.safetensors has .* \(written by rank 1\)"):
        complete(plan, Content({}, {}))
    assert not plan.final.exists()


def test_the_old_checkpoint_of_a_name_stays_until_the_new_one_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "epoch0-global_step1", tmp_path / ".saving-epoch0-global_step1"
    for folder in (old, new):
        folder.mkdir()
        (folder / "which").write_text(folder.name)
    honest = os.rename

    def refuse(source: Path, target: Path) -> None:
        if source == new:
            raise OSError(28, "No space left on device")
        honest(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(OSError, match="No space"):
            parts.put_in_place(new, old)
    assert (old / "which").read_text() == old.name
    parts.put_in_place(new, old)
    assert (old / "which").read_text() == new.name
    assert os.listdir(tmp_path) == [old.name]


def test_a_folder_that_only_one_machine_sees_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_save(tmp_path / "elsewhere", 0, 1, {"model": state()}, None, ranks=2)
    monkeypatch.setattr(parts, "VISIBLE_WITHIN_S", 0.2)
    with pytest.raises(CheckpointError, match=r"rank 1 on .* does not see the folder") as caught:
        write_part(plan, 1, {}, None, {})
    assert "all machines share" in str(caught.value)


def test_an_error_of_the_file_system_names_rank_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, weights = plan_for(tmp_path)

    def refuse(path: Path, *_: Any) -> FileRecord:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(parts, "write_safetensors", refuse)
    with pytest.raises(CheckpointError) as caught:
        write(plan, 1, weights)
    assert caught.value.what.startswith("rank 1: could not be written: Permission denied")
    assert str(caught.value.where).endswith("ema.safetensors")


def test_records_of_before_ranks_were_noted_are_of_rank_0() -> None:
    assert FileRecord(**json.loads('{"size": 1, "sha256": "x"}')).rank == 0


def test_another_models_tensors_are_refused_untouched(tmp_path: Path) -> None:
    save_weights(tmp_path / "model.safetensors", {"a": torch.ones(2), "b": torch.ones(3)})
    into = {"a": torch.zeros(4), "c": torch.zeros(3)}
    with (
        TensorSource(tmp_path) as tensors,
        pytest.raises(WeightsError, match="1 tensors missing, 1 unexpected, 1 of another shape"),
    ):
        fill_tensors(into, tensors, whose="this average")
    assert not into["c"].any()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_rows_are_read_alone(tmp_path: Path, suffix: str) -> None:
    value = torch.arange(24.0).reshape(4, 3, 2)
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({"a": torch.ones(3), "w": value}, path)
    else:
        save_weights(path, {"a": torch.ones(3), "w": value})
    with TensorSource(path) as tensors:
        assert torch.equal(tensors.read_rows("w", 1, 3), value[1:3])
        assert torch.equal(tensors.read_rows("w", 4, 4), value[:0])
        assert torch.equal(tensors.read("w"), value)
