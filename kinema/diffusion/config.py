"""Settings of the diffusion processes and of the frames kept clean in training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kinema.config.settings import settings

FrameMaskKind = Literal[
    "identity",
    "random",
    "interpolate",
    "quarter_random",
    "quarter_head",
    "quarter_tail",
    "quarter_head_tail",
    "image_random",
    "image_head",
    "image_tail",
    "image_head_tail",
]
"""Which latent frames stay clean; `kinema.diffusion.masks.frame_mask` says what each does."""


@settings
class RectifiedFlowConfig:
    """Rectified flow as in Open-Sora 1.2; `kinema.diffusion.rectified_flow` has the formulas."""

    type: Literal["rflow"] = "rflow"
    num_timesteps: int = 1000
    """Timestep of pure noise: t runs from 0 (clip) to this."""
    sample_method: Literal["uniform", "logit-normal"] = "uniform"
    """Distribution of training timesteps."""
    loc: float = 0.0
    """Mean of the normal draw behind logit-normal."""
    scale: float = 1.0
    """Standard deviation of the normal draw behind logit-normal."""
    use_discrete_timesteps: bool = False
    """Whole timesteps only, in training and in sampling."""
    use_timestep_transform: bool = False
    """Shift timesteps towards noise for clips of more pixels and frames, in both directions."""
    transform_scale: float = 1.0
    """Factor of the shift."""
    num_sampling_steps: int = 30
    """Default number of sampling steps."""
    cfg_scale: float = 7.0
    """Default scale of classifier-free guidance; 1 is none."""

    def __post_init__(self) -> None:
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps is {self.num_timesteps}; it must be at least 1")
        if self.num_sampling_steps < 1:
            raise ValueError(
                f"num_sampling_steps is {self.num_sampling_steps}; it must be at least 1"
            )
        if self.scale <= 0:
            raise ValueError(f"scale is {self.scale}; a standard deviation must be above 0")
        if self.transform_scale <= 0:
            raise ValueError(f"transform_scale is {self.transform_scale}; it must be above 0")
        if self.cfg_scale < 0:
            raise ValueError(f"cfg_scale is {self.cfg_scale}; it must not be negative")
        if self.sample_method == "uniform" and (self.loc, self.scale) != (0.0, 1.0):
            raise ValueError("loc and scale have no effect with sample_method: uniform")
        if self.sample_method == "logit-normal" and self.use_discrete_timesteps:
            raise ValueError(
                "sample_method: logit-normal has no effect with use_discrete_timesteps: true, "
                "which draws whole timesteps uniformly"
            )
        if not self.use_timestep_transform and self.transform_scale != 1.0:
            raise ValueError("transform_scale has no effect without use_timestep_transform: true")


@settings
class IDDPMConfig:
    """Improved DDPM as in Open-Sora 1.0 and 1.1, DiT, Latte and PixArt: the network predicts noise
    and, in further channels, a variance between two bounds (Nichol and Dhariwal, 2021)."""

    type: Literal["iddpm"] = "iddpm"
    num_timesteps: int = 1000
    """Steps of the (linear) noise schedule; timesteps run from 0 to one below this."""
    sampler: Literal["iddpm", "dpm-solver"] = "iddpm"
    """How to sample: ancestral with respaced timesteps, or DPM-Solver++ (second order)."""
    num_sampling_steps: int = 100
    """Default number of sampling steps."""
    cfg_scale: float = 7.0
    """Default scale of classifier-free guidance; 1 is none."""
    cfg_channel: int | None = None
    """Guide this many channels of the predicted noise, as published samples of 1.0 and 1.1 did
    (3 of 4); null guides all. DPM-Solver guides all in any case, as the originals' does."""
    tables: Literal["float64", "float32"] = "float64"
    """Precision in which the numbers of the noise schedule are worked out: float64 in 1.0, DiT
    and PixArt, float32 in 1.1 and in 1.2's copy, up to 2e-4 off. The rest is float32 anyway."""

    def __post_init__(self) -> None:
        if self.num_timesteps < 21:
            raise ValueError(
                f"num_timesteps is {self.num_timesteps}; it must be at least 21: with fewer, the "
                "linear schedule would have to add a variance above 1"
            )
        if not 1 <= self.num_sampling_steps <= self.num_timesteps:
            raise ValueError(
                f"num_sampling_steps is {self.num_sampling_steps}; it must be from 1 to "
                f"num_timesteps ({self.num_timesteps})"
            )
        if self.cfg_scale < 0:
            raise ValueError(f"cfg_scale is {self.cfg_scale}; it must not be negative")
        if self.cfg_channel is not None and self.cfg_channel < 1:
            raise ValueError(f"cfg_channel is {self.cfg_channel}; at least 1, or null for all")


ProcessConfig = Annotated[RectifiedFlowConfig | IDDPMConfig, Field(discriminator="type")]


def process_mismatch(process: ProcessConfig, *, channels: int, pred_sigma: bool) -> str | None:
    """Why a network cannot be trained or sampled by this process; None if it can.

    Args:
        channels: of the latent (`model.in_channels`).
        pred_sigma: whether the network predicts a variance besides (`model.pred_sigma`).
    """
    if not isinstance(process, IDDPMConfig):
        return None
    if not pred_sigma:
        return (
            "model.pred_sigma is false, but diffusion type `iddpm` needs the variance that it "
            "stands for: pred_sigma: true, or diffusion type `rflow`"
        )
    if process.cfg_channel is not None and process.cfg_channel > channels:
        return (
            f"diffusion.cfg_channel is {process.cfg_channel}, but the latent has {channels} "
            "channels (model.in_channels)"
        )
    return None


@settings
class FrameMaskConfig:
    """Share of training samples that get each kind of frame mask; the rest gets none."""

    random: float = 0.0
    interpolate: float = 0.0
    intepolate: float | None = None
    """`interpolate` as published recipes spell it; read into `interpolate`."""
    quarter_random: float = 0.0
    quarter_head: float = 0.0
    quarter_tail: float = 0.0
    quarter_head_tail: float = 0.0
    image_random: float = 0.0
    image_head: float = 0.0
    image_tail: float = 0.0
    image_head_tail: float = 0.0
    identity: float | None = None
    """No frame clean: the rest to 1. It need not be given; if it is, all must sum to 1."""

    def __post_init__(self) -> None:
        if self.intepolate is not None:
            if self.interpolate:
                raise ValueError("interpolate and intepolate are the same ratio: give one")
            object.__setattr__(self, "interpolate", self.intepolate)
            object.__setattr__(self, "intepolate", None)
        ratios = self._drawn()
        for kind, ratio in ratios.items():
            if not 0.0 <= ratio <= 1.0:
                raise ValueError(f"{kind} is {ratio}; a ratio lies between 0 and 1")
        total = sum(ratios.values())
        if total > 1.0 + 1e-6:
            raise ValueError(f"the ratios sum to {total:g}; they may sum to 1 at most")
        if self.identity is not None and abs(self.identity + total - 1.0) > 1e-6:
            raise ValueError(
                f"identity is {self.identity:g} and the others sum to {total:g}: identity is "
                f"the rest, {max(0.0, 1.0 - total):g}; correct it or leave it out"
            )

    def ratios(self) -> dict[FrameMaskKind, float]:
        """Ratio of every kind, `identity` last, in the order in which one draw is compared."""
        drawn = self._drawn()
        return {**drawn, "identity": max(0.0, 1.0 - sum(drawn.values()))}

    def _drawn(self) -> dict[FrameMaskKind, float]:
        return {
            "random": self.random,
            "interpolate": self.interpolate,
            "quarter_random": self.quarter_random,
            "quarter_head": self.quarter_head,
            "quarter_tail": self.quarter_tail,
            "quarter_head_tail": self.quarter_head_tail,
            "image_random": self.image_random,
            "image_head": self.image_head,
            "image_tail": self.image_tail,
            "image_head_tail": self.image_head_tail,
        }
