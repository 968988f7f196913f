"""What can be found before the first step: machines that differ, weights that are not there."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kinema.config.errors import KinemaError
from kinema.config.settings import fingerprint
from kinema.parallel.world import World
from kinema.training.config import RANDOM_WEIGHTS, TrainRecipe
from kinema.training.run_folder import code_version

SAMPLE = 1 << 20
"""Bytes that are read at either end of a file to tell it from another of the same size."""


class RanksDifferError(KinemaError):
    """Ranks run with different things; raised on every rank alike."""


@dataclass(frozen=True)
class Facts:
    """What a rank runs with.

    Attributes:
        values: by what they are of; the same on every rank, or the run must not begin.
        gpu: name of its GPU; empty without one.
    """

    host: str
    values: Mapping[str, str]
    gpu: str = ""


def facts(recipe: TrainRecipe, world: World, weights: Mapping[str, Path | None]) -> Facts:
    """Of this rank.

    Args:
        weights: files and folders that the run reads, by the setting that names them.
    """
    values = {
        "kinema": code_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "the recipe": fingerprint(recipe)[:12],
    }
    values |= {name: sample(path) for name, path in weights.items() if path is not None}
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    return Facts(socket.gethostname(), values, gpu)


def weights_of(recipe: TrainRecipe, ckpt_path: Path | None) -> dict[str, Path | None]:
    """What a run reads besides its manifest."""
    named = {
        "vae_weights": None if recipe.vae_weights == RANDOM_WEIGHTS else recipe.vae_weights,
        "text_weights": recipe.text_weights,
        "text_cache": recipe.text_cache,
        "--ckpt-path": ckpt_path,
    }
    return {key: None if value is None else Path(value) for key, value in named.items()}


def check_alike(own: Facts, world: World) -> list[str]:
    """Every rank must run the same. Collective.

    Returns:
        Lines for the log: what differs and may.

    Raises:
        RanksDifferError: on every rank; names nodes, ranks and both values.
    """
    return differences(world.gather(own))


def differences(ranks: list[Facts]) -> list[str]:
    """See `check_alike`.

    Args:
        ranks: by rank.
    """
    first = ranks[0]
    problems = []
    for name in dict.fromkeys(key for rank in ranks for key in rank.values):
        others: dict[tuple[str, str], list[int]] = {}
        for number, rank in enumerate(ranks):
            value = rank.values.get(name, "not there")
            if value != first.values.get(name, "not there"):
                others.setdefault((rank.host, value), []).append(number)
        for (host, value), numbers in others.items():
            expected = first.values.get(name, "not there")
            problems.append(
                f"{name} is {value} on {host} (rank {_list(numbers)}), "
                f"and {expected} on {first.host} (rank 0)"
            )
    if problems:
        raise RanksDifferError(
            "ranks differ: " + "; ".join(problems),
            hint="`kinema cluster setup` and `kinema cluster sync` bring code and weights to all "
            "nodes; `kinema cluster health` compares them",
        )
    kinds = sorted({rank.gpu for rank in ranks})
    return [f"GPUs differ: {', '.join(kinds)}; the slowest sets the pace"] if kinds[1:] else []


def sample(path: Path) -> str:
    """What tells weights from others without reading all of them: names, sizes and both ends."""
    if not path.exists():
        return "not there"
    root = path if path.is_dir() else path.parent
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root) if path.is_dir() else ''} {size}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(SAMPLE))
            opened.seek(-min(SAMPLE, size), os.SEEK_END)
            digest.update(opened.read())
    return digest.hexdigest()[:12]


def _list(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"
