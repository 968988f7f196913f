"""Sampling and decoding of every 1.x model: `python benchmarks/generation.py [--model ...]`.

Prints one markdown table. Networks have their released sizes and random weights, so that nothing
has to be downloaded; times do not depend on the weights. What is timed is what `kinema generate`
runs: the transformer under guidance with prepared text, the solver's step, the autoencoder. The
text encoder is left out: it runs once per prompt.

On a GPU without arguments: the rows of `GPU_ROWS`, in bf16, all steps. On a CPU: small versions of
the models, and only a few steps, from which the total is worked out (`*`).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import torch
from torch import Tensor

from kinema.diffusion.process import build_process
from kinema.generation import engine
from kinema.generation.captions import GuidedText
from kinema.generation.config import GenerateRequest, PipelineConfig
from kinema.generation.precision import DTYPES, matmul_precision, usual_dtype, vae_dtype_for
from kinema.generation.released import SIZES, find_released
from kinema.models.autoencoder import Autoencoder
from kinema.models.build import build_transformer, build_vae
from kinema.models.config import ClassTextConfig, CLIPTextConfig, Tiling
from kinema.models.transformer import Transformer
from kinema.parallel.compile import compile_blocks

TEXT_TOKENS = 120
"""Tokens of a caption: a long sentence or two."""
SMALL: dict[str, Any] = {"depth": 2, "hidden_size": 192, "num_heads": 6}
"""What replaces the released size of a transformer on a CPU."""


@dataclass(frozen=True)
class Row:
    model: str
    resolution: str
    frames: int
    batch: int = 1


GPU_ROWS = (
    Row("opensora-1.2", "240p", 51),
    Row("opensora-1.2", "480p", 51),
    Row("opensora-1.2", "480p", 102),
    Row("opensora-1.2", "720p", 51),
    Row("opensora-1.2", "720p", 102),
    Row("opensora-1.2", "720p", 204),
    Row("opensora-1.1", "240p", 16),
    Row("opensora-1.1", "480p", 64),
    Row("opensora-1.0", "512", 16),
    Row("dit-xl2-256", "256", 1, 8),
    Row("latte-xl2-ucf101", "256", 16),
    Row("pixart-alpha-512", "512", 1, 4),
    Row("pixart-sigma-1024", "1024", 1),
)
CPU_ROWS = (
    Row("opensora-1.2", "144p", 17),
    Row("opensora-1.1", "144p", 16),
    Row("opensora-1.0", "256", 16),
    Row("dit-xl2-256", "256", 1),
    Row("latte-xl2-ucf101", "256", 16),
    Row("pixart-alpha-512", "512", 1),
    Row("pixart-sigma-1024", "512", 1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time sampling and decoding of released models.")
    parser.add_argument("--model", nargs="+", help="names of `kinema models`; default: all rows")
    parser.add_argument("--resolution", choices=SIZES, help="with --model and --num-frames")
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, help="steps that are run; default: all on a GPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU")
    parser.add_argument("--attention", default="auto", help="backend of attention")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--tiling", action="store_true", help="decode in bands of rows")
    parser.add_argument("--full-size", action="store_true", help="released sizes on a CPU too")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    dtype = args.dtype or usual_dtype(device)
    rows = GPU_ROWS if on_gpu else CPU_ROWS
    if args.model:
        rows = tuple(row for row in rows if row.model in args.model)
        if args.resolution and args.num_frames:
            rows = tuple(
                Row(name, args.resolution, args.num_frames, args.batch) for name in args.model
            )
    ceiling = matmul_rate(device, DTYPES[dtype], dtype)
    where = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, CPU"
    print(
        f"{date.today()}, {where}, torch {torch.__version__}, {dtype}, attention {args.attention}"
        f"{', compiled' if args.compile else ''}; matrix product ceiling "
        f"{ceiling / 1e12:.2f} TFLOP/s\n"
    )
    print(
        "| model | size | frames | batch | steps | s/step | sampling s | decoding s | total s "
        "| TFLOP/step | of ceiling | peak GB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        line = measure(
            row,
            device=device,
            dtype=dtype,
            ceiling=ceiling,
            attention=args.attention,
            steps=args.steps or (None if on_gpu else 3),
            compiled=args.compile,
            tiling=args.tiling,
            small=not (on_gpu or args.full_size),
        )
        print(line, flush=True)


def measure(
    row: Row,
    *,
    device: torch.device,
    dtype: str,
    ceiling: float,
    attention: str,
    steps: int | None,
    compiled: bool,
    tiling: bool,
    small: bool,
) -> str:
    """One line of the table."""
    config = find_released(row.model).config
    changes: dict[str, Any] = {"attention": attention, **(SMALL if small else {})}
    config = replace(config, model=replace(config.model, **changes))
    width, height = SIZES[row.resolution]
    all_steps = config.diffusion.num_sampling_steps
    request = GenerateRequest(
        prompt="-",
        width=width,
        height=height,
        num_frames=row.frames,
        fps=24.0,
        num_sampling_steps=all_steps,
        cfg_scale=config.diffusion.cfg_scale,
    )
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model, vae = networks(config, device, dtype)
    vae.tiling = Tiling() if tiling else None
    if compiled:
        compile_blocks(model)
    size = config.vae.config.latent_size(row.frames, height, width)
    shape = (config.model.in_channels, *size)
    with torch.no_grad(), matmul_precision(dtype):
        z, step_s = sample(model, config, request, shape, row.batch, device, steps)
        decoding = seconds(lambda: decode(vae, z[:1], row.frames), device)
    decoding *= row.batch  # one by one, as the pipeline decodes
    text = 0 if isinstance(config.text.config, ClassTextConfig) else TEXT_TOKENS
    flops = 2 * row.batch * config.model.forward_flops(size, text)
    sampling = step_s * all_steps
    estimated = "" if steps is None or steps >= all_steps else "*"
    name = f"{row.model}{' (small)' if small else ''}"
    return (
        f"| {name} | {width}x{height} | {row.frames} | {row.batch} | {all_steps} | {step_s:.3f} "
        f"| {sampling:.1f}{estimated} | {decoding:.1f} | {sampling + decoding:.1f}{estimated} "
        f"| {flops / 1e12:.3g} | {flops / step_s / ceiling:.1%} | {peak_memory(device):.1f} |"
    )


def networks(
    config: PipelineConfig, device: torch.device, dtype: str
) -> tuple[Transformer, Autoencoder]:
    """Transformer and autoencoder with random weights, as the pipeline holds them."""
    with torch.device(device):
        torch.manual_seed(0)
        model = build_transformer(config.model).to(DTYPES[dtype])
        vae = build_vae(config.vae.config).to(DTYPES[vae_dtype_for(dtype)])
    return model.eval().requires_grad_(False), vae.eval().requires_grad_(False)


def sample(
    model: Transformer,
    config: PipelineConfig,
    request: GenerateRequest,
    shape: tuple[int, int, int, int],
    batch: int,
    device: torch.device,
    steps: int | None,
) -> tuple[Tensor, float]:
    """Latents, and the median seconds of a step, over all steps or the first few."""
    process = build_process(config.diffusion)
    y, mask = features(config, 2 * batch, device)
    network = engine.guided_network(
        model,
        process,
        GuidedText(y, mask, 2),
        engine.clip_shape([request] * batch, device),
        request.cfg_scale,
    )
    z = torch.randn(batch, *shape, device=device)
    network(z, torch.full((batch,), 500.0, device=device), None)  # warm up, compile
    timesteps = process.sampling_timesteps(
        request.num_sampling_steps,
        latent_frames=torch.full((batch,), float(shape[1]), device=device),
        height=torch.full((batch,), float(request.height), device=device),
        width=torch.full((batch,), float(request.width), device=device),
    )
    times: list[float] = []
    began = [clock(device)]

    def stop_watch(step: int) -> None:
        now = clock(device)
        times.append(now - began[0])
        began[0] = now
        if step == steps:
            raise StopIteration

    with contextlib.suppress(StopIteration):
        z = process.sample(
            network, z, timesteps, noise=lambda _: torch.randn_like(z), on_step=stop_watch
        )
    return z, statistics.median(times)


def features(
    config: PipelineConfig, rows: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Random text features of `TEXT_TOKENS` tokens, or random classes."""
    text = config.text.config
    if isinstance(text, ClassTextConfig):
        return torch.randint(text.num_classes, (rows,), device=device), None
    if isinstance(text, CLIPTextConfig):
        return torch.randn(rows, 1, text.dim, device=device), None
    mask = (torch.arange(text.max_tokens) < TEXT_TOKENS).expand(rows, -1)
    return torch.randn(rows, 1, text.max_tokens, text.dim, device=device), mask


def decode(vae: Autoencoder, z: Tensor, frames: int) -> Tensor:
    return vae.decode(z, frames)


def matmul_rate(device: torch.device, dtype: torch.dtype, precision: str) -> float:
    """FLOP/s of the fastest of some square matrix products."""
    rates = []
    with matmul_precision(precision):
        for size in (4096, 8192) if device.type == "cuda" else (512, 1024, 2048):
            a = torch.randn(size, size, device=device, dtype=dtype)
            torch.mm(a, a)
            best = min(seconds(lambda a=a: torch.mm(a, a), device) for _ in range(20))
            rates.append(2 * size**3 / best)
    return max(rates)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    start = clock(device)
    run()
    return clock(device) - start


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device: torch.device) -> float:
    """GB: allocated on the GPU for this row, or resident in the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
