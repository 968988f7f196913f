"""What is trained. A task turns a micro-batch into a loss; the loop does everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from kinema.data.loader import Batch
from kinema.diffusion.masks import frame_masks
from kinema.diffusion.process import build_process
from kinema.models.autoencoder import Autoencoder
from kinema.models.transformer import ClipShape, Transformer
from kinema.models.vae import VideoVAE
from kinema.parallel.encode import encode_shared
from kinema.parallel.sequence import SequenceGroups
from kinema.telemetry.spans import Spans
from kinema.training.config import TrainRecipe, VAETask
from kinema.training.draws import Draws
from kinema.training.encode import LatentMemory, TextSource


@dataclass(frozen=True)
class LossReport:
    """What a task says about one micro-batch.

    Attributes:
        loss: scalar float32, the mean over the micro-batch, to be differentiated.
        parts: further scalars for the log, detached.
        samples: loss of each sample, `[B]`, detached; None where there is no noise.
        levels: how much noise each sample has: timestep over the number of timesteps, float64
            `[B]`; 0 is data, 1 is noise.
    """

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    samples: Tensor | None = None
    levels: Tensor | None = None


class Task(Protocol):
    """A kind of training."""

    parts: tuple[str, ...]
    """Names of `LossReport.parts`."""

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> LossReport:
        """The loss of one micro-batch, whose tensors are on the model's device already."""
        ...

    def finalise(self, model: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> None:
        """Fill in what is measured rather than trained, before `model` is saved.

        Args:
            batches: gives the first videos of the data, `[B, 3, T, H, W]`, anew at each call.
        """
        ...


class TextToVideo:
    """Diffusion on latents of videos, given their captions.

    Args:
        vae: frozen, on the device; None where micro-batches bring latents.
        memory: of latents; None encodes each step anew.
        spans: takes the time of encoding.
        groups: of ranks that share a clip, and its encoding.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        vae: Autoencoder | None,
        text: TextSource,
        memory: LatentMemory | None,
        spans: Spans,
        groups: SequenceGroups,
    ) -> None:
        assert recipe.task.type == "text-to-video"
        assert recipe.diffusion is not None
        assert recipe.model is not None
        masks = recipe.task.masks
        self._masks = masks if masks.ratios()["identity"] < 1 else None
        self._process = build_process(recipe.diffusion)
        # A single term is the loss, which the log has anyway.
        terms = self._process.terms
        self.parts: tuple[str, ...] = terms if len(terms) > 1 else ()
        self._drop_probability = recipe.model.class_dropout_prob
        self._vae = vae
        self._memory = memory
        self._text = text
        self._spans = spans
        self._groups = groups

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> LossReport:
        assert isinstance(model, Transformer)
        device, count = batch.video.device, len(batch.rows)
        frames, height, width = batch.num_frames, batch.height, batch.width
        with self._spans("text"):
            y, text_mask = self._text.features(batch.text, batch.rows, device)
        with self._spans("vae"):
            x0 = self._latents(batch, draws.generator("posterior"))

        raw = self._process.draw(count, draws.generator("timestep"))
        t = self._process.training_timesteps(
            raw, latent_frames=x0.shape[2], height=height, width=width
        )
        generator = draws.generator("noise")
        noise = torch.randn(x0.shape, generator=generator, device=device)
        noised = None
        if self._masks is not None:
            on_cpu = draws.generator("frame masks", device="cpu")
            # Otherwise the host would wait here for the autoencoder, with nothing queued behind it.
            noised = frame_masks(self._masks, count, x0.shape[2], on_cpu).to(
                device, non_blocking=True
            )

        with self._spans("forward"):
            if self._drop_probability > 0:
                unit = torch.rand(count, generator=draws.generator("caption"), device=device)
                y = model.drop_text(y, unit < self._drop_probability)
            prediction = model.predict(
                self._process.add_noise(x0, noise, t, noised),
                t,
                y,
                mask=text_mask,
                x_mask=noised,
                shape=ClipShape(
                    fps=batch.fps,
                    height=torch.full((count,), float(height), device=device),
                    width=torch.full((count,), float(width), device=device),
                    num_frames=torch.full((count,), float(frames), device=device),
                ),
            )
            by_sample = self._process.loss_terms(prediction, x0, noise, t, mask=noised)
            terms = {name: of_sample.mean() for name, of_sample in by_sample.items()}
            loss = torch.stack(list(terms.values())).sum()
            return LossReport(
                loss,
                {name: terms[name].detach() for name in self.parts},
                samples=torch.stack([s.detach() for s in by_sample.values()]).sum(0),
                levels=t.double() / self._process.config.num_timesteps,
            )

    def _latents(self, batch: Batch, posterior: torch.Generator) -> Tensor:
        """Normalised latents of a micro-batch, float32 `[B, C, t, h, w]`."""
        if batch.latents is not None:
            mean, std = batch.latents
            return mean + std * torch.randn(mean.shape, generator=posterior, device=mean.device)
        assert self._vae is not None
        # Autocast would compute the norms of half-precision weights in float32.
        whole = next(self._vae.parameters()).dtype == torch.float32
        kind = batch.video.device.type
        with torch.autocast(kind, enabled=whole and torch.is_autocast_enabled(kind)):
            if self._memory is not None:
                return self._memory.latents(self._vae, batch)
            return encode_shared(self._vae, batch.video, posterior, self._groups)

    def finalise(self, model: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> None:
        """Nothing here is measured."""


class Reconstruction:
    """Reconstruction: `L1 + kl_weight · KL`, both means over their elements.

    The KL is that of the latents the transformer sees (the temporal posterior) and that of the
    2D latents, added.
    """

    parts: tuple[str, ...] = ("l1", "kl")

    def __init__(self, recipe: TrainRecipe, spans: Spans) -> None:
        assert isinstance(recipe.task, VAETask)
        self._kl_weight = recipe.task.kl_weight
        self._spans = spans

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> LossReport:
        assert isinstance(model, VideoVAE)
        with self._spans("forward"):
            output = model(batch.video, noise=draws.generator("posterior"))
            l1 = (output.video.float() - batch.video.float()).abs().mean()
            kl = output.posterior.kl().sum() / output.posterior.mean.numel()
            kl = kl + output.spatial_posterior.kl().sum() / output.spatial_posterior.mean.numel()
            loss = l1 + self._kl_weight * kl
        return LossReport(loss, {"l1": l1.detach(), "kl": kl.detach()})

    @torch.no_grad()
    def finalise(self, model: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> None:
        """Measure shift and scale, so that latents come out normalised."""
        assert isinstance(model, VideoVAE)

        # From zero, so that the same weights get the same values however often this ran before.
        model.shift.zero_()
        model.scale.fill_(1.0)
        model.fit_normalisation(model.encode(video) for video in batches())
