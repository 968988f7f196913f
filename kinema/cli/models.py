"""`kinema models`: the released checkpoints, and what a file of weights is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from kinema.checkpoint.examine import Finding
    from kinema.generation.released import Lengths, Released

SHOWN = 5
"""Names shown of a list."""


def register(app: typer.Typer) -> None:
    app.command("models")(models)


def models(
    name: str | None = typer.Argument(None, help="A released checkpoint, for all about it."),
    check: Path | None = typer.Option(
        None,
        help="A file or folder of weights: says what it is, and whether every name and shape fits.",
    ),
    as_json: bool = typer.Option(False, "--json", help="Print it as JSON."),
) -> None:
    """List the released checkpoints, or say what a file of weights is.

    With --check, exit code 1 if anything is missing, unknown or of another shape.
    """
    from kinema.config.errors import KinemaError

    if check is not None:
        if name is not None:
            raise KinemaError("a name and --check say two things at once", hint="give one of them")
        raise typer.Exit(_check(check, as_json))
    from kinema.generation.released import RELEASED, find_released

    if name is not None:
        _details(find_released(name), as_json)
        return
    rows = [_facts(r) for r in RELEASED]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    _table(
        (
            "name",
            "of",
            "parameters",
            "autoencoder",
            "text",
            "trained on",
            "only extrapolates to",
            "several GPUs for",
            "weights",
        ),
        [
            (
                row["name"],
                row["generation"],
                f"{row['parameters'] / 1e6:,.0f}M",
                row["vae"],
                row["text_encoder"],
                _trained(row["trained"]),
                _beyond(row["extrapolates"]),
                _beyond(row["several_gpus"]),
                _here(row["weights"]),
            )
            for row in rows
        ],
    )
    print(
        "\nweights: what is not here yet. `kinema models NAME` tells all about one; Open-Sora 2.0 "
        "follows in a later version."
    )


def _facts(released: Released) -> dict[str, Any]:
    """All about a released checkpoint, as plain values."""
    from kinema.checkpoint.hub import in_cache
    from kinema.generation.released import GENERATIONS, wanted

    config = released.config
    return {
        "name": released.name,
        "generation": released.generation,
        "generation_is": GENERATIONS[released.generation],
        "title": released.title,
        "parameters": _count(config.model),
        "vae": _vae_in_words(config.vae.config),
        "vae_parameters": _count(config.vae.config),
        "text_encoder": _text_in_words(config.text.config),
        "sampling": {
            "process": _process_in_words(config.diffusion),
            "steps": config.diffusion.num_sampling_steps,
            "cfg_scale": config.diffusion.cfg_scale,
        },
        "fps": config.fps,
        "default_size": {
            "width": config.buckets[0].width,
            "height": config.buckets[0].height,
            "num_frames": config.buckets[0].num_frames,
        },
        "trained": _lengths(released.trained),
        "extrapolates": _lengths(released.extrapolates),
        "several_gpus": _lengths(released.several_gpus),
        "weights": {
            role: {
                "repository": str(w.published),
                "files": {
                    file: str(path) if path else None
                    for file, path in in_cache(w.published).items()
                },
                "elsewhere": w.published.elsewhere,
                "names_known_from": w.published.verified,
            }
            for role, w in wanted(released).items()
        },
        "notes": list(released.notes),
    }


def _details(released: Released, as_json: bool) -> None:
    from kinema.generation.released import SIZES

    facts = _facts(released)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    size, sampling = facts["default_size"], facts["sampling"]
    print(f"{facts['name']}: {facts['title']}")
    print(f"  generation    {facts['generation_is']}")
    print(f"  transformer   {facts['parameters']:,} parameters")
    print(f"  autoencoder   {facts['vae']}, {facts['vae_parameters']:,} parameters")
    print(f"  text encoder  {facts['text_encoder']}")
    print(
        f"  sampling      {sampling['process']}, {sampling['steps']} steps, "
        f"guidance {sampling['cfg_scale']:g}"
    )
    print(
        f"  default       {size['width']}x{size['height']}, {_frames_in_words(size['num_frames'])}"
        + (f", {facts['fps']:g} frames per second" if size["num_frames"] > 1 else "")
    )
    for title, key in (
        ("trained on", "trained"),
        ("only extrapolates to", "extrapolates"),
        ("wants several GPUs of 80 GB in the original", "several_gpus"),
    ):
        if facts[key]:
            print(f"\n  {title}:")
        for row in facts[key]:
            width, height = SIZES[row["resolution"]]
            frames = ", ".join("image" if n == 1 else str(n) for n in row["frames"])
            print(f"    {row['resolution']:<6} ({width}x{height})  {frames}")
    print("\n  weights:")
    for role, place in facts["weights"].items():
        print(f"    {role:<6} {place['repository']}")
        for file, path in place["files"].items():
            print(f"           {file}: {path or 'not here'}")
        if place["elsewhere"]:
            print(f"           also at {place['elsewhere']}")
        print(f"           ({place['names_known_from']})")
    for note in facts["notes"]:
        print(f"\n  {note}")
    prompt = "207" if facts["text_encoder"].startswith("classes") else "a red kite over the sea"
    print(f'\n  kinema generate --model {facts["name"]} --prompt "{prompt}"')


def _check(path: Path, as_json: bool) -> int:
    """Print what is at a path; 0 if all of it fits."""
    from kinema.checkpoint.examine import examine

    findings = examine(path)
    if as_json:
        print(json.dumps([_finding(f) for f in findings], indent=2))
    else:
        for finding in findings:
            _print_finding(finding)
    return 0 if findings and all(f.fits for f in findings) else 1


def _finding(finding: Finding) -> dict[str, Any]:
    identity = finding.identity
    facts: dict[str, Any] = {
        "path": str(finding.path),
        "section": finding.section,
        "what": finding.what,
        "fits": finding.fits,
        "problem": finding.problem,
    }
    if identity is not None:
        facts |= {
            "layout": identity.layout.name,
            "tensors": sum(identity.dtypes.values()),
            "numbers": identity.parameters,
            "dtypes": identity.dtypes,
            "loaded": len(identity.fit.loaded),
            "missing": list(identity.fit.missing),
            "unexpected": list(identity.unexpected),
            "wrong": [*identity.fit.wrong_shape, *identity.fit.wrong_kind],
            "computed_here": len(identity.fit.unexpected) - len(identity.unexpected),
            "released": _released_names(finding),
        }
    return facts


def _print_finding(finding: Finding) -> None:
    from kinema.checkpoint.identify import LAYOUTS

    facts = _finding(finding)
    section = f" ({finding.section})" if finding.section else ""
    print(f"{finding.path}{section}: {finding.what}")
    if finding.problem:
        print(f"  problem   {finding.problem}")
    if finding.identity is None:
        return
    kinds = ", ".join(f"{n} {kind}" for kind, n in facts["dtypes"].items())
    print(f"  form      {LAYOUTS[facts['layout']]}")
    print(f"  holds     {facts['tensors']} tensors, {facts['numbers']:,} numbers ({kinds})")
    if facts["released"]:
        others = len(facts["released"]) - SHOWN
        first = ", ".join(facts["released"][:SHOWN])
        print(f"  is as     {first}{f' and {others} more' if others > 0 else ''}")
    if facts["computed_here"]:
        print(f"  leaves    {facts['computed_here']} tables that are computed here")
    for title, key in (("missing", "missing"), ("unknown", "unexpected"), ("wrong", "wrong")):
        names = facts[key]
        if names:
            more = ", ..." if len(names) > SHOWN else ""
            print(f"  {title:<9} {len(names)}: {', '.join(names[:SHOWN])}{more}")
    if finding.fits:
        print(f"  fits      all {facts['loaded']} tensors, names and shapes")
    else:
        print("  DOES NOT FIT")


def _released_names(finding: Finding) -> list[str]:
    """Released checkpoints with this network."""
    from kinema.checkpoint.identify import same_network
    from kinema.generation.released import RELEASED

    identity = finding.identity
    if identity is None or identity.config is None:
        return []
    return [
        r.name
        for r in RELEASED
        if same_network(r.config.model, identity.config, identity.told)
        or same_network(r.config.vae.config, identity.config)
    ]


def _count(config: Any) -> int:
    """Parameters, counted without making them."""
    import torch

    from kinema.models.build import build_transformer, build_vae
    from kinema.models.config import ImageVAEConfig, VideoVAEConfig

    with torch.device("meta"):
        network = (
            build_vae(config)
            if isinstance(config, (ImageVAEConfig, VideoVAEConfig))
            else build_transformer(config)
        )
    return sum(p.numel() for p in network.parameters())


def _lengths(rows: tuple[Lengths, ...]) -> list[dict[str, Any]]:
    return [{"resolution": row.resolution, "frames": list(row.frames)} for row in rows]


def _vae_in_words(config: Any) -> str:
    if config.type == "opensora-vae-1.2":
        return f"video, {config.spatial_stride}x{config.spatial_stride}x{config.time_stride}"
    return f"image, {config.spatial_stride}x{config.spatial_stride}"


def _text_in_words(config: Any) -> str:
    if config.type == "classes":
        return f"classes 0-{config.num_classes - 1}"
    return f"{config.type.upper()}, {config.max_tokens} tokens"


def _process_in_words(config: Any) -> str:
    return {"rflow": "rectified flow"}.get(config.type, getattr(config, "sampler", config.type))


def _trained(rows: list[dict[str, Any]]) -> str:
    return f"{_span([t['resolution'] for t in rows])}: {_frames(rows)}" if rows else "-"


def _span(resolutions: list[str]) -> str:
    """`144p-1080p` and the square ones: the smallest and the largest of many."""
    from kinema.generation.released import SIZES

    by_area = sorted(resolutions, key=lambda r: SIZES[r][0] * SIZES[r][1])
    return by_area[0] if len(by_area) == 1 else f"{by_area[0]} to {by_area[-1]}"


def _frames(rows: list[dict[str, Any]]) -> str:
    counts = sorted({n for row in rows for n in row["frames"]})
    if counts == [1]:
        return "image"
    first = "image, " if counts[0] == 1 else ""
    videos = [n for n in counts if n > 1]
    return first + (str(videos[0]) if len(videos) == 1 else f"{videos[0]} to {videos[-1]}")


def _frames_in_words(count: int) -> str:
    return "one image" if count == 1 else f"{count} frames"


def _beyond(rows: list[dict[str, Any]]) -> str:
    return "; ".join(f"{r['resolution']} {', '.join(map(str, r['frames']))}" for r in rows) or "-"


def _here(weights: dict[str, Any]) -> str:
    """What is wanted, and how many of the parts are in the hub's cache."""
    whole = [role for role, place in weights.items() if all(place["files"].values())]
    if len(whole) == len(weights):
        return "all here"
    missing = [role for role in weights if role not in whole]
    first = weights[missing[0]]["repository"]
    return first + (f" and {', '.join(missing[1:])}" if len(missing) > 1 else "")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table: drawn on a terminal, plain columns in a pipe."""
    if not sys.stdout.isatty():
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        for row in (head, *rows):
            print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in head:
        table.add_column(column, no_wrap=column == "name")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
