"""Rectified flow as in Open-Sora 1.2, for training and for sampling, without a network.

The path and its velocity are those of Liu et al., "Flow Straight and Fast" (2022); the shift of
timesteps by size follows Esser et al., "Scaling Rectified Flow Transformers" (2024), section
5.3.2, extended to frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kinema.diffusion.config import RectifiedFlowConfig
from kinema.diffusion.process import Network, NoiseOfStep, guided

SHIFT_BASE_PIXELS = 512 * 512
SHIFT_BASE_FRAMES = 1


class RectifiedFlow:
    """The straight path between a clip and noise.

    Timesteps t run from 0 (the clip) to `num_timesteps` (pure noise; 1000 by default), and
    `x_t = (1 - s)·x0 + s·noise` with `s = t / num_timesteps`. The network predicts the velocity
    towards the clip, `v = x0 - noise`; sampling goes from high t to low and adds `v·ds`.

    Shapes: clips, noise and velocities `[B, C, T, H, W]` (latents), timesteps `[B]`, frame masks
    bool `[B, T]`, True = noised. All arithmetic is float32 whatever comes in: differences of
    nearby timesteps and of noise and clip do not survive bf16. A network that predicts more than
    C channels (1.x's heads also carry a variance) has its velocity in the first C.
    """

    terms: tuple[str, ...] = ("mse",)

    def __init__(self, config: RectifiedFlowConfig) -> None:
        self.config = config

    # Timesteps

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """The raw draws for `training_timesteps`, float32 `[B]` on the generator's device:
        standard normal for logit-normal, else uniform in [0, 1)."""
        fill = torch.randn if self.config.sample_method == "logit-normal" else torch.rand
        return fill(batch_size, generator=generator, device=generator.device)

    def training_timesteps(
        self,
        draws: Tensor,
        *,
        latent_frames: Tensor | int,
        height: Tensor | int,
        width: Tensor | int,
    ) -> Tensor:
        """Timesteps for a training batch from its raw draws (see `draw`).

        Args:
            draws: `[B]`.
            latent_frames: T of the latent, per batch or `[B]`; see `shift`.
            height, width: of the clip in pixels, per batch or `[B]`.

        Returns:
            float32 `[B]` in [0, num_timesteps].
        """
        draws = draws.float()
        if self.config.sample_method == "logit-normal":
            t = torch.sigmoid(self.config.loc + self.config.scale * draws)
            t = t * self.config.num_timesteps
        else:
            t = draws * self.config.num_timesteps
        if self.config.use_discrete_timesteps:
            t = t.floor()
        return self._shifted(t, latent_frames, height, width)

    def sampling_timesteps(
        self,
        steps: int,
        *,
        latent_frames: Tensor,
        height: Tensor,
        width: Tensor,
    ) -> Tensor:
        """Timesteps that sampling visits, from noise down; the last step ends at 0.

        Args:
            latent_frames, height, width: `[B]` each; as in `training_timesteps`.

        Returns:
            float32 `[steps, B]`.
        """
        n = self.config.num_timesteps
        levels = [(1.0 - i / steps) * n for i in range(steps)]
        if self.config.use_discrete_timesteps:
            levels = [float(round(level)) for level in levels]
        t = torch.tensor(levels, dtype=torch.float32, device=height.device)
        t = t[:, None].expand(steps, len(height))
        return self._shifted(t, latent_frames, height, width)

    def _shifted(
        self, t: Tensor, frames: Tensor | int, height: Tensor | int, width: Tensor | int
    ) -> Tensor:
        if not self.config.use_timestep_transform:
            return t
        return shift(
            t,
            latent_frames=frames,
            height=height,
            width=width,
            scale=self.config.transform_scale,
            num_timesteps=self.config.num_timesteps,
        )

    # Training

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x_t`, float32; frames where `mask` is False stay as they are in `x0`."""
        s = (t.float() / self.config.num_timesteps).view(-1, 1, 1, 1, 1)
        x0 = x0.float()
        x_t = (1.0 - s) * x0 + s * noise.float()
        return x_t if mask is None else torch.where(_per_frame(mask), x_t, x0)

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """The velocity to predict, float32: `x0 - noise`."""
        return x0.float() - noise.float()

    def loss(
        self,
        prediction: Tensor,
        x0: Tensor,
        noise: Tensor,
        t: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Squared error of the velocity, averaged over each sample.

        Args:
            prediction: `[B, >=C, T, H, W]`.
            t: not needed: the velocity is the same all along the path.
            mask: frames that count (True); a sample without any has loss 0.
            weight: `[B]`, factor of each sample's loss, chosen by its timestep.

        Returns:
            float32 `[B]`.
        """
        velocity = prediction[:, : x0.shape[1]].float()
        error = (velocity - self.target(x0, noise)).square().mean(dim=(1, 3, 4))  # [B, T]
        if mask is None:
            loss = error.mean(dim=1)
        else:
            # where, not times: a clean frame's error may be inf and must not become NaN.
            loss = torch.where(mask, error, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return loss if weight is None else loss * weight.float()

    def loss_terms(
        self,
        prediction: Tensor,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        *,
        mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`loss` under its name."""
        return {"mse": self.loss(prediction, x0, noise, t, mask=mask)}

    # Sampling

    def guided(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of two network outputs, all channels."""
        return guided(cond, uncond, scale)

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
        """Carry `z` along the predicted velocity from noise to a clip.

        Args:
            network: predicts the velocity, in its first C channels.
            z: `[B, C, T, H, W]`: noise, or, with a mask, clean latents where the mask is below 1.
            timesteps: `[steps, B]` from `sampling_timesteps`.
            mask: float `[B, T]` in [0, 1]: 1 generates a frame, 0 keeps it, a value between
                keeps it until the noise level has come down to that value, then noises it to
                that level and generates from there. The network gets `x_mask`: True where a
                frame is being generated.
            noise: needed with a mask that has values between 0 and 1. Keyed by step and by
                each sample's own seed, so that a sample does not depend on its batch.
            on_step: called with the number of finished steps.

        Returns:
            float32 `[B, C, T, H, W]`.
        """
        n = self.config.num_timesteps
        z = z.float()
        following = torch.cat([timesteps[1:], torch.zeros_like(timesteps[:1])])
        x_masks: Sequence[Tensor | None] = [None] * len(timesteps)
        joining: dict[int, Tensor] = {}  # frames that a step finds clean, and noises first
        if mask is not None:
            generated = mask * n >= timesteps[:, :, None]  # [steps, B, T]
            fresh = generated & ~torch.cat([(mask == 1.0)[None], generated[:-1]])
            # Asked of the device once, not in every step.
            steps = fresh.flatten(1).any(dim=1).nonzero().flatten().tolist()
            joining = {step: fresh[step] for step in steps}
            x_masks = generated.unbind()
        for step, (t, t_next) in enumerate(zip(timesteps, following, strict=True)):
            x_mask = x_masks[step]
            if step in joining:
                assert noise is not None, "a mask between 0 and 1 needs noise"
                z = self.add_noise(z, noise(step), t, joining[step])
            v = network(z, t, x_mask)[:, : z.shape[1]].float()
            moved = z + v * ((t - t_next) / n).view(-1, 1, 1, 1, 1)
            z = moved if x_mask is None else torch.where(_per_frame(x_mask), moved, z)
            if on_step is not None:
                on_step(step + 1)
        return z


def shift(
    t: Tensor,
    *,
    latent_frames: Tensor | int,
    height: Tensor | int,
    width: Tensor | int,
    scale: Tensor | float = 1.0,
    num_timesteps: int = 1000,
) -> Tensor:
    """Move timesteps towards noise for larger clips, in which the same noise hides less.

    With `r = scale · sqrt(pixels / 512²) · sqrt(latent_frames)` and `s = t / num_timesteps`,
    `s' = r·s / (1 + (r - 1)·s)`: 0 and `num_timesteps` stay where they are.

    Args:
        t: float `[..., B]` in [0, num_timesteps].
        latent_frames: frames of the latent, at least 1: ask the latent (its T). 1.2 computes
            `frames // 17 * 5` instead, the same for the frame counts that it trains on, but 0
            below 17 frames, where its shift sends every timestep to 0 or NaN.
        height, width: of the clip in pixels.

    Returns:
        float32, shape of `t`.
    """
    device = t.device
    pixels = torch.as_tensor(height, dtype=torch.float32, device=device) * width
    frames = torch.as_tensor(latent_frames, dtype=torch.float32, device=device).clamp(min=1)
    ratio = scale * (pixels / SHIFT_BASE_PIXELS).sqrt() * (frames / SHIFT_BASE_FRAMES).sqrt()
    s = t.float() / num_timesteps
    # Rounding may carry pure noise a hair above 1, and sampling masks compare with it.
    return (ratio * s / (1.0 + (ratio - 1.0) * s)).clamp(max=1.0) * num_timesteps


def _per_frame(mask: Tensor) -> Tensor:
    return mask[:, None, :, None, None]
