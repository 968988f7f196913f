"""The networks of a pipeline, and how they get from a checkpoint into memory."""

from __future__ import annotations

import functools
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch

from kinema.checkpoint.disk import read_record
from kinema.checkpoint.hub import check_places, offline_by_environment
from kinema.checkpoint.reader import TensorReader
from kinema.checkpoint.run import Checkpoint, resolve_weights
from kinema.checkpoint.source import find_files
from kinema.checkpoint.weights import Initial, LoadReport, load_released
from kinema.config.errors import KinemaError
from kinema.config.settings import from_dict
from kinema.generation import released as published
from kinema.generation.config import PipelineConfig
from kinema.generation.released import Released, ReleasedFiles, find_released, locate, wanted
from kinema.models.autoencoder import Autoencoder
from kinema.models.config import CLIPTextConfig, T5TextConfig
from kinema.models.text import TextEncoder
from kinema.models.transformer import Transformer


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
class Allowed:
    """How the transformer's weights may differ from the network: regular expressions of names."""

    new: tuple[str, ...] = ()
    """Tensors that the file may lack; they keep their initial values."""
    unexpected: tuple[str, ...] = ()
    """Tensors of the file that the network may lack; they are left out."""


class Source(ABC):
    """Where a pipeline's weights are; everything here is known without reading them."""

    config: PipelineConfig
    text_weights: Path | None
    """Folder of the text encoder's weights and tokenizer, where it has any."""
    allowed: Allowed

    @abstractmethod
    def fill_model(
        self,
        model: Transformer,
        device: torch.device,
        leave: Collection[str] = (),
        initial: Initial | None = None,
    ) -> LoadReport:
        """Read the transformer's weights into a model on the meta device.

        Args:
            leave: names of tensors that stay there, for `reader` to read.
            initial: see `load_weights`.

        Raises:
            KinemaError: weights that do not fit the description.
        """

    @abstractmethod
    def reader(self, model: Transformer) -> TensorReader:
        """Reads single tensors of the transformer, by their names in the model."""

    @abstractmethod
    def fill_vae(self, vae: Autoencoder, device: torch.device, leave: Collection[str] = ()) -> None:
        """Likewise of the autoencoder; arguments and errors as for `fill_model`."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Names and hashes of the weights, for the sidecar."""

    @abstractmethod
    def with_config(self, config: PipelineConfig) -> Self:
        """The same weights, run in another way."""


@dataclass(frozen=True)
class CheckpointSource(Source):
    """A checkpoint folder that `kinema train` wrote, and the autoencoder it names."""

    checkpoint: Checkpoint
    section: Literal["model", "ema"]
    config: PipelineConfig
    vae_weights: Path
    text_weights: Path | None
    allowed: Allowed = Allowed()

    @classmethod
    def find(
        cls,
        path: Path,
        *,
        vae: Path | None,
        text: Path | None,
        ema: bool,
        needs_text: bool = True,
        allowed: Allowed = Allowed(),
    ) -> Self:
        """Read a checkpoint's description and make sure that its files are there.

        Args:
            path: a checkpoint folder, or a run folder (its newest whole checkpoint).
            vae: the autoencoder's weights, in place of those the checkpoint names.
            text: folder of the text encoder's weights, likewise.
            ema: the averaged weights.
            needs_text: whether the text encoder's weights will be read.
            allowed: how the transformer's weights may differ.

        Raises:
            KinemaError: no such folder, torn, of another model, without averaged weights, or
                without the autoencoder's or the text encoder's weights.
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
        folder = checkpoint.path
        vae_weights = _find(folder, "autoencoder", "--vae", config.vae.weights, vae)
        assert vae_weights is not None
        text_weights = None
        named = text is not None or config.text.weights is not None
        if needs_text and (named or _needs_weights(config)):
            text_weights = _find(folder, "text encoder", "--text", config.text.weights, text)
        return cls(checkpoint, section, config, vae_weights, text_weights, allowed)

    def fill_model(
        self,
        model: Transformer,
        device: torch.device,
        leave: Collection[str] = (),
        initial: Initial | None = None,
    ) -> LoadReport:
        """See `Source`."""
        return self.checkpoint.load_model(
            model,
            self.section,
            allow_new=self.allowed.new,
            allow_unexpected=self.allowed.unexpected,
            device=device,
            leave=leave,
            initial=initial,
        )

    def reader(self, model: Transformer) -> TensorReader:
        """See `Source`."""
        return TensorReader(self.checkpoint.path, section=self.section)

    def fill_vae(self, vae: Autoencoder, device: torch.device, leave: Collection[str] = ()) -> None:
        """See `Source`."""
        load_released(vae, self._vae_file(), device=device, leave=leave)

    def identity(self) -> dict[str, Any]:
        """See `Source`."""
        return {
            "checkpoint": str(self.checkpoint.path.resolve()),
            "step": self.checkpoint.step,
            "weights": self.section,
            "weights_sha256": self.checkpoint.section_hash(self.section),
            "vae_weights": str(self._vae_file()),
            "vae_sha256": hash_of(self._vae_file()),
        }

    def with_config(self, config: PipelineConfig) -> Self:
        """See `Source`."""
        return replace(self, config=config)

    def _vae_file(self) -> Path:
        return resolve_weights(self.vae_weights).resolve()


@dataclass(frozen=True)
class ReleasedSource(Source):
    """A released model: what it is is in the table, its weights are files in any published form.

    What has to be downloaded is downloaded when it is used first: after the request was checked.
    """

    released: Released
    given: tuple[str | None, str | None, str | None]
    """Places of the transformer, the autoencoder and the text encoder; None: as published."""
    offline: bool = False
    allowed: Allowed = Allowed()

    @classmethod
    def find(
        cls,
        released: Released,
        *,
        model: str | os.PathLike[str] | None,
        vae: str | os.PathLike[str] | None,
        text: str | os.PathLike[str] | None,
        offline: bool,
        needs_text: bool = True,
        allowed: Allowed = Allowed(),
    ) -> Self:
        """Make sure that the places are there, and offline that all files are.

        Raises:
            KinemaError: not there; names all that is missing.
        """
        if not needs_text:
            released = replace(released, text=None)
        places = [None if path is None else str(path) for path in (model, vae, text)]
        source = cls(released, (places[0], places[1], places[2]), offline, allowed)
        check_places(wanted(released, ckpt=places[0], vae=places[1], text=places[2]))
        if offline or offline_by_environment():
            _ = source.files
        return source

    @functools.cached_property
    def files(self) -> ReleasedFiles:
        """Where the files are; downloads what is not here.

        Raises:
            KinemaError: it cannot be downloaded.
        """
        model, vae, text = self.given
        return locate(self.released, ckpt=model, vae=vae, text=text, offline=self.offline)

    @property
    def config(self) -> PipelineConfig:  # type: ignore[override]
        """What the model is."""
        return self.released.config

    @property
    def text_weights(self) -> Path | None:  # type: ignore[override]
        """Folder of the text encoder, where there is one."""
        return self.files.text

    def fill_model(
        self,
        model: Transformer,
        device: torch.device,
        leave: Collection[str] = (),
        initial: Initial | None = None,
    ) -> LoadReport:
        """See `Source`."""
        return load_released(
            model,
            self.files.model,
            allow_new=self.allowed.new,
            allow_unexpected=self.allowed.unexpected,
            device=device,
            leave=leave,
            initial=initial,
        )

    def reader(self, model: Transformer) -> TensorReader:
        """See `Source`."""
        return TensorReader(self.files.model, like=model)

    def fill_vae(self, vae: Autoencoder, device: torch.device, leave: Collection[str] = ()) -> None:
        """See `Source`."""
        load_released(vae, self.files.vae, device=device, leave=leave)

    def identity(self) -> dict[str, Any]:
        """See `Source`."""
        return {
            "model": self.released.name,
            "weights": str(self.files.model),
            "weights_sha256": hash_of(self.files.model),
            "vae_weights": str(self.files.vae),
            "vae_sha256": hash_of(self.files.vae),
            "text_weights": None if self.files.text is None else str(self.files.text),
        }

    def with_config(self, config: PipelineConfig) -> Self:
        """See `Source`."""
        return replace(self, released=replace(self.released, config=config))


def hash_of(weights: Path) -> str:
    """Hash of a weights file, or of the hashes of all files of a sharded one; worked out once."""
    return _hash_of_files(tuple((f, f.stat().st_mtime_ns) for f in find_files(weights)))


@functools.lru_cache(maxsize=64)
def _hash_of_files(files: tuple[tuple[Path, int], ...]) -> str:
    whole = hashlib.sha256()
    for file, _ in files:
        whole.update(read_record(file).sha256.encode())
    return whole.hexdigest()


def _needs_weights(config: PipelineConfig) -> bool:
    return isinstance(config.text.config, (T5TextConfig, CLIPTextConfig))


def _find(folder: Path, what: str, option: str, named: str | None, given: Path | None) -> Path:
    """A path that was given, or that a checkpoint in `folder` names."""
    if given is None and named is None:
        raise PipelineError(
            f"the checkpoint does not say where its {what}'s weights are",
            where=str(folder),
            hint=f"give them with {option} PATH",
        )
    # An absolute path stays what it is; a relative one counts from the checkpoint.
    path = given if given is not None else folder / str(named)
    if not path.exists():
        raise PipelineError(
            f"the {what}'s weights are missing",
            where=str(path),
            hint=f"give their place with {option} PATH",
        )
    return path


def find_source(
    path: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None,
    vae: str | os.PathLike[str] | None,
    text: str | os.PathLike[str] | None,
    ema: bool,
    offline: bool,
    needs_text: bool = True,
    allowed: Allowed = Allowed(),
) -> Source:
    """Where the weights of a checkpoint folder or of a released model are.

    Without `needs_text`, no weights of a text encoder are looked for.

    Raises:
        KinemaError: see `Pipeline.from_pretrained`.
    """
    folder = Path(path)
    if not folder.exists() and str(path) in {r.name for r in published.RELEASED}:
        return ReleasedSource.find(
            find_released(str(path)),
            model=model,
            vae=vae,
            text=text,
            offline=offline,
            needs_text=needs_text,
            allowed=allowed,
        )
    if not folder.exists() and "/" not in str(path):
        find_released(str(path))  # raises, with the nearest name
    if model is not None:
        raise PipelineError(
            "a checkpoint has its own weights",
            where=str(path),
            hint="give the weights of a released model together with its name",
        )
    return CheckpointSource.find(
        folder,
        vae=None if vae is None else Path(vae),
        text=None if text is None else Path(text),
        ema=ema,
        needs_text=needs_text,
        allowed=allowed,
    )
