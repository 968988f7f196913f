"""From a recipe to the networks of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kinema.checkpoint.pixart_start import can_start, start_from_pixart
from kinema.checkpoint.run import Checkpoint, resolve_weights
from kinema.checkpoint.weights import load_released
from kinema.config.errors import ConfigError, KinemaError
from kinema.config.settings import to_dict
from kinema.data.manifest import Manifest
from kinema.data.text_cache import TextCache
from kinema.models.autoencoder import Autoencoder
from kinema.models.build import build_text_encoder, build_transformer, build_vae
from kinema.models.config import ClassTextConfig, VAEConfig
from kinema.models.text import TextEncoder
from kinema.models.vae import VideoVAE
from kinema.models.vae_init import start_as_block_means
from kinema.parallel.recompute import TRANSFORMER_BLOCKS, apply_recompute, is_below
from kinema.training.config import RANDOM_WEIGHTS, TrainRecipe, VAETask
from kinema.training.encode import TextSource

VAE_BLOCKS = (
    "spatial_vae.module.encoder.down_blocks.*",
    "spatial_vae.module.decoder.up_blocks.*",
    "temporal_vae.encoder.block_res_blocks.*.*",
    "temporal_vae.decoder.block_res_blocks.*.*",
)
MEASURED_OR_MEMORY = ("shift", "scale", "micro_batch_size")
"""Settings of an autoencoder in which a recipe may differ from its weights: the first two come
with the weights."""


def blocks_of(recipe: TrainRecipe) -> tuple[str, ...]:
    """Names of the blocks of the network that trains: what recomputes, is compiled and is gathered
    one at a time."""
    return VAE_BLOCKS if isinstance(recipe.task, VAETask) else TRANSFORMER_BLOCKS


def build_model(recipe: TrainRecipe) -> nn.Module:
    """The network that trains, on the CPU, initialised from the recipe's seed, frozen parts frozen.

    Raises:
        ConfigError: `freeze` names nothing, or leaves nothing to train.
    """
    # The same weights on every rank and in every run of this seed, whatever ran before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if isinstance(recipe.task, VAETask):
            vae = build_vae(recipe.vae)
            assert isinstance(vae, VideoVAE), "recipes refuse others"
            if recipe.task.start == "block-means":
                start_as_block_means(vae)
            model: nn.Module = vae
        else:
            assert recipe.model is not None
            model = build_transformer(recipe.model)
    freeze(model, recipe.freeze)
    if recipe.recompute != "none":
        apply_recompute(
            model, blocks_of(recipe), kind=recipe.recompute, every=recipe.recompute_every
        )
    if recipe.compile:
        from kinema.parallel.compile import compile_blocks  # a second to import

        compile_blocks(model, blocks_of(recipe))
    return model


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Switch gradients off for parts of a model.

    Args:
        names: of modules or parameters; `*` stands for one part of a dotted name.

    Raises:
        ConfigError: a name that nothing has, or nothing is left to train.
    """
    for wanted in names:
        chosen = [p for name, p in model.named_parameters() if is_below(name, wanted)]
        if not chosen:
            raise ConfigError(
                f"no parameter is named {wanted!r}, or lies below that name",
                where="freeze",
                hint="whole parts of names: x_embedder, blocks.*.cross_attn",
            )
        for parameter in chosen:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("nothing is left to train", where="freeze")


@dataclass(frozen=True)
class Frozen:
    """What a text-to-video run looks through."""

    vae: Autoencoder | None
    """None: nothing in the run needs it, as there are latents."""
    vae_weights: Path | None
    """None: random, or not there."""
    text: TextSource


def load_frozen(recipe: TrainRecipe, manifest: Manifest, device: torch.device) -> Frozen:
    """Autoencoder and text encoder (or its cache) of a text-to-video run.

    Raises:
        KinemaError: the recipe names no weights, or such that do not fit; a cache of other
            captions or of another encoder.
    """
    vae, path = load_vae(recipe, device) if _needs_vae(recipe) else (None, None)
    return Frozen(vae, path, _text_source(recipe, manifest, device))


def _needs_vae(recipe: TrainRecipe) -> bool:
    return recipe.latent_cache is None or bool(recipe.preview or recipe.validation)


def load_vae(recipe: TrainRecipe, device: torch.device) -> tuple[Autoencoder, Path | None]:
    """The frozen autoencoder of a text-to-video recipe, and where its weights are (None: random).

    Raises:
        KinemaError: the recipe names no weights, or such that do not fit.
    """
    if recipe.vae_weights is None:
        raise ConfigError(
            "text-to-video needs a trained autoencoder, and the recipe names none",
            where="vae_weights",
            hint="--vae_weights outputs/NNN-NAME of a `kinema train-vae` run, or released weights",
        )
    path: Path | None = None
    if recipe.vae_weights == RANDOM_WEIGHTS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            network = build_vae(recipe.vae)
    else:
        path = _vae_weights(Path(recipe.vae_weights), recipe.vae)
        with torch.device("meta"):
            network = build_vae(recipe.vae)
        load_released(network, path, device=device)
    return network.to(device).eval().requires_grad_(False), path


def in_working_precision(
    vae: Autoencoder, precision: str, device: torch.device, *, on: str = "cuda"
) -> None:
    """Cast a frozen autoencoder to what a run on a GPU computes it in, as generation does.

    Autocast alone would keep float32 weights and norms, which move three times the bytes: most of
    what encoding costs. fp16 is too narrow for activations of image autoencoders, and stays so.

    Args:
        precision: of the recipe.
        on: kind of devices where it is done.
    """
    if precision == "bf16" and device.type == on:
        vae.to(torch.bfloat16)


def _vae_weights(path: Path, config: VAEConfig) -> Path:
    """The weights behind a path; a checkpoint must have the recipe's settings."""
    path = resolve_weights(path)
    if not (path / "state.json").is_file():
        return path.absolute()
    checkpoint = Checkpoint.open(path, sections=("model",))
    found = checkpoint.components.get("vae", {}).get("config")
    if found is None or "model" in checkpoint.components:
        raise KinemaError(
            "is not a checkpoint of an autoencoder",
            where=str(checkpoint.path),
            hint="a run folder of `kinema train-vae`",
        )
    wanted = to_dict(config)
    for key in wanted:
        if key not in MEASURED_OR_MEMORY and found.get(key) != wanted[key]:
            raise KinemaError(
                f"this autoencoder has {key} {found.get(key)}, the recipe has {wanted[key]}",
                where=str(checkpoint.path),
                hint="give the recipe the `vae` settings that the autoencoder was trained with",
            )
    return path.absolute()


def _text_source(recipe: TrainRecipe, manifest: Manifest, device: torch.device) -> TextSource:
    assert recipe.text is not None
    if recipe.text_cache is None:
        encoder = build_text_encoder(recipe.text, text_weights_of(recipe))
        encoder.to(device)
        if isinstance(recipe.text, ClassTextConfig):
            _check_classes(encoder, manifest)
        return TextSource(encoder, None)
    # Which weights it was made with is compared where the recipe names them too.
    folder = text_weights_of(recipe)
    weights = None if folder is None else build_text_encoder(recipe.text, folder).weights_id
    cache = TextCache.open(recipe.text_cache, manifest, to_dict(recipe.text), weights=weights)
    return TextSource(None, cache)


def _check_classes(encoder: TextEncoder, manifest: Manifest) -> None:
    """Every `text` of the manifest must be a class: one that is not would end a run half-way."""
    for text in manifest.table.column("text").unique().to_pylist():
        try:
            encoder.encode([text])
        except KinemaError as error:
            raise KinemaError(
                error.what, where=f"{manifest.source}: column text", hint=error.hint
            ) from None


def text_weights_of(recipe: TrainRecipe) -> Path | None:
    """Where the text encoder's weights are; None: the recipe names none."""
    return None if recipe.text_weights is None else Path(recipe.text_weights)


def start_from_weights(
    model: nn.Module,
    path: Path,
    *,
    allow_new: tuple[str, ...],
    allow_unexpected: tuple[str, ...],
) -> str:
    """Fill `model` from weights alone (`--ckpt-path`).

    Args:
        path: a checkpoint, a run folder (its newest checkpoint), or a weights file in any form
            that is published; a file of PixArt's also starts the video models.
        allow_new, allow_unexpected: see `load_weights`.

    Returns:
        One line for the log: how many tensors were loaded, reshaped, new and left out.

    Raises:
        KinemaError: weights of another model.
    """
    path = resolve_weights(path)
    load = start_from_pixart if can_start(model, path) else load_released
    return str(load(model, path, allow_new=allow_new, allow_unexpected=allow_unexpected))
