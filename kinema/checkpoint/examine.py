"""Everything that a path holds in the way of weights, and whether it is whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.checkpoint.errors import CheckpointError, WeightsError
from kinema.checkpoint.folder import (
    STATE_FILE,
    Checkpoint,
    Section,
    checkpoint_folders,
    is_ours,
)
from kinema.checkpoint.identify import Identity, describe, identify, unknown
from kinema.checkpoint.source import TensorSource
from kinema.config.errors import KinemaError
from kinema.config.settings import from_dict, settings
from kinema.models.config import TransformerConfig, VAEConfig

PIPELINE_FOLDERS = ("transformer", "vae", "text_encoder")
"""Folders of diffusers' pipelines that may hold weights."""


@dataclass(frozen=True)
class Finding:
    """One set of weights."""

    path: Path
    """The file or folder."""
    what: str
    """The network in words, or what can be said of it."""
    identity: Identity | None = None
    section: str = ""
    """`model` or `ema` of a checkpoint of ours."""
    problem: str | None = None
    """Why it is not usable, beside tensors that do not fit."""

    @property
    def fits(self) -> bool:
        return self.problem is None and self.identity is not None and self.identity.fits


def examine(path: str | Path) -> list[Finding]:
    """What weights are at a path: a file, a folder of them, a checkpoint or run of ours, or a
    pipeline of diffusers. Only names and shapes are read, and the sizes of files.

    Raises:
        KinemaError: nothing there, or it cannot be read.
    """
    path = Path(path)
    if is_ours(path):
        return _checkpoint(path)
    parts = [path / name for name in PIPELINE_FOLDERS if (path / name).is_dir()]
    if parts:
        found = []
        for part in parts:
            try:
                found.append(_weights(part))
            except WeightsError as error:
                found.append(Finding(part, "no weights", problem=error.what))
        return found
    return [_weights(path)]


def _weights(path: Path, section: str = "", config: Any = None) -> Finding:
    """
    Args:
        config: settings of the network that it should be, where they are known.
    """
    with TensorSource(path, section or "model") as tensors:
        identity = identify(tensors.shapes, tensors.dtypes, config)
        if identity is None:
            why = "the network is not known"
            return Finding(path, unknown(tensors.shapes), section=section, problem=why)
        problem = None
        if config is not None and not identity.fits:
            other = identify(tensors.shapes, tensors.dtypes)
            looks = other.title if other is not None else unknown(tensors.shapes)
            problem = f"components.json describes {describe(config)}; these look like {looks}"
    return Finding(path, identity.title, identity, section, problem)


@settings
class _Model:
    model: TransformerConfig


@settings
class _Autoencoder:
    config: VAEConfig


def _checkpoint(path: Path) -> list[Finding]:
    checkpoint = Checkpoint.open(path, sections=())
    config = _described(checkpoint)
    found = []
    sections: tuple[Section, ...] = ("model", "ema")
    for section in sections:
        if section not in checkpoint.files:
            continue
        try:
            checkpoint.verify(sections=(section,))
        except CheckpointError as error:
            what = "half of a checkpoint"
            found.append(Finding(checkpoint.path, what, section=section, problem=error.what))
            continue
        found.append(_weights(checkpoint.path, section, config))
    return found


def described(path: str | Path) -> Any:
    """Settings of the network whose weights a checkpoint (or run) of ours holds, as it says
    itself; None if it is none."""
    path = Path(path)
    if not ((path / STATE_FILE).is_file() or checkpoint_folders(path)):
        return None
    return _described(Checkpoint.open(path, sections=()))


def _described(checkpoint: Checkpoint) -> Any:
    """As `described`; None if the description cannot be read."""
    components = checkpoint.components
    try:
        if "model" in components:
            return from_dict(_Model, {"model": components["model"]}).model
        if "vae" in components:
            config = components["vae"].get("config")
            return from_dict(_Autoencoder, {"config": config}).config
    except (KinemaError, AttributeError):
        return None
    return None
