"""What is counted on the meta device against what is really taken, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kinema.generation.config import GenerateRequest
from kinema.generation.live_bytes import FusedAttention, LiveBytes, peak_bytes
from kinema.generation.memory import (
    MemorySettings,
    TooLittleMemoryError,
    estimate_memory,
    require_memory,
)
from kinema.generation.released import find_released
from kinema.models.config import Tiling
from tests.unit.generation.tiny import tiny_config

GOOD = GenerateRequest(prompt="a kite", width=256, height=256, num_frames=17)
FULL = GenerateRequest(prompt="a kite", width=1280, height=720, num_frames=408, fps=24.0)


def test_bytes_are_those_of_tensors_that_live_together() -> None:
    def work() -> torch.Tensor:
        a = torch.empty(1024, device="meta")
        b = a.view(32, 32).t() + 1  # a view of a is free, the sum is not
        b.mul_(2)
        del a
        c = torch.empty(2048, dtype=torch.bfloat16, device="meta")
        return torch.cat([b.flatten(), c[:10].float()])

    with LiveBytes() as live:
        result = work()
    assert live.now == result.untyped_storage().nbytes() + (-result.nbytes % 512)
    # b's copy, b and c, then the joined one: 4096 + 4096 + 4096 + 10 floats rounded up + result.
    assert live.peak == 4096 + 4096 + 4096 + 512 + live.now
    del result
    assert live.now == 0


def test_what_is_given_is_not_counted() -> None:
    given = torch.empty(10_000, device="meta")
    assert peak_bytes(lambda: given[5:].view(-1, 5)) == 0
    assert peak_bytes(lambda: given + 1) == -(-40_000 // 512) * 512


def test_attention_is_counted_as_a_fused_kernel() -> None:
    q = torch.empty(1, 8, 4096, 64, device="meta")
    peak = peak_bytes(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    scores = 8 * 4096 * 4096 * 4
    assert q.nbytes <= peak < q.nbytes * 1.1 < scores
    with FusedAttention():
        out = torch.nn.functional.scaled_dot_product_attention(q, q[:, :, :7], q[:, :, :7])
    assert out.shape == q.shape


MEASURE = """
import sys
from pathlib import Path

import torch
from kinema.generation.engine import decode
from kinema.generation.pipeline import Pipeline
from tests.unit.generation.tiny import tiny_config, tiny_parts

torch.set_num_threads(1)
what, size, frames = sys.argv[1], *map(int, sys.argv[2:])
config = tiny_config("stdit2", hidden_size=96)
pipeline = Pipeline(config, tiny_parts(config), device="cpu")
small = pipeline.request("a", width=32, height=32, num_frames=1, num_sampling_steps=1)
z = pipeline.latents([small])
decode(pipeline.load().vae, z[0], 1, torch.device("cpu"))
request = pipeline.request("a", width=size, height=size, num_frames=frames, num_sampling_steps=1)

def kib(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what is there now
before = kib("VmRSS")
if what == "sampling":
    pipeline.latents([request])
else:
    decode(pipeline.load().vae, torch.randn(4, frames, size // 4, size // 4), frames, "cpu")
after = kib("VmHWM")
estimate = pipeline.memory(request, 1)
counted = estimate.sampling if what == "sampling" else estimate.vae
print((after - before) * 1024, counted.activations)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("what", "size", "frames"), [("sampling", 256, 8), ("decoding", 384, 4)])
def test_what_is_counted_is_what_a_cpu_takes(what: str, size: int, frames: int) -> None:
    """Roughly: an allocator's rests, and what kernels take for themselves, are not counted."""
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, what, str(size), str(frames)],
        capture_output=True,
        text=True,
        check=True,
        # Memory goes back to the system at once, so that the peak is that of what lives.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    measured, counted = map(int, found.stdout.split())
    assert measured > 50 * 2**20, "too small to measure"
    assert 0.75 < measured / counted < 1.6, f"{measured / 2**20:.0f}, {counted / 2**20:.0f} MiB"


def test_full_size_is_counted() -> None:
    config = find_released("opensora-1.2").config
    settings = MemorySettings(dtype="bf16", vae_dtype="bf16", text_bytes=9 * 2**30)
    estimate = estimate_memory(FULL, config, settings)
    gib = 2**30
    assert 2.2 < estimate.sampling.weights / gib < 2.3  # 1.2 billion numbers in two bytes
    assert 15 < estimate.sampling.activations / gib < 40
    assert 4 < estimate.vae.activations / gib < 12
    assert "text encoder 9.0 GiB + " in estimate.describe()


def test_every_way_to_save_memory_shows() -> None:
    config = tiny_config("stdit3", depth=8, hidden_size=96)
    base = MemorySettings(batch=2, text_bytes=2**20)

    def total(**changes: object) -> int:
        return estimate_memory(GOOD, config, replace(base, **changes)).total  # type: ignore[arg-type]

    assert total(offload="layers") < total(offload="phase") < total(offload="none")
    assert total(dtype="bf16") < total()
    assert total(loaded=frozenset(("text",))) < total()
    assert total(on_gpu=True) > total()
    plain = estimate_memory(GOOD, config, base)
    streamed = estimate_memory(GOOD, config, replace(base, offload="layers"))
    assert streamed.sampling.weights < plain.sampling.weights / 2
    assert streamed.text.weights == 0
    single = estimate_memory(GOOD, config, replace(base, batch=1))
    assert single.sampling.activations < 0.6 * plain.sampling.activations
    one_pass = estimate_memory(replace(GOOD, cfg_scale=1.0), config, base)
    assert one_pass.sampling.activations < 0.6 * plain.sampling.activations
    tiled = estimate_memory(GOOD, config, replace(base, tiling=Tiling()))
    assert tiled.vae.activations < 0.7 * plain.vae.activations


def test_what_does_not_fit_is_refused_with_what_would_make_it_fit() -> None:
    config = tiny_config("stdit3", depth=8, hidden_size=96)
    settings = MemorySettings(batch=2, text_bytes=2**26)
    parts = estimate_memory(GOOD, config, settings)

    def hint(free: int) -> str:
        with pytest.raises(TooLittleMemoryError, match="is free on cuda:0") as caught:
            require_memory(settings, GOOD, config, free, "cuda:0")
        assert "weights + activations: text encoder 64 MiB" in str(caught.value)
        return str(caught.value.hint)

    require_memory(settings, GOOD, config, parts.total, "cuda:0")
    # Sampling needs the most, and half of it is the second video.
    assert parts.sampling.activations > 1.5 * parts.vae.activations
    assert hint(parts.total - 1) == "--batch-size 1"
    # The text encoder's weights are most of what is left then.
    single = estimate_memory(
        GOOD, config, replace(settings, batch=1, dtype="bf16", offload="phase")
    )
    assert hint(single.total) == "--batch-size 1 --dtype bf16 --offload phase"
    assert hint(2**20) == "a smaller size or fewer frames"


def test_a_large_text_encoder_is_told_apart_from_the_rest() -> None:
    config = find_released("opensora-1.2").config
    request = GenerateRequest(prompt="a kite", width=424, height=240, num_frames=51)
    settings = MemorySettings(dtype="bf16", vae_dtype="bf16", text_bytes=9 * 2**30)
    with pytest.raises(TooLittleMemoryError) as caught:
        require_memory(settings, request, config, 11 * 2**30, "cuda:0")
    assert caught.value.hint == "--offload phase"
    with pytest.raises(TooLittleMemoryError) as caught:
        require_memory(settings, request, config, 6 * 2**30, "cuda:0")
    assert caught.value.hint == "--offload layers"
    with pytest.raises(TooLittleMemoryError) as caught:
        require_memory(replace(settings, offload="phase"), request, config, 6 * 2**30, "cuda:0")
    assert caught.value.hint == "--text-dtype int8"


def test_tiny_models_are_counted_too() -> None:
    for family in ("stdit3", "stdit2", "stdit", "pixart", "dit", "latte"):
        config = tiny_config(family)
        request = replace(GOOD, num_frames=config.buckets[0].num_frames)
        estimate = estimate_memory(request, config, MemorySettings())
        assert 0 < estimate.sampling.weights < estimate.sampling.activations
        assert 0 < estimate.vae.weights < estimate.vae.activations
