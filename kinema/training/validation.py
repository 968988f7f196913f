"""The loss on held-out clips: fixed clips, noise and timesteps, so that numbers can be compared.

Nothing is drawn: each clip's first window, the mean of its posterior, its caption, no masked
frames, noise that depends on the clip's row alone, and timesteps at equal distances. What one rank
computes does not depend on how many there are: clips are dealt out whole, every number is computed
as it would be on one rank, and all ranks then add them up in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.config.errors import KinemaError
from kinema.data.manifest import Manifest
from kinema.diffusion.config import IDDPMConfig
from kinema.diffusion.process import build_process
from kinema.media.errors import MediaError
from kinema.models.text import TextEncoder
from kinema.models.transformer import ClipShape, Transformer
from kinema.parallel.engine import Engine
from kinema.parallel.world import World
from kinema.telemetry.progress import Progress
from kinema.telemetry.run_log import say
from kinema.telemetry.spans import Spans
from kinema.training.config import TrainRecipe
from kinema.training.draws import Draws
from kinema.training.encode import CachedTextEncoder
from kinema.training.feed import bucket_label
from kinema.training.held_out import Prepared, Preparer, choose, refuse_shared
from kinema.training.parts import Frozen
from kinema.training.stand_in import stand_in_loss
from kinema.training.state import TrainState

KEPT_BYTES = 4 << 30
"""Latents and text features that a rank keeps in host memory from one validation to the next; what
is beyond is decoded and encoded again."""
SEED = 0
"""Of the noise: the same in every run, so that runs can be compared."""


def levels(count: int) -> list[float]:
    """Shares of noise at equal distances between data (0) and noise (1), both left out."""
    return [(i + 1) / (count + 1) for i in range(count)]


@dataclass(frozen=True)
class _Part:
    """Some timesteps of a clip, which run at once."""

    clip: int
    first: int
    last: int


class Validation:
    """The validation of a run, on each of its ranks.

    Raises:
        KinemaError: clips that are trained on as well, none that fits a bucket, captions that the
            text encoder or its cache does not take.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        training: Manifest,
        frozen: Frozen,
        engine: Engine,
        world: World,
        spans: Spans,
    ) -> None:
        assert recipe.validation is not None
        assert recipe.diffusion is not None
        config = recipe.validation
        self.every = config.every
        manifest = Manifest.read(config.path)
        manifest.require_captions()
        refuse_shared(manifest, training)
        self.clips = choose(manifest, recipe.data, config.clips_per_bucket)
        encoder = _encoder(recipe, frozen)
        encoder.check(sorted({manifest.text(clip.row) for clip in self.clips}))
        assert frozen.vae is not None, "loaded where there is validation"
        self._preparer = Preparer(manifest, recipe.data, frozen.vae, encoder, world.device)
        self._path = manifest.path
        self._process = build_process(recipe.diffusion)
        self._levels = levels(config.timesteps)
        self._engine = engine
        self._world = world
        self._spans = spans
        self._kept: dict[int, Prepared] = {}
        self._unreadable: set[int] = set()

    def run(self, state: TrainState) -> dict[str, float]:
        """Validate the averaged weights, or the weights where no average is kept. Collective.

        The weights are as before afterwards, to the last bit; meanwhile nobody may read them.

        Returns:
            `val_loss` (each clip and timestep weighs the same), `val/BUCKET`, `val_t/LEVEL`.
        """
        assert isinstance(state.model, Transformer)
        table = torch.zeros(len(self.clips), len(self._levels) + 1, dtype=torch.float64)
        with ExitStack() as stack:
            if self._world.is_main:
                own = len(range(0, len(self.clips), self._world.size))
                bar = stack.enter_context(Progress("validating", total=own, unit="clip"))
            stack.enter_context(torch.no_grad())
            stack.enter_context(_averaged(state))
            state.model.eval()
            stack.callback(state.model.train)
            prepared = self._prepared()
            for first in range(0, len(self.clips), self._world.size):
                with self._spans("validation"):
                    self._round(state.model, first, prepared, table)
                if self._world.is_main:
                    bar.advance()
        with self._spans("validation"):
            # Every number comes from one rank and is added to zeros.
            self._world.sum(table)
        return self._summary(table)

    def _round(
        self, model: Transformer, first: int, prepared: Iterator[Prepared | None], table: Tensor
    ) -> None:
        """One clip of every rank, as far as there are more."""
        mine = first + self._world.rank
        clip = next(prepared) if mine < len(self.clips) else None
        done = 0
        if clip is not None:
            for part in self._parts(mine):
                table[mine, part.first : part.last] = self._losses(model, part, clip)
                done += 1
            table[mine, -1] = 1.0
        if not self._engine.sharded:
            return
        # Under sharding every rank runs as many passes as the one that has most.
        all_of_round = range(first, min(first + self._world.size, len(self.clips)))
        for _ in range(done, max(len(self._parts(i)) for i in all_of_round)):
            with self._engine.forward():
                stand_in_loss(model, self._world.device)

    def _parts(self, index: int) -> list[_Part]:
        """The passes that a clip needs: as many timesteps at once as clips in a micro-batch."""
        count, at_once = len(self._levels), self.clips[index].bucket.max_batch
        return [
            _Part(index, first, min(first + at_once, count)) for first in range(0, count, at_once)
        ]

    def _losses(self, model: Transformer, part: _Part, prepared: Prepared) -> Tensor:
        """Losses of some timesteps of a clip, float64 on the CPU."""
        clip, device = self.clips[part.clip], self._world.device
        shares = torch.tensor(self._levels[part.first : part.last], dtype=torch.float64)
        config = self._process.config
        t = shares * config.num_timesteps
        if isinstance(config, IDDPMConfig) or config.use_discrete_timesteps:
            t = t.floor()
        t = t.float().to(device)
        count = len(t)
        latents = prepared.latents
        # On the CPU: the same noise on every kind of device.
        generator = Draws(SEED, 0, clip.row, torch.device("cpu")).generator("validation noise")
        noise = torch.randn(latents.shape, generator=generator)
        x0, noise = (v.to(device).expand(count, *v.shape[1:]) for v in (latents, noise))
        y = prepared.y.to(device)
        mask = prepared.mask

        def same(value: float) -> Tensor:
            return torch.full((count,), value, device=device)

        bucket = clip.bucket
        with self._engine.forward():
            prediction = model.predict(
                self._process.add_noise(x0, noise, t, None),
                t,
                y.expand(count, *y.shape[1:]),
                mask=None if mask is None else mask.expand(count, *mask.shape[1:]),
                x_mask=None,
                shape=ClipShape(
                    fps=same(prepared.fps),
                    height=same(float(bucket.height)),
                    width=same(float(bucket.width)),
                    num_frames=same(float(bucket.frames)),
                ),
            )
            terms = self._process.loss_terms(prediction, x0, noise, t)
        return torch.stack(list(terms.values())).double().sum(0).cpu()

    def _prepared(self) -> Iterator[Prepared | None]:
        """This rank's clips, in order; None for one that cannot be read."""
        own = range(self._world.rank, len(self.clips), self._world.size)
        fresh = self._fresh([i for i in own if i not in self._kept and i not in self._unreadable])
        for index in own:
            if index in self._unreadable:
                yield None
            else:
                yield self._kept[index] if index in self._kept else next(fresh)

    def _fresh(self, indices: list[int]) -> Iterator[Prepared | None]:
        if not indices:
            return
        held = sum(clip.nbytes for clip in self._kept.values())
        found = self._preparer.prepare([self.clips[i] for i in indices])
        for index, clip in zip(indices, found, strict=True):
            if isinstance(clip, MediaError):
                self._unreadable.add(index)
                name = self._path(self.clips[index].row)
                say(f"rank {self._world.rank}: validation leaves out {name}: {clip.what}")
                yield None
                continue
            if held + clip.nbytes <= KEPT_BYTES:
                held += clip.nbytes
                self._kept[index] = clip
            yield clip

    def _summary(self, table: Tensor) -> dict[str, float]:
        read = table[:, -1] > 0
        if not bool(read.any()):
            raise KinemaError(
                "none of the validation's clips could be read",
                where="validation.path",
                hint="kinema data check MANIFEST says what is wrong with each",
            )
        losses = table[:, :-1]
        result = {"val_loss": float(losses[read].mean())}
        labels = [bucket_label(clip.bucket) for clip in self.clips]
        for label in dict.fromkeys(labels):
            rows = read & torch.tensor([each == label for each in labels])
            if bool(rows.any()):
                result[f"val/{label}"] = float(losses[rows].mean())
        for level, loss in zip(self._levels, losses[read].mean(0).tolist(), strict=True):
            result[f"val_t/{level:.2f}"] = loss
        return result


def _encoder(recipe: TrainRecipe, frozen: Frozen) -> TextEncoder:
    assert recipe.validation is not None
    assert recipe.text is not None
    cache = recipe.validation.text_cache or recipe.text_cache
    if cache is not None:
        return CachedTextEncoder.open(cache, recipe.text)
    assert frozen.text.encoder is not None
    return frozen.text.encoder


@contextmanager
def _averaged(state: TrainState) -> Iterator[None]:
    """The averaged weights in the weights' place, tensor by tensor and without a copy of all."""
    if state.ema is None:
        yield
        return
    _swap(state)
    try:
        yield
    finally:
        _swap(state)


@torch.no_grad()
def _swap(state: TrainState) -> None:
    assert state.ema is not None
    average = state.ema.state_dict()
    for name, parameter in state.trained.items():
        weight, mean = parameter.detach(), average[name]
        kept = weight.clone()
        weight.copy_(mean)
        mean.copy_(kept)
