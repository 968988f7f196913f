"""Kinema: open text-to-video. `from kinema import Pipeline` is all a script needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kinema.generation.pipeline import Pipeline

__all__ = ["Pipeline", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Late, so that `kinema --help` does not wait for torch.
    if name == "Pipeline":
        from kinema.generation.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'kinema' has no attribute {name!r}")
