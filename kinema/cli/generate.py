"""`kinema generate`: prompts in, videos out."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kinema.cli.generate_input import (
    choose_size,
    parse_aes,
    parse_connect,
    parse_length,
    per_prompt,
    read_lines,
    refine_config,
)
from kinema.cli.grouped_help import GroupedCommand

if TYPE_CHECKING:
    from kinema.generation.config import GenerateRequest
    from kinema.generation.pipeline import Pipeline
    from kinema.generation.refine import RefineConfig
    from kinema.models.config import TextConfig
    from kinema.models.text import TextEncoder


WHAT = "What to make"
MODEL = "The model"
SIZE = "Size and length"
WAYS = "From images and videos (one of them, or --reference-path and --mask-strategy)"
LONG = "Long videos"
SCORES = "Scores in the words of Open-Sora 1.2"
REFINE = "Prompts refined by a language model"
SAMPLING = "Sampling"
MACHINE = "Speed and memory"
FILES = "Files"


def register(app: typer.Typer) -> None:
    app.command(cls=GroupedCommand)(generate)


def generate(
    prompt: list[str] = typer.Option(
        [],
        help="What the video shows; may be given repeatedly. `|0| by day |2| by night` gives "
        "segments their own texts; JSON at its end brings references of its own. For models of "
        "classes: the number of a class.",
        rich_help_panel=WHAT,
        metavar="<str>",
    ),
    prompt_path: Path | None = typer.Option(
        None,
        help="A file of prompts: one per line, or .csv or .jsonl with columns prompt, "
        "reference_path, mask_strategy.",
        rich_help_panel=WHAT,
    ),
    negative_prompt: str | None = typer.Option(
        None, help="What guidance leads away from.", rich_help_panel=WHAT
    ),
    model: str | None = typer.Option(
        None,
        help="A released model by its name; `kinema models` lists them.",
        rich_help_panel=MODEL,
    ),
    ckpt_path: str | None = typer.Option(
        None,
        help="A checkpoint folder, or a run folder (its newest checkpoint). With --model: its "
        "weights, as a file, a folder or a repository.",
        rich_help_panel=MODEL,
    ),
    vae: str | None = typer.Option(
        None, help="The autoencoder's weights, if they have moved.", rich_help_panel=MODEL
    ),
    text: str | None = typer.Option(
        None, help="Folder of the text encoder, if it has moved.", rich_help_panel=MODEL
    ),
    text_cache: Path | None = typer.Option(
        None,
        help="Folder of prompts that `kinema text encode` has encoded, in place of the text "
        "encoder, whose files are then not needed.",
        rich_help_panel=MODEL,
    ),
    allow_new: list[str] = typer.Option(
        [],
        help="Tensors (regular expression) that the transformer's weights may lack; they keep "
        "untrained values.",
        rich_help_panel=MODEL,
        metavar="<str>",
    ),
    allow_unexpected: list[str] = typer.Option(
        [],
        help="Tensors in the transformer's weights that the model may lack.",
        rich_help_panel=MODEL,
        metavar="<str>",
    ),
    ema: bool = typer.Option(
        True, help="Use the averaged weights of a checkpoint folder.", rich_help_panel=MODEL
    ),
    offline: bool = typer.Option(
        False,
        "--offline",
        help="Download nothing; say at once what is missing.",
        rich_help_panel=MODEL,
    ),
    resolution: str | None = typer.Option(
        None, help="A named size: 144p, 240p, 360p, 480p, 720p…", rich_help_panel=SIZE
    ),
    aspect_ratio: str | None = typer.Option(
        None,
        help="WIDTH:HEIGHT of a named size; 16:9 is landscape and the default.",
        rich_help_panel=SIZE,
    ),
    size: str | None = typer.Option(
        None, help="WIDTHxHEIGHT in pixels, such as 1280x720.", rich_help_panel=SIZE
    ),
    num_frames: str | None = typer.Option(
        None,
        help="Frames (51), or seconds as the model's authors count (2s); 1 makes an image.",
        rich_help_panel=SIZE,
    ),
    fps: float | None = typer.Option(
        None, help="Frames per second of the video.", rich_help_panel=SIZE
    ),
    image: str | None = typer.Option(
        None,
        "--image",
        "--animate",
        help="The video begins with this image and moves it.",
        rich_help_panel=WAYS,
    ),
    edit: str | None = typer.Option(
        None, help="The video is this one, changed.", rich_help_panel=WAYS
    ),
    edit_strength: float | None = typer.Option(
        None,
        help="With --edit: 0 keeps it as it is, 1 makes a new one; 0.4 if not given.",
        rich_help_panel=WAYS,
    ),
    extend: str | None = typer.Option(
        None, help="The video goes on from the end of this one.", rich_help_panel=WAYS
    ),
    extend_back: str | None = typer.Option(
        None, help="The video leads up to this one's start.", rich_help_panel=WAYS
    ),
    connect: list[str] = typer.Option(
        [],
        help="Given twice (or A,B): the video goes from A to B, images or videos.",
        rich_help_panel=WAYS,
        metavar="<str>",
    ),
    make_loop: str | None = typer.Option(
        None,
        help="The video goes from the end of this one back to its start, or from an image "
        "back to it.",
        rich_help_panel=WAYS,
    ),
    reference_path: list[str] = typer.Option(
        [],
        help="Images and videos for --mask-strategy, joined by `;`: for all prompts, or given "
        "once per prompt.",
        rich_help_panel=WAYS,
        metavar="<str>",
    ),
    mask_strategy: list[str] = typer.Option(
        [],
        help="segment,reference,reference start,target start,length,edit ratio; in latent frames, "
        "several joined by `;`; for all prompts, or given once per prompt.",
        rich_help_panel=WAYS,
        metavar="<str>",
    ),
    loop: int = typer.Option(
        1,
        help="Segments one after the other, each going on from the one before.",
        rich_help_panel=LONG,
    ),
    condition_frame_length: int | None = typer.Option(
        None,
        help="Latent frames that a segment (or --extend and the like) goes on from.",
        rich_help_panel=LONG,
    ),
    condition_frame_edit: float = typer.Option(
        0.0,
        help="How much a segment may change these: 0 keeps them, 1 makes them anew.",
        rich_help_panel=LONG,
    ),
    aes: str | None = typer.Option(
        None,
        help="Aesthetic score told to the model (6.5), or none; as trained if not given.",
        rich_help_panel=SCORES,
    ),
    flow: float | None = typer.Option(
        None, help="Motion score told to the model.", rich_help_panel=SCORES
    ),
    camera_motion: str | None = typer.Option(
        None,
        help="Camera motion told to the model, such as `pan left` or `static`.",
        rich_help_panel=SCORES,
    ),
    refine: str | None = typer.Option(
        None,
        help="Address of an OpenAI-compatible endpoint that makes prompts richer first, such as "
        "http://localhost:8000/v1; its key comes from the environment.",
        rich_help_panel=REFINE,
    ),
    refine_model: str | None = typer.Option(
        None, help="The language model there.", rich_help_panel=REFINE
    ),
    refine_key_env: str = typer.Option(
        "OPENAI_API_KEY",
        help="Environment variable that holds the key, if one is needed.",
        rich_help_panel=REFINE,
    ),
    num_sampling_steps: int | None = typer.Option(
        None, help="Steps from noise to video.", rich_help_panel=SAMPLING
    ),
    sampler: str | None = typer.Option(
        None, help="Of models trained with IDDPM: iddpm or dpm-solver.", rich_help_panel=SAMPLING
    ),
    cfg_scale: float | None = typer.Option(
        None, help="Guidance by the prompt; 1 is none.", rich_help_panel=SAMPLING
    ),
    seed: int = typer.Option(
        42, help="The same seed gives the same video.", rich_help_panel=SAMPLING
    ),
    num_samples: int = typer.Option(
        1, min=1, help="Videos per prompt, each from its own noise.", rich_help_panel=SAMPLING
    ),
    batch_size: int = typer.Option(
        1, min=1, help="Videos sampled at once; does not change them.", rich_help_panel=MACHINE
    ),
    dtype: str | None = typer.Option(
        None,
        help="Of the transformer: fp32, tf32, bf16 or fp16; bf16 on a GPU that has it and fp32 "
        "elsewhere if not given.",
        rich_help_panel=MACHINE,
    ),
    vae_dtype: str | None = typer.Option(
        None, help="Of the autoencoder; as --dtype otherwise.", rich_help_panel=MACHINE
    ),
    text_dtype: str | None = typer.Option(
        None,
        help="Of T5: fp32, bf16 or int8 (8-bit weights); as the model says otherwise, mostly bf16.",
        rich_help_panel=MACHINE,
    ),
    offload: str = typer.Option(
        "none",
        help="What leaves the device when it is not needed: none, phase (one network there at a "
        "time) or layers (of the transformer two blocks at a time).",
        rich_help_panel=MACHINE,
    ),
    tiling: bool = typer.Option(
        False,
        "--tiling",
        help="Decode frame by frame, in bands: less memory.",
        rich_help_panel=MACHINE,
    ),
    compile: bool = typer.Option(
        False, "--compile", help="Compile the transformer's blocks.", rich_help_panel=MACHINE
    ),
    attention: str | None = typer.Option(
        None,
        help="Attention's kernel; `kinema doctor` lists those that are here.",
        rich_help_panel=MACHINE,
    ),
    device: str | None = typer.Option(
        None, help="cpu or cuda; a GPU if there is one.", rich_help_panel=MACHINE
    ),
    save_dir: Path = typer.Option(
        Path("samples"), help="Where videos go; none is overwritten.", rich_help_panel=FILES
    ),
    sample_name: str | None = typer.Option(
        None, help="Name files NAME_0000, NAME_0001, …", rich_help_panel=FILES
    ),
    prompt_as_path: bool = typer.Option(
        False,
        "--prompt-as-path",
        help="Name files by the prompt; those there are skipped.",
        rich_help_panel=FILES,
    ),
) -> None:
    """Make videos and images from prompts, images and videos.

    What is not given is as the model was trained.
    """
    from kinema.generation.pipeline import Pipeline
    from kinema.generation.ranks import PATIENCE, choose_names, share, together
    from kinema.parallel.world import open_world
    from kinema.telemetry.progress import Progress

    lines = read_lines(prompt, prompt_path)
    references = per_prompt(reference_path, len(lines), "--reference-path")
    strategies = per_prompt(mask_strategy, len(lines), "--mask-strategy")
    with open_world(device, timeout=PATIENCE) as world:
        pipeline = Pipeline.from_pretrained(
            **_weights(model, ckpt_path, vae=vae, text=text, ema=ema, offline=offline),
            device=world.device,
            dtype=dtype,
            vae_dtype=vae_dtype,
            offload=offload,
            tiling=tiling,
            compile=compile,
            attention=attention,
            text_dtype=text_dtype,
            text_encoder=None if text_cache is None else _from_cache(text_cache),
            allow_new=allow_new,
            allow_unexpected=allow_unexpected,
        )
        width, height = choose_size(size, resolution, aspect_ratio, pipeline.config)
        seconds, frames = parse_length(num_frames)
        options: dict[str, Any] = {
            "seconds": seconds,
            "num_frames": frames,
            "width": width,
            "height": height,
            "fps": fps,
            "seed": seed,
            "num_sampling_steps": num_sampling_steps,
            "sampler": sampler,
            "cfg_scale": cfg_scale,
            "negative_prompt": negative_prompt,
            "aes": parse_aes(aes),
            "flow": flow,
            "camera_motion": camera_motion,
            "loop": loop,
            "condition_frame_length": condition_frame_length,
            "condition_frame_edit": condition_frame_edit,
            "image": image,
            "edit": edit,
            "edit_strength": edit_strength,
            "extend": extend,
            "extend_back": extend_back,
            "connect": parse_connect(connect),
            "make_loop": make_loop,
        }
        refiner = refine_config(refine, refine_model, refine_key_env, pipeline.config)
        requests = [
            pipeline.request(
                line.text,
                **options,
                references=line.references or reference,
                mask_strategy=line.mask_strategy or strategy,
            )
            for line, reference, strategy in zip(lines, references, strategies, strict=True)
        ]
        if refiner is not None:
            requests = world.broadcast(_refined(requests, refiner) if world.is_main else None)
        requests, stems = _samples(requests, num_samples, sample_name, prompt_as_path)
        if prompt_as_path:
            requests, stems = world.broadcast(
                _not_there_yet(save_dir, requests, stems) if world.is_main else None
            )
            if not requests:
                return
        plan = pipeline.check(requests, batch_size=batch_size, world=world)
        if world.is_main:
            _tell(pipeline, requests)
            if allow_new or allow_unexpected:
                _tell_differences(pipeline.check_weights())
            print(plan, file=sys.stderr)
            save_dir.mkdir(parents=True, exist_ok=True)
        names = choose_names(save_dir, requests, world, stems=stems)
        mine = [requests[n] for batch in share(plan.batches, world) for n in batch]
        total = sum(r.num_sampling_steps * r.loop for r in mine)
        with together(world), Progress("sampling", total=total, unit="step") as bar:
            for clip in pipeline.generate_all(
                requests, batch_size=batch_size, on_step=bar.advance, world=world
            ):
                # One write, or lines of several processes on one pipe run into each other: `print`
                # writes the line's end by itself where torchrun switches buffering off.
                sys.stdout.write(f"{clip.save(names[clip.number])}\n")
                sys.stdout.flush()


def _weights(model: str | None, ckpt_path: str | None, **rest: Any) -> dict[str, Any]:
    """Which weights `Pipeline.from_pretrained` reads."""
    from kinema.config.errors import KinemaError

    if model is not None:
        if not rest["ema"]:
            raise KinemaError("--no-ema has no effect with --model", hint="leave it out")
        return {"path": model, "model": ckpt_path, **rest}
    if ckpt_path is None:
        raise KinemaError(
            "no model",
            hint="--ckpt-path outputs/001-tiny-world, or --model opensora-1.2 "
            "(`kinema models` lists all)",
        )
    if rest["offline"]:
        raise KinemaError("--offline has no effect without --model", hint="leave it out")
    return {"path": ckpt_path, **rest}


def _from_cache(folder: Path) -> Callable[[TextConfig], TextEncoder]:
    """Makes the text encoder that knows the prompts of a cache."""
    from kinema.training.encode import CachedTextEncoder

    return functools.partial(CachedTextEncoder.open, folder)


def _refined(requests: list[GenerateRequest], config: RefineConfig) -> list[GenerateRequest]:
    """The requests with refined prompts; those that could not be refined stay as they are."""
    from dataclasses import replace

    from kinema.generation.refine import refine

    return [
        request
        if prompt.note is not None
        else replace(request, prompt=prompt.text, refined_from=prompt.original)
        for request, prompt in zip(
            requests, refine([r.prompt for r in requests], config), strict=True
        )
    ]


def _samples(
    requests: list[GenerateRequest], count: int, sample_name: str | None, prompt_as_path: bool
) -> tuple[list[GenerateRequest], list[str] | None]:
    """Each request `count` times, and the stems of the files if they are named as by 1.x."""
    from dataclasses import replace

    from kinema.generation.names import published_stem

    every = [replace(request, sample=k) for request in requests for k in range(count)]
    if sample_name is None and not prompt_as_path:
        return every, None
    stems = [
        published_stem(
            number=number,
            prompt=request.refined_from or request.prompt,
            sample_name=sample_name,
            prompt_as_path=prompt_as_path,
            num_samples=count,
            sample=k,
        )
        for number, request in enumerate(requests)
        for k in range(count)
    ]
    return every, stems


def _not_there_yet(
    folder: Path, requests: list[GenerateRequest], stems: list[str] | None
) -> tuple[list[GenerateRequest], list[str]]:
    """Requests without those whose files an earlier run has made."""
    assert stems is not None
    kept: tuple[list[GenerateRequest], list[str]] = ([], [])
    for request, stem in zip(requests, stems, strict=True):
        path = folder / f"{stem}{'.mp4' if request.num_frames > 1 else '.png'}"
        if path.exists():
            print(f"{path} is there already: skipped", file=sys.stderr)
        else:
            kept[0].append(request)
            kept[1].append(stem)
    return kept


def _tell_differences(found: dict[str, list[str]]) -> None:
    """Say on stderr which tensors do not fit, as was allowed: how many, and their names."""
    says = {
        "new_tensors": "missing from the weights, so with untrained values",
        "left_out": "of the weights left out",
    }
    for what, names in found.items():
        count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
        print(f"warning: {count} {says[what]}: {', '.join(names)}", file=sys.stderr)


def _tell(pipeline: Pipeline, requests: list[GenerateRequest]) -> None:
    """Say on stderr what the person may not expect, each thing once."""
    from kinema.generation.check import check_request, unseen_size_note
    from kinema.generation.prompts import segment_texts

    notes: dict[str, None] = {}
    for request in dict.fromkeys(requests):
        note = unseen_size_note(request, pipeline.config)
        found = [note] if note else []
        texts = dict.fromkeys(segment_texts(request), "prompt")
        if request.negative_prompt is not None:
            texts.setdefault(request.negative_prompt, "negative prompt")
        for text, what in texts.items():
            lost = pipeline.lost_words(text)
            if lost:
                found.append(
                    f"the {what} is longer than the text encoder takes; this is lost: {lost}"
                )
        found += check_request(request, pipeline.config).notes
        notes |= dict.fromkeys(found)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
