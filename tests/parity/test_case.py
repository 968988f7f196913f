"""The harness itself: what it refuses, and that it notices what is wrong or left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.parity.adapters.diffusion import Stub
from tests.parity.case import Case, GoldenError, load_cases, only_holds_inputs

ENTRY = {
    "name": "a",
    "file": "a.safetensors",
    "kind": "safetensors",
    "official": "something",
    "tolerance": {"abs": 0.0, "rel_of_max": 0.01},
}


def write(folder: Path, entries: Any, **tensors: torch.Tensor) -> Path:
    (folder / "manifest.json").write_text(json.dumps({"cases": entries}))
    save_file({name.replace("_", "."): t for name, t in tensors.items()}, folder / "a.safetensors")
    return folder


def one(folder: Path, **tensors: torch.Tensor) -> Case:
    return load_cases(write(folder, [ENTRY], **tensors))[0]


def test_folders_without_cases_say_why(tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match=r"nowhere.manifest\.json cannot be read"):
        load_cases(tmp_path / "nowhere")
    for content in ("", "[]", '{"cases": 3}', '{"cases": ["a"]}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(GoldenError, match="is no manifest of golden cases"):
            load_cases(tmp_path)
    for entries, message in (
        ([], "lists no cases"),
        ([ENTRY, ENTRY], "the same name"),
        ([{k: v for k, v in ENTRY.items() if k != "kind"}], "a has no kind"),
    ):
        with pytest.raises(GoldenError, match=message):
            load_cases(write(tmp_path, entries))


def test_what_is_off_fails(tmp_path: Path) -> None:
    want = torch.tensor([1.0, -10.0, float("nan")])
    case = one(tmp_path, out_x=want)
    case.check("out.x", want + 0.09)  # 1 % of 10
    for got in (want + 0.11, want[:2], torch.nan_to_num(want), want / 0):
        with pytest.raises(AssertionError, match=r"out\.x"):
            case.check("out.x", got)


def test_what_nothing_compared_is_known(tmp_path: Path) -> None:
    case = one(tmp_path, in_x=torch.ones(2), out_x=torch.ones(2), grad_w=torch.ones(2))
    case.check_each({"out.x": lambda: torch.ones(2), "out.other": lambda: torch.ones(3)})
    assert case.unchecked() == {"grad.w"}


def test_files_for_other_cases_are_none(tmp_path: Path) -> None:
    assert only_holds_inputs(one(tmp_path, weight_a=torch.ones(1), in_b=torch.ones(1)))
    case = one(tmp_path, weight_a=torch.ones(1), out_b=torch.ones(1))
    assert not only_holds_inputs(case)
    (tmp_path / "a.safetensors").unlink()
    assert not only_holds_inputs(case)


def test_another_formula_of_the_network_is_refused() -> None:
    text = (
        "a = 2*x + -0.5 + 1e-3*t[:,None]; a = a + 4*y.mean(dim=all non-batch dims)[:,None]; "
        "a = where(x_mask[:,None,:,None,None], a, 0.25*a); return cat([a, -3*a], dim=1)"
    )
    assert Stub.read(text) == Stub(2.0, -0.5, 0.001, 4.0, 0.25, -3.0)
    with pytest.raises(AssertionError, match="another one"):
        Stub.read(text.replace("2*x", "2*x**2"))
