"""How long a step waits for a checkpoint: `python benchmarks/checkpoint.py [--folder /scratch]`.

STDiT3-XL/2 cut to two of its 28 pairs of blocks: 102 million numbers, with their average and two
moments 1.6 GB, saved by one process with `async_save: false` and `true`. *Waits* is how long `save`
holds the step, of all saves the median and the least; *CPU* is the least that the process computed
meanwhile, which other programs on the machine do not change. *Done after* is when the checkpoint is
whole. A save follows when the one before is done. Beside training, buffers are made before the
first step, which is shown by itself. Prints one markdown table. Writes to a temporary folder, which
it removes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from kinema.config.recipe import load_recipe
from kinema.models.build import build_transformer
from kinema.parallel.world import World
from kinema.training.config import TrainRecipe
from kinema.training.ema import EMA
from kinema.training.optimizer import build_optimizer
from kinema.training.saving import Saver
from kinema.training.state import TrainState


class NoData:
    """Stands for the order of samples, of which a position is saved."""

    def state(self, epoch: int, step: int) -> dict[str, int]:
        return {"epoch": epoch, "step": step}


def new_state(recipe: TrainRecipe, device: torch.device) -> TrainState:
    assert recipe.model is not None
    model: nn.Module = build_transformer(recipe.model).to(device)
    trained = dict(model.named_parameters())
    return TrainState(
        model=model,
        ema=EMA(model, 0.9999),
        optimizer=build_optimizer(trained, recipe.optim),
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        order=cast(Any, NoData()),
    )


def measure(recipe: TrainRecipe, state: TrainState, world: World, run: Path, saves: int) -> None:
    saver = Saver(
        recipe, world, state, run=run, log=None, about={}, components={}, finalise=lambda: None
    )
    began = time.perf_counter()
    with saver:
        reserved = time.perf_counter() - began
        waits, busy, whole = [], [], []
        for _ in range(saves):
            state.step += 1
            with torch.no_grad():
                for parameter in state.model.parameters():
                    parameter.add_(1e-3)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            start, computed = time.perf_counter(), time.process_time()
            saver.save()
            waits.append(time.perf_counter() - start)
            busy.append(time.process_time() - computed)
            saver.settle()
            whole.append(time.perf_counter() - start)
    how = "beside training" if recipe.async_save else "the step waits"
    made = f"{reserved:.2f}" if recipe.async_save else "–"
    print(
        f"| {how} | {made} | {statistics.median(waits):.2f} | {min(waits):.2f} "
        f"| {min(busy):.2f} | {statistics.median(whole):.2f} | {min(whole):.2f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--depth", type=int, default=2, help="pairs of blocks; 28 is the whole")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    world = World(0, 1, device)
    changes = [f"model.depth={arguments.depth}", "keep_checkpoints=1"]
    state: TrainState | None = None
    for mode in ("false", "true"):
        recipe = load_recipe("opensora-1.2/stage1", TrainRecipe, [*changes, f"async_save={mode}"])
        if state is None:
            state = new_state(recipe, device)
            numbers = sum(p.numel() for p in state.model.parameters())
            print(f"{numbers / 1e6:.0f} million numbers on {device}, {torch.__version__}\n")
            print("| save | buffers, s | waits, s | least | CPU, s | done after, s | least |")
            print("|---|---|---|---|---|---|---|")
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            measure(recipe, state, world, Path(folder), arguments.saves)


if __name__ == "__main__":
    main()
