"""How much memory a batch of requests takes, found by running the networks without computing.

The real forwards run at their full shapes on the meta device, where tensors have no memory, and
what they would have alive at once is counted (`live_bytes.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from kinema.config.errors import KinemaError
from kinema.diffusion.process import build_process
from kinema.generation.captions import GuidedText
from kinema.generation.config import GenerateRequest, PipelineConfig
from kinema.generation.engine import clip_shape, guided_network
from kinema.generation.live_bytes import peak_bytes
from kinema.generation.offload import RESIDENT, blocks_of
from kinema.generation.precision import DTYPES
from kinema.generation.residency import Offload, empty_vae
from kinema.models.autoencoder import Autoencoder
from kinema.models.build import build_transformer
from kinema.models.config import (
    ClassTextConfig,
    CLIPTextConfig,
    T5TextConfig,
    TextConfig,
    Tiling,
    TransformerConfig,
    VAEConfig,
)
from kinema.parallel.world import World

META = torch.device("meta")
SLACK = 1.1
"""Factor on what is counted for what is not: an allocator's unused rests, kernels' own memory."""
TILED_HEIGHT = 1024
"""Pixels: how much of a frame is gone through band by band to know what the whole takes."""
CUDA_CONTEXT = 600 * 2**20
"""Bytes that PyTorch takes on a GPU before the first tensor."""


class TooLittleMemoryError(KinemaError):
    """Work for which this machine has too little memory."""

    exit_code = 2


@dataclass(frozen=True)
class Need:
    """Bytes of one network at work."""

    weights: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.activations


@dataclass(frozen=True)
class MemoryEstimate:
    """What the device needs for a batch, by phase.

    Attributes:
        text, sampling: of the text encoder and of the transformer.
        vae: of the autoencoder, decoding, and encoding where there are references.
        offload: which of them are there together.
        context: what PyTorch itself takes.
    """

    text: Need
    sampling: Need
    vae: Need
    offload: Offload
    context: int = 0

    @property
    def total(self) -> int:
        """The most that is needed at once."""
        needs = (self.text, self.sampling, self.vae)
        if self.offload == "none":
            counted = sum(n.weights for n in needs) + max(n.activations for n in needs)
        else:
            counted = max(n.total for n in needs)
        return int(counted * SLACK) + self.context

    def summary(self) -> str:
        """Total and parts in words."""
        return f"{in_words(self.total)} ({self.describe()})"

    def describe(self) -> str:
        """Weights and activations of each network."""
        parts = {
            "text encoder": self.text,
            "transformer": self.sampling,
            "autoencoder": self.vae,
        }
        shown = [
            f"{name} {in_words(n.weights)} + {in_words(n.activations)}" for name, n in parts.items()
        ]
        return f"weights + activations: {', '.join(shown)}; offload {self.offload}"


@dataclass(frozen=True)
class MemorySettings:
    """What decides the memory of a request besides its shape."""

    batch: int = 1
    """Requests sampled together."""
    dtype: str = "fp32"
    """Precision of the transformer."""
    vae_dtype: str = "fp32"
    offload: Offload = "none"
    tiling: Tiling | None = None
    text_bytes: int = 0
    """Of the text encoder's weights (it computes a caption at a time, in little)."""
    loaded: frozenset[str] = frozenset()
    """Networks that are on the device already: `model`, `vae`, `text`."""
    on_gpu: bool = False
    """Count what PyTorch itself takes there."""


def estimate_memory(
    request: GenerateRequest, config: PipelineConfig, settings: MemorySettings
) -> MemoryEstimate:
    """Memory for a batch of requests of one shape."""
    conditioned = bool(request.references) or request.loop > 1
    streamed = settings.offload == "layers"
    sampling = _sampling(
        config,
        _shape_only(request),
        settings.batch,
        DTYPES[settings.dtype],
        conditioned,
        streamed,
    )
    vae = _autoencoder(
        config.vae.config,
        (request.num_frames, request.height, request.width),
        DTYPES[settings.vae_dtype],
        settings.tiling,
        conditioned,
    )
    # Features in float32, twice: as they come and as they are kept.
    features = 2 * 4 * config.text.config.max_tokens * _text_width(config.text.config)
    text = Need(0 if streamed else settings.text_bytes, features)
    return MemoryEstimate(
        text=_without(text, "text" in settings.loaded),
        sampling=_without(sampling, "model" in settings.loaded),
        vae=_without(vae, "vae" in settings.loaded),
        offload=settings.offload,
        context=CUDA_CONTEXT if settings.on_gpu else 0,
    )


def free_memory(device: torch.device, world: World | None = None) -> int:
    """Bytes free on the device; of a machine's memory, this process's share."""
    if device.type == "cuda":
        # What PyTorch holds without using it is as good as free.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available) // (1 if world is None else world.local_size)


def require_memory(
    settings: MemorySettings,
    request: GenerateRequest,
    config: PipelineConfig,
    free: int,
    device: str,
) -> None:
    """Refuse work that needs more memory than is free, with what would make it fit.

    Raises:
        TooLittleMemoryError: with the parts of the estimate.
    """
    estimate = estimate_memory(request, config, settings)
    if estimate.total <= free:
        return
    raise TooLittleMemoryError(
        f"this needs about {estimate.summary()}, and {in_words(free)} is free on {device}",
        where="memory",
        hint=_suggestion(settings, request, config, free),
    )


def _suggestion(
    settings: MemorySettings, request: GenerateRequest, config: PipelineConfig, free: int
) -> str:
    """The mildest change that makes it fit: each alone, then one after the other together."""
    changes: list[tuple[str, dict[str, object]]] = []
    if settings.batch > 1:
        changes.append(("--batch-size 1", {"batch": 1}))
    if settings.dtype in ("fp32", "tf32"):
        changes.append(("--dtype bf16", {"dtype": "bf16", "vae_dtype": "bf16"}))
    if settings.offload == "none":
        changes.append(("--offload phase", {"offload": "phase", "loaded": frozenset()}))
    text = config.text.config
    if isinstance(text, T5TextConfig) and text.precision != "int8":
        int8_bytes = settings.text_bytes // (4 if text.precision == "fp32" else 2)
        changes.append(("--text-dtype int8", {"text_bytes": int8_bytes}))
    if settings.tiling is None:
        changes.append(("--tiling", {"tiling": Tiling()}))
    if settings.offload != "layers":
        changes.append(("--offload layers", {"offload": "layers", "loaded": frozenset()}))

    def fits(values: dict[str, Any]) -> bool:
        return estimate_memory(request, config, replace(settings, **values)).total <= free

    for name, values in changes:
        if fits(values):
            return name
    together: dict[str, object] = {}
    names: dict[str, str] = {}
    for name, values in changes:
        together |= values
        names[name.split()[0]] = name
        if fits(together):
            return " ".join(names.values())
    return "a smaller size or fewer frames"


def _shape_only(request: GenerateRequest) -> GenerateRequest:
    """The request with what memory does not depend on at fixed values."""
    return GenerateRequest(
        prompt="-",
        width=request.width,
        height=request.height,
        num_frames=request.num_frames,
        cfg_scale=request.cfg_scale if request.cfg_scale in (0.0, 1.0) else 7.0,
    )


@functools.lru_cache(maxsize=64)
def _sampling(
    config: PipelineConfig,
    request: GenerateRequest,
    batch: int,
    dtype: torch.dtype,
    conditioned: bool,
    streamed: bool,
) -> Need:
    with META:
        model = build_transformer(config.model).eval().requires_grad_(False).to(dtype)
    weights = weight_bytes(model)
    if streamed:
        blocks = [block.nbytes for block in blocks_of(model)]
        weights += RESIDENT * max(blocks) - sum(blocks)
    size = config.vae.config.latent_size(request.num_frames, request.height, request.width)
    with META:
        z = torch.empty(batch, config.model.in_channels, *size)
        t = torch.empty(batch)
        x_mask = torch.empty(batch, size[0], dtype=torch.bool) if conditioned else None
    halves = 1 if request.cfg_scale in (0.0, 1.0) else 2
    y, mask = _features(config.text.config, config.model, batch * halves)
    shape = clip_shape([request] * batch, META)
    process = build_process(config.diffusion)

    def run() -> Tensor:
        text = GuidedText(y, mask, halves)
        network = guided_network(model, process, text, shape, request.cfg_scale)
        return network(z, t, x_mask)

    # What a sampler holds beside the network: the latent, its noise, the last step's prediction.
    held = 4 * z.numel() * z.element_size() + y.numel() * y.element_size()
    return Need(weights, peak_bytes(run) + held)


@functools.lru_cache(maxsize=64)
def _autoencoder(
    config: VAEConfig,
    video: tuple[int, int, int],
    dtype: torch.dtype,
    tiling: Tiling | None,
    encodes: bool,
) -> Need:
    vae = empty_vae(config, dtype)
    vae.tiling = tiling
    frames, height, width = video
    # Bands are many and alike: a part of the frame tells what the whole needs.
    measured = height if tiling is None else min(height, TILED_HEIGHT)

    def decoding(frames: int) -> tuple[int, int]:
        size = config.latent_size(frames, measured, width)
        z = torch.empty(1, config.latent_channels, *size, device=META)
        result: list[Tensor] = []
        peak = peak_bytes(lambda: result.append(vae.decode(z, frames)))
        return peak, result[0].numel() * result[0].element_size()

    def encoding(frames: int) -> tuple[int, int]:
        pixels = torch.empty(1, 3, frames, measured, width, device=META)
        return peak_bytes(lambda: vae.encode(pixels)), 4 * pixels.numel()

    # Frames that pass the autoencoder together.
    portion = config.micro_frame_size or config.micro_batch_size or frames
    if tiling is not None:
        portion = 1
    needs = [_over_time(decoding, frames, portion)]
    if encodes:
        needs.append(_over_time(encoding, frames, portion))
    return Need(weight_bytes(vae), max(needs) * height // measured)


def _over_time(measure: Callable[[int], tuple[int, int]], frames: int, portion: int) -> int:
    """Peak for all frames, from that for the first few.

    Frames pass the autoencoder some at a time and only their results stay, so that from the
    second portion on a portion adds just that; joining the portions holds the result twice.
    """
    few = min(frames, portion if portion == 1 else 2 * portion)
    peak, result = measure(few)
    rest = (frames - few) / few * result
    return int(max(peak + rest, 2 * (result + rest)))


def _features(
    text: TextConfig, model: TransformerConfig, rows: int
) -> tuple[Tensor, Tensor | None]:
    """Text features of full length as the encoder would give them, without values."""
    if isinstance(text, ClassTextConfig):
        return torch.empty(rows, dtype=torch.int64, device=META), None
    if isinstance(text, CLIPTextConfig):
        return torch.empty(rows, 1, text.dim, device=META), None
    y = torch.empty(rows, 1, text.max_tokens, text.dim, device=META)
    # The mask decides sizes, so it has values: captions that fill the encoder.
    return y, torch.ones(rows, text.max_tokens, dtype=torch.bool)


def _text_width(text: TextConfig) -> int:
    return 1 if isinstance(text, ClassTextConfig) else text.dim


def weight_bytes(network: nn.Module | Autoencoder) -> int:
    """Bytes of a network's parameters and buffers."""
    tensors = (*network.parameters(), *network.buffers())
    return sum(t.numel() * t.element_size() for t in tensors)


def _without(need: Need, loaded: bool) -> Need:
    return Need(0, need.activations) if loaded else need


def in_words(size: int) -> str:
    """`8.9 GiB`, `340 MiB`, `12 KiB`."""
    if size < 2**20:
        return f"{size / 2**10:.0f} KiB"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
