"""A whole run: recipe in, run folder with checkpoints out."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kinema.checkpoint.run import new_run_folder
from kinema.config.errors import ConfigError, KinemaError
from kinema.config.settings import to_dict
from kinema.data.loader import KnownClips
from kinema.data.manifest import Manifest
from kinema.data.plan import render_plan
from kinema.models.attention_kernels import check_backend
from kinema.parallel.engine import Engine
from kinema.parallel.gather import whole
from kinema.parallel.sequence import SequenceGroups, share_frames
from kinema.parallel.world import World, open_world
from kinema.telemetry.run_log import RunLog, say
from kinema.telemetry.spans import Spans
from kinema.training import warm_up
from kinema.training.components import describe_model, pipeline_config, weights_seen_from
from kinema.training.config import TextToVideoTask, TrainRecipe, WatchdogConfig
from kinema.training.ema import EMA
from kinema.training.encode import LatentMemory
from kinema.training.encode_latents import check_weights, open_latents
from kinema.training.feed import Feed
from kinema.training.guard import Guard
from kinema.training.loop import Trainer
from kinema.training.meters import Meters
from kinema.training.optimizer import build_optimizer
from kinema.training.parts import (
    Frozen,
    blocks_of,
    build_model,
    in_working_precision,
    load_frozen,
    start_from_weights,
    text_weights_of,
)
from kinema.training.preflight import check_alike, facts, weights_of
from kinema.training.preview import Previewer
from kinema.training.profile import Profile
from kinema.training.restart import Launch
from kinema.training.run_folder import describe, first_start, identity
from kinema.training.start import Previous, Start, going_on, previous_run
from kinema.training.state import TrainState
from kinema.training.step_bytes import DTYPES
from kinema.training.stop import stop_on_signals
from kinema.training.tasks import Reconstruction, Task, TextToVideo
from kinema.training.validation import Validation
from kinema.training.vitals import Vitals
from kinema.training.watch import watched

FIRST_STEP_S = WatchdogConfig().first_step_s
"""How long ranks wait for one another where nobody watches."""

OnStep = Callable[[int, dict[str, Any] | None], None]


@dataclass(frozen=True)
class Result:
    """Where a run was written, and whether it came to its end or was stopped before."""

    run: Path
    finished: bool
    step: int


def train(
    recipe: TrainRecipe,
    start: Start | None = None,
    *,
    device: str | None = None,
    on_step: OnStep | None = None,
    profile_steps: int | None = None,
) -> Result:
    """Train by a recipe, alone or as one of torchrun's processes.

    Args:
        device: `cpu` or `cuda`; a GPU where there is one by default.
        on_step: called on rank 0 after each update with (updates done, logged record or None).
        profile_steps: record so many steps, say where their time went, and end.

    Raises:
        KinemaError: what a person did wrong; before anything is written wherever possible.
    """
    start, began = start or Start(), time.time()
    with ExitStack() as stack:
        sharded = recipe.parallel.shard != "none"
        limit = recipe.watchdog.first_step_s if recipe.watchdog else FIRST_STEP_S
        world = stack.enter_context(
            open_world(device, group=sharded, timeout=timedelta(seconds=limit))
        )
        launch = Launch(recipe.outputs)
        start, into, notes = going_on(recipe, start, launch, world)
        weights = weights_of(recipe, start.ckpt_path)
        notes += check_alike(facts(recipe, world, weights), world)
        groups = SequenceGroups(world, recipe.parallel.sequence, timeout=timedelta(seconds=limit))
        stop = stack.enter_context(stop_on_signals())
        previous = previous_run(recipe, start, world)
        manifest = _read_manifest(recipe)
        memory = _latent_memory(recipe)
        known: KnownClips = frozenset() if memory is None else memory
        latents = open_latents(recipe, manifest)
        feed = stack.enter_context(Feed(recipe, manifest, world, known=known, latents=latents))

        # Everything that can be wrong is read before the run folder is made.
        spans = Spans()
        if recipe.model is not None:
            dtype, head_dim = DTYPES[recipe.precision], recipe.model.head_dim
            check_backend(recipe.model.attention, world.device, dtype, head_dim)
        model = build_model(recipe)
        if recipe.parallel.sequence > 1:
            share_frames(model, groups)
        task, frozen = _task(recipe, manifest, memory, spans, groups, world)
        if latents is not None and frozen is not None and frozen.vae is not None:
            check_weights(latents, frozen.vae)
        if frozen is not None and frozen.vae is not None:
            in_working_precision(frozen.vae, recipe.precision, world.device)
        if start.ckpt_path:
            allowed = {"allow_new": start.allow_new, "allow_unexpected": start.allow_unexpected}
            notes.append(start_from_weights(model, start.ckpt_path, **allowed))
        engine = Engine(
            model,
            world,
            recipe.parallel,
            dtype=DTYPES[recipe.precision],
            blocks=blocks_of(recipe),
        )
        world.wait_at_most(limit)  # in the groups that sharding made as well
        state = _new_state(recipe, model, feed, world)
        if previous and previous.checkpoint:
            state.restore(previous.checkpoint, data_position=not start.from_scratch)

        seen = feed.seen
        previewer = None
        if recipe.preview and frozen and world.is_main:
            config = pipeline_config(
                recipe, vae_weights=None, text_weights=recipe.text_weights, data=seen
            )
            previewer = Previewer(recipe.preview, config, frozen, world.device)

        validation = None
        if recipe.validation and frozen:
            validation = Validation(recipe, manifest, frozen, engine, world, spans)
        continued = into or (previous.run if previous and not start.from_scratch else None)
        run = continued or _new_run_folder(recipe, world)
        about = identity(recipe, manifest.fingerprint, world.size)
        log = None
        if world.is_main:
            launch.remember(run)
            _describe(run, recipe, about, start, previous, state.step)
            log = stack.enter_context(_open_log(run, recipe, state.step if continued else None))
            if validation is not None:
                log.event(
                    "validation on held-out clips",
                    clips=len(validation.clips),
                    every=validation.every,
                    weights="weights" if state.ema is None else "averaged weights",
                )
            _announce(log, recipe, feed, state, [*notes, *(previous.notes if previous else [])])
        vae_weights, text_weights = (
            weights_seen_from(run, path) if path else None
            for path in (frozen.vae_weights if frozen else None, text_weights_of(recipe))
        )
        meters = Meters(
            recipe,
            world,
            decoders=feed.worker_pids,
            first_start=first_start(run, began) if world.is_main else began,
        )
        heart = stack.enter_context(watched(recipe, world, run, decoding=feed.decoding))
        profile = None
        if profile_steps is not None:
            profile = Profile(recipe, world, profile_steps, spans=spans, run=run, log=log)
        vitals = Vitals(recipe, world, spans, heart=heart, path=feed.path)
        feed.on_clip = vitals.clip_came
        trainer = Trainer(
            recipe,
            world,
            task,
            state,
            engine,
            groups,
            feed,
            vitals,
            run=run,
            log=log,
            spans=spans,
            meters=meters,
            stop=stop,
            about=about,
            components=describe_model(
                recipe, vae_weights=vae_weights, text_weights=text_weights, data=seen
            ),
            saved_step=state.step if continued and state.step else None,
            on_step=on_step,
            validation=validation,
            profile=profile,
            on_preview=partial(_preview, previewer=previewer, world=world, run=run, log=log),
        )
        if warm_up.wanted(recipe, world.device):
            warm_up.warm_up(
                warm_up.trials(recipe, feed.order, state.position[0], world),
                lambda trial: trainer.try_out(warm_up.made_up(trial, recipe, manifest)),
                world,
            )
            if memory is not None:
                memory.clear()
            spans.take()
            meters.begin()
        finished = trainer.run()
        if log is not None:
            launch.forget()
            text = "finished" if finished else f"stopped by {stop.signal or 'another rank'}"
            more = {} if finished else {"continue_with": f"--load {run}"}
            if profile is None:
                log.event(text, step=state.step, **more)
        return Result(run, finished, state.step)


def _preview(
    state: TrainState,
    *,
    previewer: Previewer | None,
    world: World,
    run: Path,
    log: RunLog | None,
) -> None:
    """Videos of this step, by rank 0; the others send it their parts of sharded weights."""
    averaged = state.average() or state.model.state_dict()
    weights = whole(averaged, world, lambda _: 0, keep=lambda _, tensor: tensor)
    if previewer is not None and log is not None:
        previewer.make(weights, state.step, run, log)
    world.barrier()  # here rather than in the next step, where waiting would count as part of it


def _read_manifest(recipe: TrainRecipe) -> Manifest:
    if recipe.data.path is None:
        raise ConfigError(
            "no manifest is named", where="data.path", hint="--data-path clips.parquet"
        )
    manifest = Manifest.read(recipe.data.path, data_root=recipe.data.root)
    if isinstance(recipe.task, TextToVideoTask):
        manifest.require_captions()
    return manifest


def _latent_memory(recipe: TrainRecipe) -> LatentMemory | None:
    task = recipe.task
    remembers = isinstance(task, TextToVideoTask) and task.remember_latents
    return LatentMemory() if remembers else None


def _task(
    recipe: TrainRecipe,
    manifest: Manifest,
    memory: LatentMemory | None,
    spans: Spans,
    groups: SequenceGroups,
    world: World,
) -> tuple[Task, Frozen | None]:
    """The task, and the networks that it looks through."""
    if not isinstance(recipe.task, TextToVideoTask):
        return Reconstruction(recipe, spans), None
    frozen = load_frozen(recipe, manifest, world.device)
    return TextToVideo(recipe, frozen.vae, frozen.text, memory, spans, groups), frozen


def _new_state(recipe: TrainRecipe, model: nn.Module, feed: Feed, world: World) -> TrainState:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return TrainState(
        model=model,
        ema=None if recipe.ema_decay is None else EMA(model, recipe.ema_decay),
        optimizer=build_optimizer(trained, recipe.optim),
        scaler=torch.amp.GradScaler(world.device.type, enabled=recipe.precision == "fp16"),
        order=feed.order,
        guard=None if recipe.guard is None else Guard(recipe.guard),
    )


def _new_run_folder(recipe: TrainRecipe, world: World) -> Path:
    run: Path | KinemaError | OSError | None = None
    if world.is_main:
        try:
            run = new_run_folder(recipe.outputs, recipe.name)
        except (KinemaError, OSError) as error:
            run = error
    run = world.broadcast(run)
    if isinstance(run, Exception):
        raise run
    assert run is not None
    return run


def _describe(
    run: Path,
    recipe: TrainRecipe,
    about: dict[str, Any],
    start: Start,
    previous: Previous | None,
    step: int,
) -> None:
    source = start.load or start.ckpt_path
    changed = {k: list(v) for k, v in previous.changed.items()} if previous else {}
    entry = {"step": step, "loaded": str(source) if source else None, "changed": changed}
    describe(run, recipe, about, entry)


def _open_log(run: Path, recipe: TrainRecipe, resume_step: int | None) -> RunLog:
    tracking = recipe.tracking
    return RunLog(
        run,
        tensorboard=tracking.tensorboard,
        wandb=tracking.wandb,
        resume_step=resume_step,
        about=to_dict(recipe),
    )


def _announce(
    log: RunLog, recipe: TrainRecipe, feed: Feed, state: TrainState, notes: list[str]
) -> None:
    say(render_plan(feed.plan))
    for note in notes:
        log.event(note)
    numbers = sum(p.numel() for p in state.model.parameters())
    trained = sum(p.numel() for p in state.trained.values())
    log.event(
        f"training {recipe.name}",
        parameters=numbers,
        trained=trained,
        precision=recipe.precision,
        step=state.step,
        epoch=state.position[0],
    )
