"""What a demo run is: how much of everything, and from which data."""

from __future__ import annotations

from kinema.config.settings import settings


@settings
class DemoConfig:
    """Sizes of a demo. The same settings and seed give the same videos."""

    seed: int = 0
    quick: bool = False
    """A smoke run of about a minute: every stage runs, nothing is learnt."""
    videos: str | None = None
    """A folder of a person's own videos; None is the procedural world."""
    captions: str | None = None
    """Their captions; None looks for `.txt` files beside the videos."""

    def __post_init__(self) -> None:
        if self.captions is not None and self.videos is None:
            raise ValueError("--captions goes with --videos")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to 2^31 - 1")

    @property
    def clips(self) -> int:
        """Clips of the world that are rendered."""
        return 36 if self.quick else 400

    @property
    def prompts(self) -> int:
        """Combinations of the world that no clip shows, to be asked for."""
        return 6 if self.quick else 24

    @property
    def vae_overrides(self) -> list[str]:
        """Changes to the recipe `tiny/vae`."""
        quick = [_SMALL_BATCH, "max_steps=6", "log_every=1"] if self.quick else []
        return [f"seed={self.seed}", *quick]

    @property
    def model_overrides(self) -> list[str]:
        """Changes to the recipe `tiny/world`."""
        quick = [_SMALL_BATCH, "max_steps=4", "log_every=1", "diffusion.num_sampling_steps=6"]
        return [f"seed={self.seed}", *(quick if self.quick else [])]


_SMALL_BATCH = 'data.buckets={"64x64": {17: [1.0, 4]}}'
WANTED_ACCURACY = 0.8
"""Fraction of prompts whose colour must come out, or the demo fails."""
CLIP_FPS = 8.0
"""Frame rate the demo's model sees: a person's videos are thinned out to about this."""
