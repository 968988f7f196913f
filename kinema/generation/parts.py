"""The networks of a pipeline, and how they get from a checkpoint into memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from kinema.checkpoint.disk import read_record
from kinema.checkpoint.run import Checkpoint, resolve_weights
from kinema.checkpoint.weights import load_weights
from kinema.config.errors import KinemaError
from kinema.config.settings import from_dict
from kinema.generation.config import PipelineConfig
from kinema.models.autoencoder import Autoencoder
from kinema.models.build import build_text_encoder, build_transformer, build_vae
from kinema.models.text import TextEncoder
from kinema.models.transformer import Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class PipelineError(KinemaError):
    """A checkpoint or autoencoder that cannot be used to generate."""


@dataclass
class Parts:
    """The networks, in evaluation mode on one device, and what identifies them."""

    model: Transformer
    vae: Autoencoder
    text: TextEncoder
    identity: dict[str, Any] = field(default_factory=dict)
    """Names and hashes of the weights, for the sidecar."""


@dataclass(frozen=True)
class Source:
    """Where a pipeline's weights are; everything here is known without reading them."""

    checkpoint: Checkpoint
    section: Literal["model", "ema"]
    config: PipelineConfig
    vae_weights: Path

    @classmethod
    def find(cls, path: Path, *, vae: Path | None, ema: bool) -> Source:
        """Read a checkpoint's description and make sure that its files are there.

        Args:
            path: a checkpoint folder, or a run folder (its newest whole checkpoint).
            vae: the autoencoder's weights, in place of those the checkpoint names.
            ema: the averaged weights.

        Raises:
            KinemaError: no such folder, torn, of another model, without averaged weights, or
                without the autoencoder's weights.
        """
        section: Literal["model", "ema"] = "ema" if ema else "model"
        found = Checkpoint.open(path, sections=())
        # Of a run folder, the newest checkpoint that is whole; a second look for its own section.
        checkpoint = Checkpoint.open(path, sections=(section,)) if found.has(section) else found
        where = str(checkpoint.path)
        if "model" not in checkpoint.components:
            kinds = ", ".join(sorted(checkpoint.components)) or "nothing"
            raise PipelineError(
                f"this is no checkpoint of a text-to-video model (it describes: {kinds})",
                where=where,
                hint="a checkpoint that `kinema train` wrote for the text-to-video task"
                + ("; an autoencoder goes to --vae" if "vae" in checkpoint.components else ""),
            )
        config = from_dict(
            PipelineConfig, checkpoint.components, where=str(checkpoint.path / "components.json")
        )
        if not checkpoint.has(section):
            hint = "--no-ema generates with the weights themselves" if ema else "--ema"
            raise PipelineError(f"has no {section} weights", where=where, hint=hint)
        return cls(checkpoint, section, config, _find_vae(checkpoint.path, config, vae))

    def load(self, device: torch.device) -> Parts:
        """Read the weights.

        Raises:
            KinemaError: weights that do not fit the description.
        """
        with torch.device("meta"):
            model = build_transformer(self.config.model)
            vae = build_vae(self.config.vae.config)
        self.checkpoint.load_model(model, self.section, device=device)
        vae_file = resolve_weights(self.vae_weights).resolve()
        load_weights(vae, vae_file, device=device)
        return Parts(
            model=model.to(device).eval().requires_grad_(False),
            vae=vae.to(device).eval().requires_grad_(False),
            text=build_text_encoder(self.config.text.config),
            identity={
                "checkpoint": str(self.checkpoint.path.resolve()),
                "step": self.checkpoint.step,
                "weights": self.section,
                "weights_sha256": self.checkpoint.section_hash(self.section),
                "vae_weights": str(vae_file),
                "vae_sha256": _sha256(vae_file),
            },
        )


def parameter_count(config: PipelineConfig) -> int:
    """Numbers in transformer and autoencoder together, counted without making them."""
    with torch.device("meta"):
        networks = (build_transformer(config.model), build_vae(config.vae.config))
    return sum(p.numel() for network in networks for p in network.parameters())


def _sha256(weights: Path) -> str:
    """Hash of a weights file, or of all files of a folder of them."""
    files = sorted(weights.glob("*.safetensors")) if weights.is_dir() else [weights]
    whole = hashlib.sha256()
    for file in files:
        whole.update(read_record(file).sha256.encode())
    return whole.hexdigest()


def _find_vae(folder: Path, config: PipelineConfig, given: Path | None) -> Path:
    if given is None and config.vae.weights is None:
        raise PipelineError(
            "the checkpoint does not say where its autoencoder's weights are",
            where=str(folder),
            hint="give them with --vae PATH",
        )
    # An absolute path stays what it is; a relative one counts from the checkpoint.
    path = given if given is not None else folder / str(config.vae.weights)
    if not path.exists():
        raise PipelineError(
            "the autoencoder's weights are missing",
            where=str(path),
            hint="give their place with --vae PATH",
        )
    return path
