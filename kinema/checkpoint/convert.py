"""From one published form of a network's weights into another, tensor by tensor.

Forms: `kinema` (names of Open-Sora's state dicts, safetensors), `original` (as the authors
published it: a `.pth` or `.pt` file with its position tables, or safetensors), `diffusers`. The
same tables are read and written (`released_names`), so that there and back changes no bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kinema.checkpoint.disk import full_disk_explained, replacing, write_text
from kinema.checkpoint.errors import WeightsError
from kinema.checkpoint.identify import Identity, identify, unknown
from kinema.checkpoint.layout import Layout, Stored
from kinema.checkpoint.published_config import diffusers_config, original_config
from kinema.checkpoint.released_names import (
    authors,
    diffusers_dit,
    diffusers_pixart,
    dit_fits_diffusers,
    from_images,
    old_autoencoder,
    own,
    pixart_fits_diffusers,
)
from kinema.checkpoint.run import resolve_weights
from kinema.checkpoint.source import TORCH_SUFFIXES, TensorSource, find_files
from kinema.checkpoint.weights import MAX_SHARD_BYTES, is_declared, save_weights
from kinema.models.build import build_transformer
from kinema.models.config import (
    DiTConfig,
    ImageVAEConfig,
    LatteConfig,
    PixArtConfig,
    STDiTConfig,
)

Form = Literal["kinema", "original", "diffusers"]
FORMS: tuple[Form, ...] = ("kinema", "original", "diffusers")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXACT = ("rope.freqs", "shift", "scale")
"""Stay as they are whatever is asked for: a few numbers that everything is multiplied by."""


@dataclass(frozen=True)
class Converted:
    """What a conversion did."""

    title: str
    """The network."""
    layout: str
    """The form it was found in."""
    tensors: int
    """Written."""
    numbers: int
    files: tuple[Path, ...]
    computed: tuple[str, ...]
    """Position tables of the source that were left out, and are computed where they are needed."""
    left_out: tuple[str, ...] = ()
    """Tensors that belong to nothing, left out because that was allowed."""
    without_config: bool = False
    """A folder of this form has a `config.json`, which could not be written: its settings are not
    known."""


def convert(
    source: str | Path,
    target: str | Path,
    to: Form,
    *,
    config: Any = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    section: str = "model",
    overwrite: bool = False,
    allow_unexpected: Sequence[str] = (),
) -> Converted:
    """Write the weights of a file or folder in another form. One tensor at a time is in memory,
    but for `.pth` and `.pt`, which PyTorch writes from memory whole.

    Args:
        source: anything `load_released` reads.
        target: a file with the ending of its kind, or a folder, which gets files of the usual
            names.
        config: settings of the network, for what its tensors do not tell (position tables and
            `config.json` of a published form need them).
        dtype: fp32, bf16 or fp16; None: as in the source.
        max_shard_bytes: larger safetensors files become shards.
        section: `model` or `ema` of a checkpoint of ours.
        allow_unexpected: regular expressions (whole name) of tensors that the network has no place
            for: they are left out. What is missing cannot be allowed: nothing could be written.

    Raises:
        WeightsError: weights that are incomplete or of an unknown network; a form that the network
            has not; a target that exists.
    """
    target = Path(target)
    with TensorSource(resolve_weights(source), section) as tensors:
        identity = _identified(tensors, config, allow_unexpected)
        layout = _target_layout(identity, config, to, str(source))
        plan = _Plan(identity, tensors, layout, _tables(identity, config, to), _dtype(dtype))
        path = _file(target, to, identity.config)
        sources = {file.resolve() for file in tensors.files}
        if sources & {p.resolve() for p in (path, *_shards_there(path))}:
            raise WeightsError("source and target are the same file", where=str(path))
        _refuse_existing(path, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        before = _shards_there(path)
        files = _write(plan, path, identity.config if config is None else config, max_shard_bytes)
        for stale in before - set(files):
            stale.unlink(missing_ok=True)
        if target == path.parent:
            files += _write_config(target, config, to)
    return Converted(
        title=identity.title,
        layout=identity.layout.name,
        tensors=len(plan.meta),
        numbers=sum(t.numel() for t in plan.meta.values()),
        files=tuple(files),
        computed=tuple(
            n
            for n in identity.fit.unexpected
            if n not in plan.meta and n not in identity.unexpected
        ),
        left_out=identity.unexpected,
        without_config=target == path.parent
        and config is None
        and _published_config(identity.config, to) is not None,
    )


class _Plan:
    """What is written: names, shapes and kinds, and the values when their turn comes."""

    def __init__(
        self,
        identity: Identity,
        tensors: TensorSource,
        layout: Layout,
        tables: Mapping[str, Tensor],
        dtype: torch.dtype | None,
    ) -> None:
        self._identity, self._tensors, self._layout = identity, tensors, layout
        self._tables = {n: t.to(dtype) if dtype else t for n, t in tables.items()}
        self._dtype = dtype
        self._of: dict[str, str] = {}
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        self.meta: dict[str, Tensor] = {}
        for ours, shape in identity.shapes.items():
            like = torch.empty(shape, dtype=self._kind(ours), device="meta")
            for name, part in layout.stored[ours].write(like):
                self.meta[name] = part
                self._of[name] = ours
        self.meta |= {n: t.to("meta") for n, t in self._tables.items()}

    def read(self, name: str) -> Tensor:
        """The values of one tensor to be written."""
        if name in self._tables:
            return self._tables[name]
        ours = self._of[name]
        if self._last[0] != ours:
            stored = self._identity.layout.stored[ours]
            value = stored.read(self._tensors.read, self._identity.shapes[ours])
            value = value.to(self._kind(ours))
            self._last = (ours, dict(self._layout.stored[ours].write(value)))
        return self._last[1][name]

    def _kind(self, ours: str) -> torch.dtype:
        found = self._tensors.dtypes[self._identity.layout.stored[ours].names[0]]
        exact = ours in EXACT or self._dtype is None or not found.is_floating_point
        return found if exact or self._dtype is None else self._dtype


def _identified(tensors: TensorSource, config: Any, allow_unexpected: Sequence[str]) -> Identity:
    identity = identify(tensors.shapes, tensors.dtypes, config)
    if identity is None or identity.config is None:
        what = identity.title if identity else unknown(tensors.shapes)
        raise WeightsError(
            f"cannot be converted: {what}", where=str(tensors.path), hint="kinema models --check"
        )
    absent = identity.fit.missing
    strangers = [n for n in identity.unexpected if not is_declared(n, allow_unexpected)]
    if absent or strangers or identity.fit.wrong_shape or identity.fit.wrong_kind:
        hint = "kinema models --check lists all"
        if absent == ("y_embedder.y_embedding",):
            hint = (
                "newer diffusers has no place for the learned empty caption; convert the "
                "authors' .pth file instead"
            )
        problems = [
            f"{len(names)} {what} ({', '.join(names[:3])})"
            for what, names in (
                ("missing", absent),
                ("unknown", strangers),
                ("of another shape", identity.fit.wrong_shape),
                ("of another kind", identity.fit.wrong_kind),
            )
            if names
        ]
        says = "these should be the weights of" if config is not None else "looks like"
        raise WeightsError(
            f"{says} {identity.title}, but not all tensors fit: {'; '.join(problems)}",
            where=str(tensors.path),
            hint=hint,
        )
    return identity


def _target_layout(identity: Identity, config: Any, to: Form, where: str) -> Layout:
    settings = identity.config if config is None else config
    shapes = identity.shapes
    if to == "kinema":
        return own(settings, shapes)
    if to == "original":
        if isinstance(settings, ImageVAEConfig):
            return old_autoencoder(shapes)
        return authors(settings, shapes)
    if isinstance(settings, PixArtConfig) and pixart_fits_diffusers(settings):
        return diffusers_pixart(shapes)
    if isinstance(settings, DiTConfig) and dit_fits_diffusers(settings):
        return diffusers_dit(settings, shapes)
    if isinstance(settings, ImageVAEConfig):
        return Layout("diffusers", {n: Stored((n,)) for n in shapes})
    reason = ""
    if isinstance(settings, LatteConfig):
        reason = " (its LatteTransformer3DModel is another network)"
    raise WeightsError(
        f"diffusers has no class for {identity.title}{reason}",
        where=where,
        hint="--to kinema or --to original",
    )


def _tables(identity: Identity, config: Any, to: Form) -> dict[str, Tensor]:
    """Position tables that the published form carries."""
    kinds = (STDiTConfig, PixArtConfig, DiTConfig, LatteConfig)
    if to != "original" or not isinstance(identity.config, kinds):
        return {}
    if config is None:
        raise WeightsError(
            "files of this form hold position tables, whose scale and size the weights do not "
            f"tell ({identity.title})",
            hint="say which checkpoint it is: --model NAME (`kinema models` lists them)",
        )
    with torch.device("meta"):
        model = build_transformer(config)
    tables = model.recomputed_tensors()
    if not from_images(config):
        return tables
    spatial = tables.get("pos_embed_spatial", tables.get("pos_embed"))
    assert spatial is not None
    if isinstance(config, LatteConfig):
        return {"pos_embed": spatial, "temp_embed": tables["pos_embed_temporal"]}
    return {"pos_embed": spatial}


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise WeightsError(
            f"dtype is {name!r}", where="--dtype", hint=f"one of {', '.join(DTYPES)}"
        )
    return DTYPES[name]


def _file(target: Path, to: Form, config: Any) -> Path:
    """The file of weights to write, in `target` if that is a folder."""
    if target.suffix == ".safetensors":
        return target
    if target.suffix in TORCH_SUFFIXES:
        if to != "original":
            raise WeightsError(
                f"the form {to} is written as .safetensors", where=str(target), hint="or a folder"
            )
        return target
    if to == "diffusers" or (to == "original" and isinstance(config, ImageVAEConfig)):
        return target / "diffusion_pytorch_model.safetensors"
    if to == "original" and isinstance(config, (STDiTConfig, PixArtConfig)):
        return target / "model.pth"
    if to == "original" and isinstance(config, (DiTConfig, LatteConfig)):
        return target / "model.pt"
    return target / "model.safetensors"


def _refuse_existing(path: Path, overwrite: bool) -> None:
    index = path.with_name(f"{path.name}.index.json")
    existing = next((p for p in (path, index) if p.exists()), None)
    if existing is not None and not overwrite:
        raise WeightsError(
            "is there already", where=str(existing), hint="--overwrite, or another name"
        )


def _shards_there(path: Path) -> set[Path]:
    """The index and the shards of a sharded file of this name."""
    index = path.with_name(f"{path.name}.index.json")
    if not index.is_file():
        return set()
    try:
        return {index, *find_files(index)}
    except WeightsError:
        return {index}


def _write(plan: _Plan, path: Path, config: Any, max_shard_bytes: int) -> list[Path]:
    if path.suffix not in TORCH_SUFFIXES:
        records = save_weights(
            path,
            plan.meta,
            metadata={"format": "pt"},
            max_shard_bytes=max_shard_bytes,
            read=plan.read,
        )
        return [path.with_name(name) for name in records]
    with full_disk_explained(path), replacing(path) as temporary:
        state = {name: plan.read(name).clone() for name in plan.meta}
        torch.save(_wrapped(state, config), temporary)
    return [path]


def _wrapped(state: dict[str, Tensor], config: Any) -> dict[str, Any]:
    """As the authors' programs nest it."""
    if not from_images(config):
        return state
    if isinstance(config, PixArtConfig):
        return {"state_dict": state}
    return {"ema": state} if isinstance(config, LatteConfig) else state


def _write_config(folder: Path, config: Any, to: Form) -> list[Path]:
    """`config.json` beside the weights, where the form has one and the settings are known."""
    content = None if config is None else _published_config(config, to)
    if content is None:
        return []
    write_text(folder / "config.json", json.dumps(content, indent=2) + "\n")
    return [folder / "config.json"]


def _published_config(config: Any, to: Form) -> dict[str, Any] | None:
    if to == "kinema":
        return None
    return diffusers_config(config) if to == "diffusers" else original_config(config)


def size_in_bytes(text: str) -> int:
    """`5GB`, `500MB`, `2GiB`, as bytes.

    Raises:
        WeightsError: no size.
    """
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    for unit, factor in units.items():
        number = text.strip().removesuffix(unit).strip()
        if text.strip().endswith(unit) and number.replace(".", "", 1).isdigit():
            return max(1, int(float(number) * factor))
    raise WeightsError(f"{text!r} is no size", where="--max-shard-size", hint="5GB or 500MB")
