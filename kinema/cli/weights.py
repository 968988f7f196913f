"""`kinema weights`: weights in another form, weights from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        name="weights", no_args_is_help=True, help="Convert weights, and fetch released ones."
    )
    group.command("convert")(convert)
    group.command("fetch")(fetch)
    app.add_typer(group)


def convert(
    source: Path = typer.Argument(
        ..., metavar="SRC", help="A file of weights, a folder of them, or a checkpoint of ours."
    ),
    target: Path = typer.Argument(
        ..., metavar="DST", help="A folder, or a file with the ending of its kind."
    ),
    to: str = typer.Option(
        ...,
        help="kinema (safetensors with the names of Open-Sora), original (as the authors published "
        "it), diffusers.",
    ),
    dtype: str | None = typer.Option(
        None, help="Kind of number to write: fp32, bf16 or fp16; as in the source if not given."
    ),
    model: str | None = typer.Option(
        None, help="Which released checkpoint it is (`kinema models`), where weights do not tell."
    ),
    max_shard_size: str = typer.Option("8GiB", help="Larger safetensors files become shards."),
    ema: bool = typer.Option(False, "--ema", help="The averaged weights of a checkpoint of ours."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace what is there."),
) -> None:
    """Write weights in another form, tensor by tensor, and say what was done."""
    from kinema.checkpoint import convert as conversion
    from kinema.config.errors import KinemaError

    form = next((f for f in conversion.FORMS if f == to), None)
    if form is None:
        raise KinemaError(
            f"{to!r} is no form of weights", where="--to", hint=", ".join(conversion.FORMS)
        )
    done = conversion.convert(
        source,
        target,
        form,
        config=_settings(source, model, "ema" if ema else "model"),
        dtype=dtype,
        max_shard_bytes=conversion.size_in_bytes(max_shard_size),
        section="ema" if ema else "model",
        overwrite=overwrite,
    )
    print(f"{done.title} (found as: {done.layout})")
    print(f"{done.tensors} tensors, {done.numbers:,} numbers")
    if done.computed:
        print(f"left out, because it is computed where it is needed: {', '.join(done.computed)}")
    for file in done.files:
        print(file)


def fetch(
    name: str = typer.Argument(..., help="A released checkpoint (`kinema models`)."),
    offline: bool = typer.Option(
        False, "--offline", help="Take nothing from the network; say what is missing."
    ),
) -> None:
    """Download the weights of a released checkpoint into the hub's cache; print their places."""
    from kinema.generation.released import find_released, locate

    files = locate(find_released(name), offline=offline)
    print(f"model  {files.model}")
    print(f"vae    {files.vae}")
    if files.text is not None:
        print(f"text   {files.text}")


def _settings(source: Path, model: str | None, section: str) -> Any:
    """The network's settings: as its checkpoint or a released name says, or as far as the released
    checkpoints with these tensors agree; None: not known."""
    from kinema.checkpoint.examine import described, examine
    from kinema.checkpoint.identify import same_network
    from kinema.config.errors import KinemaError
    from kinema.generation.released import RELEASED, find_released

    own = described(source)
    if own is not None:
        if model is not None:
            raise KinemaError("a checkpoint of ours says itself what it is", where="--model")
        return own
    identity = next((f.identity for f in examine(source) if f.section in ("", section)), None)
    if identity is None or identity.config is None:
        return None  # `convert` says why
    named = RELEASED if model is None else (find_released(model),)
    configs = [c for r in named for c in (r.config.model, r.config.vae.config)]
    fitting = [c for c in configs if same_network(c, identity.config, identity.told)]
    if model is not None and not fitting:
        raise KinemaError(
            f"these weights are not those of {model}: {identity.title}", where=str(source)
        )
    return fitting[0] if fitting and all(c == fitting[0] for c in fitting) else None
