"""Machines that differ are named before the first step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kinema.training.preflight import Facts, RanksDifferError, differences, sample


def rank(host: str, gpu: str = "", **values: str) -> Facts:
    return Facts(host, {"kinema": "1.0", "torch": "2.13", **values}, gpu)


def test_ranks_alike_may_begin() -> None:
    assert differences([rank("a"), rank("b")]) == []


def test_another_version_on_one_node_is_named_with_node_and_ranks() -> None:
    ranks = [rank("a"), rank("a"), rank("b", torch="2.12"), rank("b", torch="2.12")]
    with pytest.raises(RanksDifferError) as error:
        differences(ranks)
    assert "torch is 2.12 on b (rank 2, 3), and 2.13 on a (rank 0)" in str(error.value)
    assert "kinema is" not in str(error.value)


def test_weights_that_are_missing_on_one_node_are_named(tmp_path: Path) -> None:
    there = tmp_path / "vae.safetensors"
    there.write_bytes(b"weights")
    ranks = [rank("a", vae_weights=sample(there)), rank("b", vae_weights=sample(tmp_path / "no"))]
    with pytest.raises(RanksDifferError, match=r"vae_weights is not there on b \(rank 1\)"):
        differences(ranks)


def test_gpus_of_two_kinds_are_only_mentioned() -> None:
    (line,) = differences([rank("a", gpu="H100"), rank("b", gpu="H200")])
    assert "H100, H200" in line


def test_a_sample_tells_weights_of_the_same_size_apart(tmp_path: Path) -> None:
    for name, content in (("a", b"1" * 99), ("b", b"1" * 98 + b"2"), ("c", b"1" * 99)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.safetensors").write_bytes(content)
    a, b, c = (sample(tmp_path / name) for name in "abc")
    assert a == c != b
    os.rename(tmp_path / "c" / "w.safetensors", tmp_path / "c" / "v.safetensors")
    assert sample(tmp_path / "c") != a
    assert sample(tmp_path / "a" / "w.safetensors") == sample(tmp_path / "a" / "w.safetensors")
