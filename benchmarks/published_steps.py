"""Steps and GPU hours of the speed run, predicted and published:
`python benchmarks/published_steps.py [--efficiency 0.15]`.

Prints two markdown tables, which depend on no clock. Clips are generated (`kinema.data.like`);
what is assumed of the data sets stands there. Published: steps per epoch of stages 1 to 3 from the
checkpoints that they ended with (2210 / 5 and so on); of stages 4 to 6 what their checkpoints
allow; 18,000 GPU hours for stages 1 to 3 and 7,000 for 4 to 7.
"""

from __future__ import annotations

import argparse
from datetime import date

from kinema.config.recipe import load_recipe
from kinema.data.like import manifest_like
from kinema.training.config import TrainRecipe
from kinema.training.estimate import EFFICIENCY, Cluster, estimate, order_of
from kinema.training.gpus import find_gpu

STAGES = {
    1: ("openvid", "442"), 2: ("openvid", "1,420"), 3: ("openvid+miradata", "2,956"),
    4: ("openvid+miradata", "525 to 700"), 5: ("openvid+miradata", "1,650 to 3,300"),
    6: ("openvid+miradata", "at least 2,900"), 7: ("openvid+miradata", ""),
}  # fmt: skip
"""Data of a stage, and its published steps per epoch. Stage 4 was left at step 2100 in its fourth
epoch (epoch 3 from 0), stage 5 at 3300 in its second, stage 6 at 2900 in its first."""
PUBLISHED_HOURS = {"1 to 3": 18_000, "4 to 7": 7_000}
GPUS = 192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--efficiency", type=float, default=EFFICIENCY)
    args = parser.parse_args()
    cluster = Cluster(find_gpu("h100"), GPUS)
    hours = dict.fromkeys(PUBLISHED_HOURS, 0.0)
    print(f"{date.today()}, {GPUS} x h100, efficiency {args.efficiency:.1%}\n")
    print(
        "| stage | clips | published rule | ours | published | off | balance | step | epochs "
        "| GPU hours |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for stage, (data, published) in STAGES.items():
        recipe = load_recipe(f"speedrun/stage{stage}", TrainRecipe)
        clips = manifest_like(data)
        order = order_of(recipe, clips, GPUS)
        found = estimate(recipe, clips, order, cluster, efficiency=args.efficiency)
        number = published.replace(",", "")
        off = f"{found.published_steps / int(number) - 1:+.1%}" if number.isdecimal() else ""
        hours["1 to 3" if stage <= 3 else "4 to 7"] += found.gpu_hours
        print(
            f"| {stage} | {found.plan.samples:,} | {found.published_steps:,} "
            f"| {found.plan.steps_per_epoch:,} | {published} | {off} "
            f"| {found.plan.step_balance:.3f} | {found.step_seconds:.1f} s | {found.epochs} "
            f"| {found.gpu_hours:,.0f} |",
            flush=True,
        )
    print("\n| stages | predicted GPU hours | published | off |\n|---|---|---|---|")
    total = {**hours, "all": sum(hours.values())}
    for name, found_hours in total.items():
        known = PUBLISHED_HOURS.get(name, sum(PUBLISHED_HOURS.values()))
        print(f"| {name} | {found_hours:,.0f} | {known:,} | {found_hours / known - 1:+.0%} |")


if __name__ == "__main__":
    main()
