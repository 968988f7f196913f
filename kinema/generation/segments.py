"""A request on its way through its segments: texts, references, latents and frames so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kinema.generation import engine, mask_strategy
from kinema.generation.config import GenerateRequest, PipelineConfig
from kinema.generation.mask_strategy import FrameConditioning
from kinema.generation.noise import Shape
from kinema.generation.prompts import segment_texts
from kinema.generation.references import ReferencePlan
from kinema.models.autoencoder import Autoencoder


@dataclass
class Job:
    """What is known of one request between the phases; tensors are on the CPU."""

    number: int
    """Place among the requests of the call."""
    request: GenerateRequest
    plan: ReferencePlan
    """What it takes from references and from one segment to the next."""
    config: PipelineConfig
    references: tuple[Tensor, ...] = ()
    """Encoded, `[C, t, h, w]` each; what a segment takes over from the one before is added."""
    latents: Tensor | None = None
    """Of the segment sampled last, normalised, float32 `[C, T, H, W]`."""
    frames: list[np.ndarray] = field(default_factory=list)
    """uint8 `[t, H, W, 3]` of each finished segment, without those it took over."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time by phase; of a batch, all of it."""

    def __post_init__(self) -> None:
        self.texts = segment_texts(self.request)
        """One for each segment."""
        self._placements = self.plan.placements

    @property
    def has_references(self) -> bool:
        return bool(self.plan.references)

    def encode_references(self, vae: Autoencoder, device: torch.device) -> None:
        """Read the references and encode them.

        Raises:
            MediaError: a file that cannot be decoded.
        """
        self.references = self.plan.encode(
            lambda pixels: engine.encode(vae, pixels, device),
            self.config.vae.config,
            height=self.request.height,
            width=self.request.width,
        )

    def conditioning(self, segment: int, shape: Shape) -> FrameConditioning | None:
        """The frames of a segment that are given."""
        return mask_strategy.condition(
            self._placements, self.references, segment, shape, self.plan.align
        )

    def decode(self, vae: Autoencoder, segment: int, device: torch.device) -> None:
        """Make frames of the segment sampled last, and what the next one goes on from.

        As the original does, the next segment starts from these frames encoded again, not from
        the latents that they were decoded from.
        """
        assert self.latents is not None
        video = engine.decode(vae, self.latents, self.request.num_frames, device)
        shown = self.plan.overlap_frames if segment else 0
        self.frames.append(engine.to_bytes(video[:, shown:]))
        if segment + 1 < self.request.loop:
            self._placements, self.references = mask_strategy.continue_from(
                self._placements,
                self.references,
                engine.encode(vae, video, device),
                segment + 1,
                self.plan.overlap,
                self.request.condition_frame_edit,
            )

    @property
    def waiting_bytes(self) -> int:
        """Most that its finished segments take while others are to come."""
        request = self.request
        return (request.loop - 1) * request.num_frames * request.height * request.width * 3

    def forget(self) -> None:
        """Let go of everything that was made."""
        self.latents, self.references = None, ()
        self.frames = []

    def video(self) -> np.ndarray:
        """The finished frames of all segments, one after the other."""
        return self.frames[0] if len(self.frames) == 1 else np.concatenate(self.frames)


def batches_of(
    requests: Sequence[GenerateRequest], size: int, alike: Callable[[GenerateRequest], object]
) -> list[list[int]]:
    """Places of requests, grouped: neighbours that are `alike` share a batch of up to `size`."""
    batches: list[list[int]] = []
    for number, request in enumerate(requests):
        last = batches[-1] if batches else []
        if last and len(last) < size and alike(requests[last[0]]) == alike(request):
            last.append(number)
        else:
            batches.append([number])
    return batches
