"""What a recipe may change when a run goes on."""

from __future__ import annotations

import json
from typing import Any

from kinema.config.errors import ConfigError
from kinema.config.settings import to_dict
from kinema.training.config import TrainRecipe

MAY_CHANGE = (
    "optim.lr",
    "optim.schedule",
    "optim.grad_clip",
    "accumulation",
    "epochs",
    "max_steps",
    "log_every",
    "ckpt_every",
    "keep_checkpoints",
    "outputs",
    "preview",
    "tracking",
    "parallel",
    "recompute",
    "recompute_every",
    "compile",
    "async_save",
    "warm_up",
    "guard",
    "watchdog",
    "validation",
    "environment",
    "vae_weights",
    "text_weights",
    "data.path",
    "data.root",
    "data.num_workers",
    "data.decode_timeout_s",
    "data.max_bad_fraction",
)
"""Keys (and all below them) that `--load` takes from the new recipe. Another manifest under
`data.path` must hold the same rows: the data position carries its fingerprint. With another
`accumulation` a step can have the same clips on another number of ranks."""

MAY_CHANGE_WITH_NEW_POSITION = (
    "data",
    "seed",
    "text_cache",
    "latent_cache",
    "name",
)
"""What `--load --start-from-scratch` takes besides: the data position starts anew."""


def changes(old: TrainRecipe, new: TrainRecipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose value differs, with both values; a key that one side lacks has None."""
    before, after = _flat(to_dict(old)), _flat(to_dict(new))
    keys = [*before, *(k for k in after if k not in before)]
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}


def check_changes(
    old: TrainRecipe, new: TrainRecipe, *, new_position: bool, where: str
) -> dict[str, tuple[Any, Any]]:
    """The changes of a resume, all of them allowed.

    Args:
        new_position: the data position starts anew (`--start-from-scratch`).
        where: the run that goes on, for the message.

    Raises:
        ConfigError: names every key that must not change, with both values.
    """
    allowed = MAY_CHANGE + (MAY_CHANGE_WITH_NEW_POSITION if new_position else ())
    found = changes(old, new)
    refused = {k: v for k, v in found.items() if not any(_below(k, a) for a in allowed)}
    if not refused:
        return found
    text = "; ".join(f"{k} was {_show(a)} and is now {_show(b)}" for k, (a, b) in refused.items())
    with_position = all(
        any(_below(k, a) for a in MAY_CHANGE_WITH_NEW_POSITION + MAY_CHANGE) for k in refused
    )
    hint = "--start-from-scratch as well" if with_position else "--ckpt-path: weights only"
    raise ConfigError(
        f"this cannot change when a run goes on: {text}",
        where=where,
        hint=f"keep the value, or use {hint}, which opens a new run folder",
    )


def _flat(data: Any, at: str = "") -> dict[str, Any]:
    if not isinstance(data, dict) or not data:
        return {at: data}
    return {
        key: value
        for name, inner in data.items()
        for key, value in _flat(inner, f"{at}.{name}" if at else str(name)).items()
    }


def _below(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(prefix + ".")


def _show(value: Any) -> str:
    return json.dumps(value)
