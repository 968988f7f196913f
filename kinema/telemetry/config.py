"""Where a run's record goes besides its own folder."""

from __future__ import annotations

from typing import Literal

from kinema.config.settings import settings


@settings
class WandbConfig:
    """Weights & Biases, an optional extra: `pip install 'kinema[wandb]'`."""

    project: str = "kinema"
    """Project that the run appears in."""
    entity: str | None = None
    """Team or user; your default one if left out."""
    name: str | None = None
    """Name of the run; the run folder's name if left out."""
    mode: Literal["online", "offline"] | None = None
    """`offline` writes to the run folder, for `wandb sync` later; null: as the environment variable
    WANDB_MODE says, and online where it says nothing."""


@settings
class TrackingConfig:
    """Trackers; `log.jsonl` and the printed line are always there."""

    tensorboard: bool = True
    """Write scalars and videos to `tensorboard/` in the run folder."""
    wandb: WandbConfig | None = None
    """Weights & Biases, where given."""
    peak_tflops: float | None = None
    """What MFU is a share of: TFLOP/s of one device. Null takes what the maker of the GPU states,
    as far as it is known."""

    def __post_init__(self) -> None:
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"peak_tflops is {self.peak_tflops}; it must be above 0")
