"""The mean of gradients over ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kinema.parallel import gradients
from kinema.parallel.gradients import GradientMean
from kinema.parallel.world import World, open_world

ALONE = World(0, 1, torch.device("cpu"))


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 1))


def _input(micro: int) -> torch.Tensor:
    # Micro-batches of different sizes: each weighs the same all the same.
    return torch.randn(2 + 3 * micro, 5, generator=torch.Generator().manual_seed(micro))


def test_accumulation_weighs_micro_batches_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "BUCKET_ELEMENTS", 20)  # several buckets
    network, reference = _network(), _network()
    means = GradientMean(network.parameters(), ALONE)
    for _ in range(2):  # the second step must not see the first one's gradients
        means.zero()
        for micro in range(3):
            means.expect(last=micro == 2)
            (network(_input(micro)).square().mean() / 3).backward()
        means.finish()
    torch.stack([reference(_input(m)).square().mean() for m in range(3)]).mean().backward()
    for ours, expected in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)
    expected_norm = nn.utils.clip_grad_norm_(reference.parameters(), 1e9)
    torch.testing.assert_close(means.norm(), expected_norm)


def test_a_parameter_without_a_part_in_the_loss_has_a_gradient_of_zero() -> None:
    network = _network()
    unused = nn.Parameter(torch.ones(4))
    means = GradientMean([*network.parameters(), unused], ALONE)
    means.zero()
    means.expect(last=True)
    network(_input(0)).sum().backward()
    means.finish()
    assert unused.grad is not None
    assert unused.grad.eq(0).all()


def test_scaling_changes_every_gradient() -> None:
    network = _network()
    means = GradientMean(network.parameters(), ALONE)
    means.expect(last=True)
    network(_input(0)).sum().backward()
    before = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    means.finish()
    means.scale(torch.tensor(0.5))
    for parameter, old in zip(network.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, old * 0.5)


def _rank_main(folder: Path) -> None:
    """What each of the two processes runs: two of the four micro-batches."""
    gradients.BUCKET_ELEMENTS = 20
    with open_world("cpu") as world:
        network = _network()
        unused = nn.Parameter(torch.ones(2))
        means = GradientMean([*network.parameters(), unused], world)
        means.zero()
        for i in range(2):
            means.expect(last=i == 1)
            (network(_input(world.rank * 2 + i)).square().mean() / 2).backward()
        own = means.finish()
        result = {
            "grads": [p.grad.tolist() for p in network.parameters() if p.grad is not None],
            "own": float(own),
            "gathered": world.gather(world.rank),
            "broadcast": world.broadcast(f"from {world.rank}"),
            "sum": world.sum(torch.tensor([1.0 + world.rank])).item(),
        }
        (folder / f"{world.rank}.json").write_text(json.dumps(result))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_processes_equal_one(tmp_path: Path) -> None:
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env=os.environ
            | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "MASTER_PORT": port}
            | {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for r in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    results = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2)]
    assert results[0]["grads"] == results[1]["grads"]
    assert results[0]["own"] != results[1]["own"]
    for result in results:
        assert result["gathered"] == [0, 1]
        assert result["broadcast"] == "from 0"
        assert result["sum"] == 3.0
    reference = _network()
    torch.stack([reference(_input(m)).square().mean() for m in range(4)]).mean().backward()
    for ours, expected in zip(results[0]["grads"], reference.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(ours), expected.grad)


if __name__ == "__main__":
    _rank_main(Path(sys.argv[1]))
