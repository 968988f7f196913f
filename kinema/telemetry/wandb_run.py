"""A run on Weights & Biases, which a resume continues."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kinema.config.errors import KinemaError
from kinema.telemetry.config import WandbConfig
from kinema.telemetry.run_json import read_run_json, update_run_json


class WandbRun:
    """Opens the run that `run.json` names, or a new one, whose id goes into `run.json`.

    Args:
        about: the run's configuration as the page shows it: the recipe as plain data.

    Raises:
        KinemaError: wandb is not installed, or it cannot open the run.
    """

    def __init__(
        self, folder: Path, config: WandbConfig, *, about: Mapping[str, Any] | None = None
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise KinemaError(
                f"tracking.wandb is set and wandb cannot be imported ({error})",
                hint="pip install 'kinema[wandb]', or leave tracking.wandb out",
            ) from None
        self._wandb: Any = wandb
        known = read_run_json(folder).get("wandb") or {}
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=config.name or folder.name,
                mode=config.mode,
                dir=str(folder),
                id=known.get("id"),
                resume="allow",
                config=None if about is None else dict(about),
                # A resume may have changed what a recipe may change.
                allow_val_change=True,
            )
        except wandb.Error as error:
            raise KinemaError(
                f"wandb cannot open the run: {error}",
                where="tracking.wandb",
                hint="`wandb login`, or tracking.wandb.mode: offline",
            ) from None
        # A resume may go back some steps, which wandb's own counter refuses.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        opened = {"id": self._run.id, "project": config.project, "entity": config.entity}
        update_run_json(folder, {"wandb": opened | {"name": self._run.name}})

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def video(self, tag: str, path: Path, step: int) -> None:
        """The file as it is: wandb encodes arrays only with moviepy."""
        self._run.log({tag: self._wandb.Video(str(path)), "step": step})

    def close(self) -> None:
        self._run.finish()
