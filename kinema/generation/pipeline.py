"""The one path from a request to a finished clip."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self, Unpack

import torch
from torch import Tensor

import kinema
from kinema.config.errors import KinemaError
from kinema.config.settings import fingerprint
from kinema.diffusion.process import build_process
from kinema.generation import engine
from kinema.generation.captions import Caption, encode
from kinema.generation.check import check_request, process_config
from kinema.generation.clip import Clip
from kinema.generation.config import GenerateRequest, PipelineConfig
from kinema.generation.engine import OnStep
from kinema.generation.memory import (
    MemoryEstimate,
    MemorySettings,
    estimate_memory,
    free_memory,
    in_words,
    require_memory,
)
from kinema.generation.options import RequestOptions, make_request
from kinema.generation.parts import Allowed, Parts, Source, find_source
from kinema.generation.precision import (
    DTYPES,
    check_dtype,
    matmul_precision,
    name_of,
    usual_dtype,
    vae_dtype_for,
    with_attention,
    with_text_dtype,
)
from kinema.generation.prompts import segment_texts
from kinema.generation.ranks import share
from kinema.generation.residency import Residency, check_offload
from kinema.generation.segments import Job, batches_of
from kinema.models.attention_kernels import check_backend
from kinema.models.config import T5TextConfig, TextConfig, Tiling
from kinema.models.text import TextEncoder
from kinema.parallel.world import World

Batch = list[Job]
WAITING_BYTES = 4 * 2**30
"""Most that finished segments of unfinished videos may take in host memory."""


@dataclass(frozen=True)
class Plan:
    """What `generate_all` is going to do."""

    batches: list[list[int]]
    """Places of requests that are sampled together."""
    estimate: MemoryEstimate
    """Of the batch that needs the most memory."""
    free: int
    """Bytes free on the device."""

    def __str__(self) -> str:
        return f"memory: about {self.estimate.summary()}, {in_words(self.free)} free"


class Pipeline:
    """Text encoder, transformer, autoencoder and sampler of one checkpoint.

    `from_pretrained` only reads the checkpoint's description; weights are read when the first
    request has been checked. A pipeline is not safe to use from several threads at once.
    """

    def __init__(
        self,
        config: PipelineConfig,
        parts: Parts | Source,
        *,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        vae_dtype: str | None = None,
        offload: str = "none",
        tiling: bool = False,
        compile: bool = False,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        """
        Args:
            parts: the networks (training hands in its own), or where they are.
            device: default: the first GPU, or the CPU.
            dtype: of the transformer's weights and arithmetic: "fp32", "tf32", "bf16" or "fp16".
                None: bf16 on a GPU that has it, else float32; networks that are handed in stay
                as they are. What needs float32 (timesteps, positions, the sampler) stays so in
                any case.
            vae_dtype: likewise of the autoencoder; None: as `dtype`, but float32 with "fp16",
                whose range is too small for it.
            offload: "none", "phase" or "layers": what leaves the device when it is not needed.
            tiling: decode frames one by one in bands of rows: exact, in less memory.
            compile: compile the transformer's blocks (the first step takes minutes).
            text_encoder: in place of the one of `parts`.

        Raises:
            KinemaError: no such precision or way to off-load, ways that exclude each other, or an
                attention kernel that cannot run here.
        """
        self.config = config
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        given = isinstance(parts, Parts) and dtype is None
        if isinstance(parts, Parts) and dtype is None:
            dtype = name_of(next(parts.model.parameters()).dtype)
        self.dtype = check_dtype(dtype or usual_dtype(self.device))
        self.vae_dtype = check_dtype(vae_dtype) if vae_dtype else vae_dtype_for(self.dtype)
        self.offload = check_offload(offload)
        self._tiling = Tiling() if tiling else None
        if not given:
            model = config.model
            check_backend(model.attention, self.device, DTYPES[self.dtype], model.head_dim)
        self._residency = Residency(
            parts,
            device=self.device,
            offload=self.offload,
            dtype=None if given else DTYPES[self.dtype],
            vae_dtype=None if given and vae_dtype is None else DTYPES[self.vae_dtype],
            tiling=self._tiling,
            compile=compile,
            text=text_encoder,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        model: str | os.PathLike[str] | None = None,
        vae: str | os.PathLike[str] | None = None,
        text: str | os.PathLike[str] | None = None,
        ema: bool = True,
        offline: bool = False,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        vae_dtype: str | None = None,
        offload: str = "none",
        tiling: bool = False,
        compile: bool = False,
        attention: str | None = None,
        text_dtype: str | None = None,
        text_encoder: Callable[[TextConfig], TextEncoder] | None = None,
        allow_new: Sequence[str] = (),
        allow_unexpected: Sequence[str] = (),
    ) -> Self:
        """The pipeline of a checkpoint folder, of a run folder's newest checkpoint, or of a
        released model by its name (`kinema models` lists them).

        Args:
            path: the folder or name.
            model: a released model's weights, in place of those that its name stands for: a file,
                a folder, or a repository of the hub.
            vae, text: likewise of the autoencoder and of the text encoder; for a folder, in place
                of those that the checkpoint names.
            ema: use the averaged weights of a checkpoint folder.
            offline: take nothing from the network; what is missing is named at once.
            device, dtype, vae_dtype, offload, tiling, compile: see `Pipeline`.
            attention: the transformer's kernel, in place of the one in its settings.
            text_dtype: precision of T5's weights, likewise: "fp32", "bf16" or "int8".
            text_encoder: makes a text encoder for the checkpoint's settings, in place of the one
                that reads weights; these are then not needed.
            allow_new: regular expressions (whole name) of tensors that the transformer's weights
                may lack; they get the initial values of an untrained network, always the same.
            allow_unexpected: regular expressions of tensors in them that the transformer may lack.

        Raises:
            KinemaError: a part is missing, torn or of another kind.
        """
        if text is not None and text_encoder is not None:
            raise KinemaError(
                "another text encoder was given, so weights for it are not read",
                where="text",
                hint="leave one of the two out",
            )
        source = find_source(
            path,
            model=model,
            vae=vae,
            text=text,
            ema=ema,
            offline=offline,
            needs_text=text_encoder is None,
            allowed=Allowed(tuple(allow_new), tuple(allow_unexpected)),
        )
        if attention is not None:
            source = source.with_config(with_attention(source.config, attention))
        if text_dtype is not None:
            source = source.with_config(with_text_dtype(source.config, text_dtype))
        return cls(
            source.config,
            source,
            device=device,
            dtype=dtype,
            vae_dtype=vae_dtype,
            offload=offload,
            tiling=tiling,
            compile=compile,
            text_encoder=text_encoder(source.config.text.config) if text_encoder else None,
        )

    def request(self, prompt: str, **options: Unpack[RequestOptions]) -> GenerateRequest:
        """A request with the checkpoint's own defaults for whatever is not given, checked.

        Raises:
            KinemaError: a value that cannot be met, with the nearest that can.
        """
        return make_request(prompt, self.config, options)

    def generate(self, prompt: str, **options: Unpack[RequestOptions]) -> Clip:
        """Make one video (or image: one frame); the same arguments give the same video."""
        return next(self.generate_all([self.request(prompt, **options)]))

    def generate_all(
        self,
        requests: Sequence[GenerateRequest],
        *,
        batch_size: int = 1,
        on_step: OnStep | None = None,
        world: World | None = None,
    ) -> Iterator[Clip]:
        """Make a clip for each request.

        All requests are checked before weights are read, and all captions are encoded first.
        Requests next to each other that differ only in prompt, seed, sample and references share
        a batch; what comes out does not depend on that, but for rounding (1e-5 of a latent).

        Without off-loading each batch is finished before the next, and clips come in the order of
        the requests. With off-loading each phase runs over all requests, so that networks change
        places once, or once per segment; clips then come at the end of it. An interruption
        (Ctrl-C) while sampling gives out the clips whose latents are complete, and then goes on.

        Args:
            on_step: called after every step with the number of videos that it moved on.
            world: makes this process's share only, of whole batches.

        Raises:
            KinemaError: a request that cannot be met, or too little memory.
        """
        batches = self.check(requests, batch_size=batch_size, world=world).batches
        if world is not None:
            batches = share(batches, world)
        jobs = [[self._job(number, requests[number]) for number in batch] for batch in batches]
        if not jobs:
            return
        self._residency.check_weights()
        captions = self._encode_captions([job for batch in jobs for job in batch])
        groups = [[batch] for batch in jobs] if self.offload == "none" else _groups(jobs)
        for group in groups:
            yield from self._make(group, captions, on_step)

    def check(
        self,
        requests: Sequence[GenerateRequest],
        *,
        batch_size: int = 1,
        world: World | None = None,
    ) -> Plan:
        """What `generate_all` would do, if all of the requests can be met.

        Raises:
            KinemaError: a request that cannot be met, or too little memory.
        """
        if batch_size < 1:
            raise KinemaError(f"batch size is {batch_size}; it must be at least 1")
        if not requests:
            raise KinemaError("no request", hint="at least one")
        for request in dict.fromkeys(requests):
            check_request(request, self.config)
            negative = request.negative_prompt
            texts = [*segment_texts(request), *([] if negative is None else [negative])]
            self._residency.text_encoder().check(texts)
        batches = batches_of(requests, batch_size, _alike)
        # Requests of one shape need the same; the largest batch of each shape is enough.
        largest: dict[object, list[int]] = {}
        for batch in batches:
            key = _alike(requests[batch[0]])
            if len(batch) > len(largest.get(key, [])):
                largest[key] = batch
        free = free_memory(self.device, world)
        estimates = []
        for batch in largest.values():
            # One with references stands for all.
            first = max((requests[n] for n in batch), key=lambda r: bool(r.references))
            estimate = self.memory(first, len(batch))
            if estimate.total > free:
                require_memory(
                    self._memory_settings(len(batch)), first, self.config, free, str(self.device)
                )
            estimates.append(estimate)
        return Plan(batches, max(estimates, key=lambda e: e.total), free)

    def lost_words(self, prompt: str) -> str:
        """The end of a prompt that the text encoder has no room for; empty if all of it fits."""
        return self._residency.text_encoder().lost(prompt)

    def check_weights(self) -> dict[str, list[str]]:
        """Make sure that the weights fit; reads names and shapes only.

        Returns:
            names of the transformer's tensors that the weights lack (`new_tensors`) and of those
            that are left out (`left_out`), where that was allowed.

        Raises:
            KinemaError: weights that do not fit.
        """
        self._residency.check_weights()
        return self._residency.differences()

    def load(self) -> Parts:
        """The networks, read now if they were not yet (not with off-loading).

        Raises:
            KinemaError: weights that do not fit; or they are off-loaded by turns.
        """
        return self._residency.load()

    def memory(self, request: GenerateRequest, batch: int) -> MemoryEstimate:
        """What a batch of such requests needs, weights that are not loaded yet included."""
        return estimate_memory(request, self.config, self._memory_settings(batch))

    def latents(
        self, requests: Sequence[GenerateRequest], *, on_step: OnStep | None = None
    ) -> Tensor:
        """Sampled latents, normalised, float32 `[B, C, T, H, W]`, of requests of one shape and one
        segment each."""
        assert all(request.loop == 1 for request in requests), "latents are of one segment"
        batch = [self._job(number, request) for number, request in enumerate(requests)]
        captions = self._encode_captions(batch)
        self._encode_references([batch])
        self._sample_batches([batch], captions, 0, on_step)
        return torch.stack([_latents(job) for job in batch])

    def _job(self, number: int, request: GenerateRequest) -> Job:
        return Job(number, request, check_request(request, self.config), self.config)

    def _memory_settings(self, batch: int) -> MemorySettings:
        return MemorySettings(
            batch=batch,
            dtype=self.dtype,
            vae_dtype=self.vae_dtype,
            offload=self.offload,
            tiling=self._tiling,
            text_bytes=self._text_bytes,
            loaded=self._residency.loaded,
            on_gpu=self.device.type == "cuda",
        )

    @functools.cached_property
    def _text_bytes(self) -> int:
        return self._residency.text_encoder().memory_bytes

    # Phases. Each is a method of its own: when it returns, nothing holds its network any more.

    def _encode_captions(self, jobs: Sequence[Job]) -> dict[str, Caption]:
        texts = [text for job in jobs for text in job.texts]
        texts += [t for job in jobs if (t := job.request.negative_prompt) is not None]
        with self._residency.text() as encoder, self._timed("text", jobs):
            return encode(encoder, texts)

    def _make(
        self, batches: list[Batch], captions: dict[str, Caption], on_step: OnStep | None
    ) -> Iterator[Clip]:
        self._encode_references(batches)
        for segment in range(max(batch[0].request.loop for batch in batches)):
            active = [batch for batch in batches if segment < batch[0].request.loop]
            sampled, interrupted = self._sample_batches(active, captions, segment, on_step)
            if interrupted is not None:
                sampled = [b for b in sampled if segment + 1 == b[0].request.loop]
            yield from self._decode_batches(sampled, segment)
            if interrupted is not None:
                raise interrupted

    def _encode_references(self, batches: list[Batch]) -> None:
        with_references = [j for batch in batches for j in batch if j.has_references]
        if not with_references:
            return
        with self._residency.vae() as vae, matmul_precision(self.vae_dtype):
            for job in with_references:
                with self._timed("encode", [job]):
                    job.encode_references(vae, self.device)

    def _sample_batches(
        self,
        batches: list[Batch],
        captions: dict[str, Caption],
        segment: int,
        on_step: OnStep | None,
    ) -> tuple[list[Batch], KeyboardInterrupt | None]:
        """Latents of a segment; and with an interruption, those of the batches before it."""
        done: list[Batch] = []
        with self._residency.transformer() as model, matmul_precision(self.dtype):
            for batch in batches:
                requests = [job.request for job in batch]
                first = requests[0]
                shape = (
                    self.config.model.in_channels,
                    *self.config.vae.config.latent_size(
                        first.num_frames, first.height, first.width
                    ),
                )
                negative = [r.negative_prompt for r in requests]
                try:
                    with self._timed("sample", batch):
                        latents = engine.sample(
                            model,
                            build_process(process_config(first, self.config)),
                            requests,
                            [captions[job.texts[segment]] for job in batch],
                            [None if text is None else captions[text] for text in negative],
                            [job.conditioning(segment, shape) for job in batch],
                            segment=segment,
                            shape=shape,
                            device=self.device,
                            on_step=on_step,
                        ).cpu()
                except KeyboardInterrupt as interruption:
                    return done, interruption
                for job, z in zip(batch, latents, strict=True):
                    job.latents = z
                done.append(batch)
        return done, None

    def _decode_batches(self, batches: list[Batch], segment: int) -> Iterator[Clip]:
        if not batches:
            return
        with self._residency.vae() as vae:
            for batch in batches:
                for job in batch:
                    with self._timed("decode", [job]), matmul_precision(self.vae_dtype):
                        job.decode(vae, segment, self.device)
                    if segment + 1 == job.request.loop:
                        clip = self._clip(job, len(batch))
                        job.forget()  # of many videos, only what is still needed stays
                        yield clip
                        del clip

    def _clip(self, job: Job, batch_size: int) -> Clip:
        text = self.config.text.config
        record: dict[str, Any] = {
            "pipeline": self._residency.identity(),
            "config_sha256": fingerprint(self.config),
            "dtype": self.dtype,
            "vae_dtype": self.vae_dtype,
            "text_dtype": text.precision if isinstance(text, T5TextConfig) else None,
            "offload": self.offload,
            "device": _device_name(self.device),
            "versions": {
                "kinema": kinema.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "batch_size": batch_size,
            # What the text encoder got for each segment, and what references were made to fit.
            "texts": job.texts,
            "notes": list(job.plan.notes),
            "seconds": {name: round(value, 3) for name, value in job.seconds.items()},
        }
        fps = self.config.played_fps(job.request.fps)
        return Clip(job.video(), job.request, record, fps=fps, number=job.number)

    @contextmanager
    def _timed(self, name: str, jobs: Sequence[Job]) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        for job in jobs:
            job.seconds[name] = job.seconds.get(name, 0.0) + seconds


def _alike(request: GenerateRequest) -> object:
    """Equal for requests that may share a batch: all but what each row has for itself."""
    return replace(
        request,
        prompt="-",
        refined_from=None,
        seed=0,
        sample=0,
        negative_prompt=None,
        aes=None,
        flow=None,
        camera_motion=None,
        references=(),
        mask_strategy="",
        # What follows counts between segments, of each row for itself.
        condition_frame_length=None,
        condition_frame_edit=0.0,
    )


def _groups(batches: list[Batch]) -> list[list[Batch]]:
    """Batches whose phases run together: all, but that frames of long videos wait for the segments
    still to come, and must not fill the memory meanwhile."""
    groups: list[list[Batch]] = []
    room = 0
    for batch in batches:
        waiting = sum(job.waiting_bytes for job in batch)
        if not groups or waiting > room:
            groups.append([])
            room = WAITING_BYTES
        groups[-1].append(batch)
        room -= waiting
    return groups


def _latents(job: Job) -> Tensor:
    assert job.latents is not None
    return job.latents


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
