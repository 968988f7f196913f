"""The learning rate as a function of the step: a value, with no state to save or to lose."""

from __future__ import annotations

import math

from kinema.training.config import OneCycleSchedule, Schedule


def learning_rate(schedule: Schedule, lr: float, step: int) -> float:
    """The rate at which update `step` runs.

    Warm-up: `lr·(step + 1)/(warmup_steps + 1)` below `warmup_steps`, then `lr`. One-cycle: from
    `min_lr` at step 0 to `max_lr` at `warmup_steps`, back to `lr` over `cooldown_steps`, then
    `lr`; each slope a half cosine, or straight with `anneal: linear`.

    Args:
        lr: `optim.lr`, the rate that every schedule ends at.
        step: optimizer updates before this one; the first is 0.
    """
    if not isinstance(schedule, OneCycleSchedule):
        return lr * min(1.0, (step + 1) / (schedule.warmup_steps + 1))
    if step < schedule.warmup_steps:
        return _between(schedule, schedule.min_lr, schedule.max_lr, step / schedule.warmup_steps)
    down = (step - schedule.warmup_steps) / schedule.cooldown_steps
    return _between(schedule, schedule.max_lr, lr, min(1.0, down))


def _between(schedule: OneCycleSchedule, start: float, end: float, part: float) -> float:
    if schedule.anneal == "cosine":
        part = (1.0 - math.cos(math.pi * part)) / 2.0
    return start + (end - start) * part
