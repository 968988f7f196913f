"""What a training step allocates beside weights and optimizer: the real networks, run forward and
backward without computing.

Tensors on the meta device have shapes and no memory (`generation.live_bytes`). Blocks are alike,
so a model of two and one of three stand for one of any depth: what one more block adds is the
difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kinema.data.buckets import Bucket
from kinema.diffusion.process import build_process
from kinema.generation.live_bytes import LiveBytes
from kinema.generation.residency import empty_vae
from kinema.models.autoencoder import Autoencoder
from kinema.models.config import ClassTextConfig, CLIPTextConfig, PixArtConfig, TextConfig
from kinema.models.image_vae import ImageVAE
from kinema.models.transformer import ClipShape, Transformer
from kinema.models.vae import VideoVAE
from kinema.training.config import TextToVideoTask, TrainRecipe
from kinema.training.counted_kernels import CountedKernels, DeviceType
from kinema.training.parts import build_model

META = torch.device("meta")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALIKE = 1.25
"""Ratio of areas up to which one size is taken to stand for another."""
FEW = 2
"""Depths (in units of `recompute_every`) that are counted: this, and one more."""


class StepBytes:
    """Counts what steps of one recipe have alive at most, by the shape of the micro-batch.

    Args:
        sharded: weights are gathered in half precision (FSDP2's mixed precision) instead of being
            cast where they are used (autocast).
        device: whose kernels run.
    """

    def __init__(self, recipe: TrainRecipe, *, sharded: bool, device: DeviceType) -> None:
        self.recipe = recipe
        self._device = device
        self._half = None if recipe.precision == "fp32" else DTYPES[recipe.precision]
        self._sharded = sharded
        self._models: dict[int, nn.Module] = {}
        self._vae: Autoencoder | None = None
        self._counted: dict[tuple[Any, ...], int] = {}
        self._first: dict[tuple[Any, ...], Bucket] = {}

    def model(self, bucket: Bucket, clips: int, degree: int = 1) -> int:
        """Bytes of the trained network's forward and backward pass, noise and targets included.

        Of the sizes of one resolution and length, which have nearly the same area, the first that
        is asked for is counted and the others follow from it.

        Args:
            degree: ranks that share the micro-batch; each has that part of the frames.
        """
        counted, scale = self._alike(bucket, clips, degree)
        return round(scale * self._of_model(counted, clips, degree))

    def _alike(self, bucket: Bucket, clips: int, degree: int) -> tuple[Bucket, float]:
        """The bucket to count in place of another, and the ratio of their areas."""
        key = (bucket.resolution, bucket.frames, clips, degree)
        first = self._first.setdefault(key, bucket)
        scale = bucket.height * bucket.width / (first.height * first.width)
        return (first, scale) if 1 / ALIKE < scale < ALIKE else (bucket, 1.0)

    def _of_model(self, bucket: Bucket, clips: int, degree: int) -> int:
        recipe = self.recipe
        if recipe.model is None:
            return self._count(0, bucket, clips, degree)
        depth, unit = recipe.model.depth, recipe.recompute_every
        if depth <= (FEW + 1) * unit or not _blocks_are_alike(recipe):
            return self._count(depth, bucket, clips, degree)
        few = self._count(FEW * unit, bucket, clips, degree)
        more = self._count((FEW + 1) * unit, bucket, clips, degree)
        return few + (more - few) * (depth - FEW * unit) // unit

    def inputs(self, bucket: Bucket, clips: int) -> int:
        """Bytes that are there all the step: pixels, and the captions' features."""
        recipe = self.recipe
        y, _ = self._text(clips)
        held = 0 if y is None else y.numel() * y.element_size()
        if recipe.latent_cache is not None:  # mean and standard deviation
            size = recipe.vae.latent_size(bucket.frames, bucket.height, bucket.width)
            return held + 2 * 4 * clips * recipe.vae.latent_channels * math.prod(size)
        return held + 4 * 3 * bucket.frames * bucket.height * bucket.width * clips

    def encode(self, bucket: Bucket, clips: int, degree: int = 1) -> int:
        """Bytes of the frozen autoencoder at work on a micro-batch, of which each of `degree`
        ranks takes a part; 0 where latents come from a cache."""
        recipe = self.recipe
        if not isinstance(recipe.task, TextToVideoTask) or recipe.latent_cache is not None:
            return 0
        if recipe.task.remember_latents:  # one clip after the other
            clips = 1
        bucket, scale = self._alike(bucket, clips, degree)
        if self._vae is None:
            self._vae = empty_vae(recipe.vae, None)
        key = ("vae", bucket.frames, bucket.height, bucket.width, clips, degree)
        if key not in self._counted:
            frames = -(-bucket.frames // degree)
            self._counted[key] = self._encode(self._vae, frames, bucket, clips)
        return round(scale * self._counted[key])

    def _encode(self, vae: Autoencoder, frames: int, bucket: Bucket, clips: int) -> int:
        """The parts of `VideoVAE.encode`, each at its full size: frames pass the 2D autoencoder a
        few at a time, whole chunks the one over time, and only results stay."""
        height, width = bucket.height, bucket.width
        channels = self.recipe.vae.vae_2d.latent_channels
        _, rows, columns = self.recipe.vae.latent_size(1, height, width)
        place = 4 * channels * rows * columns  # bytes of one frame's latent
        chunk = min(frames, self.recipe.vae.micro_frame_size or frames)
        images = clips * chunk
        portion = min(images, self.recipe.vae.micro_batch_size or images)
        assert isinstance(vae, (VideoVAE, ImageVAE))
        module = vae.spatial_vae.module if isinstance(vae, VideoVAE) else vae
        pixels = torch.empty(portion, 3, height, width, device=META)
        with torch.no_grad():
            spatial = self._peak(lambda: module.encode_frames(pixels))
        # Frames of the chunk one after another (a copy, for more than one clip), and all moments.
        copied = 4 * 3 * height * width * images if clips > 1 else 0
        of_chunk = copied + 2 * place * images
        peak = spatial + of_chunk
        if isinstance(vae, VideoVAE):
            x = torch.empty(clips, channels, chunk, rows, columns, device=META)
            with torch.no_grad():
                temporal = self._peak(lambda: vae.temporal_vae.encode(x))
            peak = max(peak, temporal + place * images, 6 * place * images)
        else:
            peak = max(peak, 6 * place * images)
        # Noise for the whole clip and its latents, drawn and cut before the first chunk.
        return peak + 2 * place * clips * frames

    def _count(self, depth: int, bucket: Bucket, clips: int, degree: int) -> int:
        size = self.recipe.vae.latent_size(bucket.frames, bucket.height, bucket.width)
        latent = (-(-size[0] // degree), *size[1:])
        key = (depth, bucket.frames, bucket.height, bucket.width, clips, degree)
        if key not in self._counted:
            network = self._model(depth)
            if isinstance(network, VideoVAE):
                step = self._autoencoder_step(network, bucket, clips)
            else:
                assert isinstance(network, Transformer)
                step = self._diffusion_step(network, latent, bucket, clips)
            counted = self._peak(step, forgets=True)
            if degree > 1:  # what an exchange sends and what it receives
                assert self.recipe.model is not None
                width = self.recipe.model.hidden_size * (2 if self._half else 4)
                tokens = self.recipe.model.num_tokens(latent)
                counted += 2 * clips * tokens * width
            self._counted[key] = counted
        return self._counted[key]

    def _model(self, depth: int) -> nn.Module:
        if depth not in self._models:
            recipe = replace(self.recipe, compile=False)
            if recipe.model is not None:
                recipe = replace(recipe, model=replace(recipe.model, depth=depth))
            with META:
                model = build_model(recipe).train()
            if self._sharded and self._half is not None:
                model = model.to(self._half)
            for parameter in model.parameters():
                if parameter.requires_grad:  # gradients are added to what is there already
                    parameter.grad = torch.zeros_like(parameter)
            self._models[depth] = model
        return self._models[depth]

    def _text(self, clips: int) -> tuple[Tensor | None, Tensor | None]:
        return text_features(self.recipe.text, clips)

    def _diffusion_step(
        self, model: Transformer, latent: tuple[int, ...], bucket: Bucket, clips: int
    ) -> Callable[[], Tensor]:
        recipe = self.recipe
        assert recipe.diffusion is not None
        assert isinstance(recipe.task, TextToVideoTask)
        process = build_process(recipe.diffusion)
        masked = recipe.task.masks.ratios()["identity"] < 1
        y, mask = self._text(clips)
        assert y is not None

        def forward() -> Tensor:
            with META:
                x0 = torch.empty(clips, model.config.in_channels, *latent)
                noise = torch.empty_like(x0)
                t = torch.empty(clips)
                of_clip = torch.empty(clips)
                noised = torch.empty(clips, latent[0], dtype=torch.bool) if masked else None
                drop = torch.empty(clips, dtype=torch.bool)
            given = model.drop_text(y, drop) if model.config.class_dropout_prob > 0 else y
            prediction = model.predict(
                process.add_noise(x0, noise, t, noised),
                t,
                given,
                mask=mask,
                x_mask=noised,
                shape=ClipShape(fps=of_clip, height=of_clip, width=of_clip, num_frames=of_clip),
            )
            terms = process.loss_terms(prediction, x0, noise, t, mask=noised)
            return torch.stack([of_sample.mean() for of_sample in terms.values()]).sum()

        return forward

    def _autoencoder_step(
        self, model: VideoVAE, bucket: Bucket, clips: int
    ) -> Callable[[], Tensor]:
        config = model.config
        video = torch.empty(clips, 3, bucket.frames, bucket.height, bucket.width, device=META)
        t, rows, columns = config.latent_size(bucket.frames, bucket.height, bucket.width)

        def forward() -> Tensor:
            with META:
                spatial = torch.empty(
                    clips, config.vae_2d.latent_channels, bucket.frames, rows, columns
                )
                temporal = torch.empty(clips, config.latent_channels, t, rows, columns)
            output = model(video, noise=(spatial, temporal))
            loss = (output.video.float() - video.float()).abs().mean()
            loss = loss + output.posterior.kl().sum() + output.spatial_posterior.kl().sum()
            assert isinstance(loss, Tensor)
            return loss

        return forward

    def _peak(self, call: Callable[[], Tensor], *, forgets: bool = False) -> int:
        """Most bytes alive in `call`, and with `forgets` in the backward pass from its result."""
        with self._counting() as (kernels, live):
            result = call()
            if forgets:
                kernels.forget_casts()
                _backward(result)
            peak = live.peak
            del result
        return peak

    @contextmanager
    def _counting(self) -> Iterator[tuple[CountedKernels, LiveBytes]]:
        cast = None if self._sharded else self._half
        with CountedKernels(self._device, cast) as kernels, LiveBytes() as live:
            yield kernels, live


def text_features(text: TextConfig | None, clips: int) -> tuple[Tensor | None, Tensor | None]:
    """Features of captions that fill the encoder, without values, and their mask."""
    if text is None:
        return None, None
    if isinstance(text, ClassTextConfig):
        return torch.empty(clips, dtype=torch.int64, device=META), None
    if isinstance(text, CLIPTextConfig):
        return torch.empty(clips, 1, text.dim, device=META), None
    y = torch.empty(clips, 1, text.max_tokens, text.dim, device=META)
    # The mask decides sizes, so it has values.
    return y, torch.ones(clips, text.max_tokens, dtype=torch.bool)


def _backward(loss: Tensor) -> None:
    """`loss.backward()`, in which function modes stay on for what is recomputed."""
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), True, True
    )


def _blocks_are_alike(recipe: TrainRecipe) -> bool:
    """Whether a shallower model is the same one with fewer blocks."""
    named = any(part.isdecimal() for name in recipe.freeze for part in name.split("."))
    special = isinstance(recipe.model, PixArtConfig) and recipe.model.kv_compress is not None
    return not named and not special
