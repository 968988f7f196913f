"""Run folders and the checkpoints in them.

outputs/NNN-MODEL/epochE-global_stepS/
    model.safetensors  ema.safetensors  optimizer/  components.json  recipe.yaml  state.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from kinema.checkpoint.weights import LoadReport

Section = Literal["model", "ema", "optimizer"]


def new_run_folder(outputs: str | Path, model_name: str) -> Path:
    """Make `outputs/NNN-MODEL` with the next free number; safe when several start at once."""
    raise NotImplementedError


def save_checkpoint(
    run: str | Path,
    epoch: int,
    step: int,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None = None,
    optimizer: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Any],
    components: Mapping[str, Any],
    recipe: str | None = None,
) -> Checkpoint:
    """Write `run/epochE-global_stepS` completely or not at all. Call on one rank.

    Args:
        model, ema: state dicts, written as safetensors.
        optimizer: flat dict of tensors (numbers belong into `state`).
        state: JSON values; comes back as `Checkpoint.state`.
        components: goes to `components.json`.
        recipe: YAML text of the resolved recipe, goes to `recipe.yaml`.

    Raises:
        CheckpointError: the disk is full; what was there before is untouched.
    """
    raise NotImplementedError


def clean_leftovers(run: str | Path) -> list[str]:
    """Remove what killed saves left in a run folder. For the one process that writes the run.

    Returns:
        One line for each thing removed or recovered.
    """
    raise NotImplementedError


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder."""

    path: Path
    epoch: int
    step: int
    state: dict[str, Any]
    """As it was given to `save_checkpoint`."""
    components: dict[str, Any]
    warnings: tuple[str, ...] = ()
    """Newer checkpoints of the run that were passed over, and why."""

    @classmethod
    def open(cls, path: str | Path, *, sections: Sequence[Section] | None = None) -> Checkpoint:
        """A checkpoint by its folder, or the newest whole one of a run folder.

        Args:
            sections: what must be there, with the right sizes; for generation `("model",)` or
                `("ema",)` is enough. None: all that were saved.

        Raises:
            CheckpointError: no such folder, not a checkpoint, or a section is missing or cut off.
        """
        raise NotImplementedError

    def has(self, section: Section) -> bool:
        """Whether the section was saved (not whether it is still whole)."""
        raise NotImplementedError

    def section_hash(self, section: Section) -> str:
        """SHA-256 that stands for a section's content, as recorded when it was written."""
        raise NotImplementedError

    def verify(self, *, sections: Sequence[Section] | None = None, hashes: bool = False) -> None:
        """Check sizes (and hashes) of sections.

        Raises:
            CheckpointError: names the first files that differ, and how.
        """
        raise NotImplementedError

    def load_model(
        self, module: nn.Module, which: Literal["model", "ema"] = "model", **options: Any
    ) -> LoadReport:
        """Fill a module strictly; `options` as for `load_weights`."""
        raise NotImplementedError

    def load_optimizer(self, into: Mapping[str, Tensor]) -> None:
        """Fill the tensors of `into` in place; names and shapes must be those saved."""
        raise NotImplementedError


def latest(run: str | Path, *, sections: Sequence[Section] | None = None) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None."""
    raise NotImplementedError


def prune(run: str | Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` whole checkpoints; returns what was deleted."""
    raise NotImplementedError
