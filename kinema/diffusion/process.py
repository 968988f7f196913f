"""What training and generation know of a diffusion process, whichever it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kinema.diffusion.config import IDDPMConfig, ProcessConfig, RectifiedFlowConfig

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`network(x [B,C,T,H,W], t [B], x_mask bool [B,T] or None) -> [B, >=C, T, H, W]`: the network
with everything else bound (text, sizes, guidance)."""
NoiseOfStep = Callable[[int], Tensor]
"""`noise(number) -> [B,C,T,H,W]`, standard normal; the same number must give the same noise, other
numbers other noise. Processes that draw twice in a step also ask for numbers from `steps` on."""


class Process(Protocol):
    """A diffusion process in both directions, without a network.

    Shapes: clips, noise and predictions `[B, C, T, H, W]` (latents), timesteps `[B]`, frame masks
    bool `[B, T]`, True = noised. All arithmetic is float32 whatever comes in.
    """

    terms: tuple[str, ...]
    """Names of what `loss_terms` gives."""

    @property
    def config(self) -> RectifiedFlowConfig | IDDPMConfig: ...

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """The raw draws for `training_timesteps`, float32 `[B]` on the generator's device."""
        ...

    def training_timesteps(
        self,
        draws: Tensor,
        *,
        latent_frames: Tensor | int,
        height: Tensor | int,
        width: Tensor | int,
    ) -> Tensor:
        """Timesteps for a training batch from its raw draws, float32 `[B]`."""
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x_t`, float32; frames where `mask` is False are as clean as the process has it."""
        ...

    def loss_terms(
        self,
        prediction: Tensor,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        *,
        mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of each sample is the sum of these, float32 `[B]` each, over the frames that
        the mask noises.

        Args:
            prediction: of the network for `add_noise(x0, noise, t, mask)`, `[B, >=C, T, H, W]`.
        """
        ...

    def guided(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of the network's two outputs `[B, >=C, T, H, W]`."""
        ...

    def sampling_timesteps(
        self, steps: int, *, latent_frames: Tensor, height: Tensor, width: Tensor
    ) -> Tensor:
        """Timesteps that sampling visits, from noise down, float32 `[steps, B]`."""
        ...

    def sample(
        self,
        network: Network,
        z: Tensor,
        timesteps: Tensor,
        *,
        mask: Tensor | None = None,
        noise: NoiseOfStep | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """From noise to a clip.

        Args:
            z: `[B, C, T, H, W]`: noise, or, with a mask, clean latents where the mask is below 1.
            timesteps: from `sampling_timesteps`.
            mask: float `[B, T]` in [0, 1]: 1 generates a frame, 0 keeps it, a value between keeps
                it until the noise level has come down to that value and generates from there.
            noise: what steps draw, keyed by step and by each sample's own seed, so that a sample
                does not depend on its batch.
            on_step: called with the number of finished steps.

        Returns:
            float32 `[B, C, T, H, W]`.
        """
        ...


def guided(cond: Tensor, uncond: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance, float32: `uncond + scale·(cond - uncond)`.

    At scale 1 this is `cond`: do not run the unconditional pass then. Ho and Salimans, 2022.
    """
    uncond = uncond.float()
    return uncond + scale * (cond.float() - uncond)


def build_process(config: ProcessConfig) -> Process:
    """The process of these settings. Another sampler is another setting: sample with
    `dataclasses.replace(config, sampler="dpm-solver")`."""
    if isinstance(config, RectifiedFlowConfig):
        from kinema.diffusion.rectified_flow import RectifiedFlow

        return RectifiedFlow(config)
    if config.sampler == "dpm-solver":
        from kinema.diffusion.dpm_solver import DPMSolver

        return DPMSolver(config)
    from kinema.diffusion.iddpm import IDDPM

    return IDDPM(config)
