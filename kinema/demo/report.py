"""The report of a demo: one HTML file with everything in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

import kinema
from kinema.data.world import COLOURS
from kinema.demo.chart import line_chart
from kinema.demo.config import WANTED_ACCURACY, DemoConfig
from kinema.demo.machine import machine_facts
from kinema.demo.page import page
from kinema.demo.state import DemoState
from kinema.media.errors import MediaError
from kinema.media.image import read_image
from kinema.media.probe import probe
from kinema.media.read import read_frames
from kinema.media.write import atomic_output
from kinema.telemetry.progress import format_duration

THUMBNAIL = 96
"""Longer side of a picture of the contact strip, in pixels."""


def write_report(folder: Path, config: DemoConfig, state: DemoState) -> Path:
    """Write `folder/report.html` from the results of the stages."""
    own = config.videos is not None
    sections = [
        _headline(config, state),
        _videos(folder, state, own),
        _curves(state),
        _data(state, own),
        _reconstructions(folder, state),
        _timings(state),
        _words(config, state),
    ]
    title = "Kinema: your videos" if own else "Kinema: the demo"
    path = folder / "report.html"
    with atomic_output(path) as temporary:
        temporary.write_text(page(title, "".join(sections)), encoding="utf-8")
    return path


def _headline(config: DemoConfig, state: DemoState) -> str:
    if config.quick:
        notice = (
            "<p class='notice'>This is a <b>smoke run</b>: every stage ran, with far too little "
            "training to learn anything. Its videos are noise, and that is expected. "
            "<code>kinema demo</code> without <code>--quick</code> takes about nine minutes.</p>"
        )
    else:
        notice = ""
    steps = state.result("train the model")["steps"]
    seconds = sum(state.seconds(s) for s in _stages(state))
    if config.videos is not None:
        clips = state.result("check")["clips"]
        return (
            "<h1>A text-to-video model of your own videos</h1>" + notice + f"<p>{clips} clips, "
            f"{steps} training steps, {format_duration(seconds)} altogether. A model this small, "
            "trained for minutes on a handful of clips, gives <b>blurs</b>: colours and rough "
            "layout of the footage at best. What this shows is that the whole path works on "
            "your files; quality takes a larger model, more clips and a GPU.</p>"
        )
    measured = state.result("measure")
    accuracy = measured["accuracy"]
    right = sum(v["right"] for v in measured["verdicts"])
    total = len(measured["verdicts"])
    verdict = "pass" if accuracy >= WANTED_ACCURACY else "fail"
    sentence = (
        f"of {total} prompts came out in the colour they asked for. None of these combinations of "
        "colour, shape and motion was in the training data."
    )
    if verdict == "fail" and not config.quick:
        sentence += (
            f" <b>That is below the {WANTED_ACCURACY:.0%} that this demo must reach: it has "
            "failed.</b>"
        )
    return (
        "<h1>A text-to-video model, trained from nothing</h1>" + notice + "<div class='score "
        f"{verdict}'><b>{right}<small>/{total}</small></b><p>{sentence} Chance is one in "
        f"{len(COLOURS)}.</p></div>"
        f"<p>{format_duration(seconds)} from an empty folder to this page: clips were rendered to "
        "real mp4 files, indexed, checked and planned; an autoencoder was trained on them; then a "
        f"transformer, {steps} steps; then these videos were generated. By the same code that "
        "trains large models on many GPUs.</p>"
    )


def _videos(folder: Path, state: DemoState, own: bool) -> str:
    items = state.result("generate")["items"]
    verdicts = [None] * len(items) if own else state.result("measure")["verdicts"]
    cards = []
    for item, verdict in zip(items, verdicts, strict=True):
        chip = "" if verdict is None else _chip(verdict)
        cards.append(
            f"<figure>{_video(folder / item['path'])}"
            f"<figcaption>{escape(item['prompt'])}{chip}</figcaption></figure>"
        )
    request = state.result("generate")["request"]
    how = (
        f"{request['width']}×{request['height']} pixels, {request['num_frames']} frames at "
        f"{request['fps']:g} per second, {request['num_sampling_steps']} steps, guidance "
        f"{request['cfg_scale']:g}. Enlarged for viewing."
    )
    heading = "Generated from your captions" if own else "Generated"
    return f"<h2>{heading}</h2><p class='quiet'>{how}</p><div class='grid'>{''.join(cards)}</div>"


def _chip(verdict: dict[str, Any]) -> str:
    seen = verdict["seen"]
    kind, mark = ("right", "✓") if verdict["right"] else ("wrong", "✗")
    if seen is None:
        return f"<span class='chip {kind}'>{mark} no colour found</span>"
    rgb = ",".join(str(v) for v in COLOURS[seen])
    return f"<span class='chip {kind}'>{mark} {seen}<i style='background:rgb({rgb})'></i></span>"


def _curves(state: DemoState) -> str:
    blocks = []
    for stage, title, key in (
        ("train the autoencoder", "Autoencoder: error of the pixels", "l1"),
        ("train the model", "Transformer: error of the velocity", "loss"),
    ):
        result = state.result(stage)
        log, about = result["log"], result["about"]
        points = [(r["step"], r[key if key in r else "loss"]) for r in log if r.get("loss")]
        chart = line_chart(points, x_label="step", y_label=title)
        blocks.append(
            f"<figure class='wide'><figcaption>{title}</figcaption>{chart}<p class='quiet'>"
            f"recipe <code>{result['recipe']}</code>: {result['steps']} steps of "
            f"{about['batch_size']} clips, {about['frames']} frames of {about['size']}, learning "
            f"rate {about['lr']:g}; {format_duration(state.seconds(stage))}</p></figure>"
        )
    return f"<h2>Training</h2><div class='pair'>{''.join(blocks)}</div>"


def _data(state: DemoState, own: bool) -> str:
    overview, plan = state.result("overview"), state.result("plan")
    index, check = state.result("index"), state.result("check")
    strip = "".join(
        f"<figure><img alt='' src='{uri}'><figcaption>{escape(text or '(no caption)')}</figcaption>"
        "</figure>"
        for path, text in overview["clips"]
        if (uri := _thumbnail(Path(path)))
    )
    lines = [
        f"{index['rows']} clips indexed, {check['clips']} of them decode to the end, "
        f"{plan['samples']} train: {plan['steps_per_epoch']} steps an epoch.",
        *(f"{count} left out: {escape(reason)}." for reason, count in plan["dropped"].items()),
    ]
    told = "".join(f"<p>{line}</p>" for line in lines)
    refused = [*index["refused"], *([b[0], b[1]] for b in check["bad"])]
    if refused:
        rows = "".join(f"<li>{escape(p)}: {escape(r)}</li>" for p, r in refused)
        told += f"<details><summary>{len(refused)} files refused</summary><ul>{rows}</ul></details>"
    bars = "".join(_bars(name, counts) for name, counts in overview["counts"].items())
    title = "Your clips" if own else "The world it was trained on"
    return f"<h2>{title}</h2>{told}<div class='strip'>{strip}</div><div class='bars'>{bars}</div>"


def _bars(name: str, counts: dict[str, int]) -> str:
    most = max(counts.values(), default=1)
    rows = "".join(
        f"<tr><td>{escape(value)}</td><td><div class='bar' style='width:{100 * n / most:.0f}%"
        f"{_paint(value)}'></div></td><td>{n}</td></tr>"
        for value, n in counts.items()
    )
    return f"<table><caption>{escape(name)}</caption>{rows}</table>"


def _paint(value: str) -> str:
    return f";background:rgb{COLOURS[value]}" if value in COLOURS else ""


def _reconstructions(folder: Path, state: DemoState) -> str:
    result = state.result("reconstruct")
    videos = "".join(f"<figure>{_video(folder / path)}</figure>" for path in result["paths"])
    return (
        "<h2>What the autoencoder keeps</h2><p class='quiet'>Left the clip, right the same clip "
        "after encoding and decoding. The transformer never sees pixels, only what passes "
        f"through here: no generated video can be sharper. PSNR {result['psnr_db']:.1f} dB.</p>"
        f"<div class='grid double'>{videos}</div>"
    )


def _timings(state: DemoState) -> str:
    stages = _stages(state)
    rows = _rows((stage, format_duration(state.seconds(stage))) for stage in stages)
    total = format_duration(sum(state.seconds(stage) for stage in stages))
    facts = _rows({**machine_facts(), "Kinema": kinema.__version__}.items())
    return (
        "<h2>Time and machine</h2><div class='pair'>"
        f"<table class='facts'>{rows}<tr><th>altogether</th><th>{total}</th></tr></table>"
        f"<table class='facts'>{facts}</table></div>"
    )


def _words(config: DemoConfig, state: DemoState) -> str:
    run = Path(state.result("train the model")["run"])
    command = f'kinema generate --ckpt-path {run} --prompt "…"'
    own = config.videos is not None
    prompt = "one of your captions" if own else "a large green star moving left"
    text = "<h2>What this does and does not show</h2>"
    if not own:
        ruler = state.result("measure")["ruler"]
        text += (
            "<p>The measured thing is the <b>colour</b>: the mean hue of the pixels that stand out "
            "from the background, named after the nearest colour of the world. The same ruler "
            f"names {ruler:.0%} of as many real clips rightly. Shapes and motions are not "
            "measured: look at them. After minutes of training they are loose blobs; "
            "few can be told by their shape, and motions are often wrong.</p>"
            "<p>This model knows one world of coloured shapes and its few dozen "
            "words. It says nothing about the quality of large models; it shows that data, "
            "training and generation fit together.</p>"
        )
    else:
        text += (
            "<p>The prompts are captions the model was trained with, so these videos show "
            "remembering, not imagination. Nothing is measured here.</p>"
        )
    return (
        text + "<h2>Go on</h2><p>The model is on disk. Ask it for something else "
        f"({escape(prompt)}):</p><pre>{escape(command.replace('…', prompt))}</pre>"
    )


def _stages(state: DemoState) -> list[str]:
    names = ["render", "index", "check", "plan", "train the autoencoder", "train the model",
             "generate", "measure", "reconstruct", "overview"]  # fmt: skip
    return [name for name in names if state.done(name)]


def _rows(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in pairs)


def _video(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<video autoplay loop muted playsinline src='data:video/mp4;base64,{data}'></video>"


def _thumbnail(path: Path) -> str | None:
    """The middle frame as a small data: URI; None if it cannot be read any more."""
    try:
        info = probe(path)
        if info.kind == "image":
            picture = read_image(path)
        else:
            picture = read_frames(path, [info.num_frames // 2])[0]
    except MediaError:
        return None
    image = Image.fromarray(picture)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
