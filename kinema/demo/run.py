"""The whole demo: every stage in order, a bar over all of them, a report at the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kinema.config.recipe import load_recipe
from kinema.demo import stages
from kinema.demo.config import WANTED_ACCURACY, DemoConfig
from kinema.demo.report import write_report
from kinema.demo.state import DemoState
from kinema.telemetry.progress import Progress
from kinema.training.config import TrainRecipe


@dataclass(frozen=True)
class DemoResult:
    """What came out.

    Attributes:
        report: the HTML file.
        accuracy: fraction of prompts whose colour came out; None where it is not measured.
        passed: False when the accuracy was demanded and missed.
    """

    report: Path
    accuracy: float | None
    passed: bool


def run_demo(folder: Path, config: DemoConfig) -> DemoResult:
    """Run or continue a demo in `folder`.

    Raises:
        KinemaError: the folder holds something else, the data cannot be used, or the person
            stopped it (exit code 130; the same call continues).
    """
    folder = Path(os.path.abspath(folder))
    state = DemoState(folder, config)
    own = config.videos is not None
    work: dict[str, Callable[[stages.OnDone], dict[str, Any]]] = {
        "render": lambda _: stages.render(folder, config),
        "index": lambda _: stages.index(folder, config),
        "check": lambda _: stages.check(folder),
        "plan": lambda _: stages.plan(folder, config),
        "train the autoencoder": partial(stages.train_vae, folder, config),
        "train the model": partial(stages.train_model, folder, config),
        "generate": partial(stages.generate, folder, config),
        "measure": lambda _: stages.measure(folder, state.result("generate")["items"]),
        "reconstruct": lambda _: stages.reconstruct(folder),
        "overview": lambda _: stages.overview(folder, config),
    }
    if own:
        del work["render"], work["measure"]
    total = sum(_SECONDS[name] for name in work)
    with Progress(_title(config), total=100, unit="%") as bar:
        budget = _Budget(bar, total, _units(config))
        for number, (name, stage) in enumerate(work.items(), 1):
            budget.start(name, f"{number}/{len(work)} {name}")
            state.run(name, partial(stage, budget.count))
            budget.finish()
    report = write_report(folder, config, state)
    accuracy = None if own else float(state.result("measure")["accuracy"])
    demanded = accuracy is not None and not config.quick
    passed = not demanded or (accuracy or 0.0) >= WANTED_ACCURACY
    return DemoResult(report, accuracy, passed)


_SECONDS = {
    "render": 12.0,
    "index": 4.0,
    "check": 6.0,
    "plan": 1.0,
    "train the autoencoder": 130.0,
    "train the model": 300.0,
    "generate": 40.0,
    "measure": 2.0,
    "reconstruct": 4.0,
    "overview": 1.0,
}
"""About how long the stages take on two quiet cores: their shares of the bar."""


class _Budget:
    """The bar over all stages: each has its share, and some count within it."""

    def __init__(self, bar: Progress, total: float, units: dict[str, int]) -> None:
        self._bar, self._total, self._units = bar, total, units
        self._before = 0.0
        self._stage, self._note, self._counted = "", "", 0

    def start(self, stage: str, note: str) -> None:
        self._stage, self._note, self._counted = stage, note, 0
        self._bar.advance(0, note=note)

    def count(self, n: int) -> None:
        """`n` more of the stage's steps are done."""
        self._counted += n
        share = min(self._counted / self._units[self._stage], 1.0)
        self._show(self._before + share * _SECONDS[self._stage])

    def finish(self) -> None:
        self._before += _SECONDS[self._stage]
        self._show(self._before)

    def _show(self, seconds: float) -> None:
        percent = round(100 * seconds / self._total)
        self._bar.advance(percent - self._bar.done, note=self._note)


def _units(config: DemoConfig) -> dict[str, int]:
    """How often `on_done` counts in the stages that call it: steps, or steps times videos."""
    vae = load_recipe("tiny/vae", TrainRecipe, config.vae_overrides)
    model = load_recipe("tiny/world", TrainRecipe, config.model_overrides)
    assert vae.max_steps is not None
    assert model.max_steps is not None
    assert model.diffusion is not None
    return {
        "train the autoencoder": vae.max_steps,
        "train the model": model.max_steps,
        "generate": model.diffusion.num_sampling_steps * config.prompts,
    }


def _title(config: DemoConfig) -> str:
    return "kinema demo (smoke run)" if config.quick else "kinema demo"
