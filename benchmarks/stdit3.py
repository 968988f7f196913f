"""Forward and backward of STDiT3: `python benchmarks/stdit3.py [--sizes tiny S XL/2] [...]`.

Prints one markdown table. On a GPU the sizes are those of training, in bf16, and the rate is
compared with the fastest square matrix product of the same run; on a CPU the large models get few
tokens. FLOPs are those that the model needs: a backward pass counts as two forward passes, and
recomputed work does not count.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from typing import Any, get_args

import torch
from torch import nn

from kinema.models.build import build_transformer
from kinema.models.config import AttentionBackend, LatentSize, STDiT3Config
from kinema.parallel.recompute import apply_recompute

MODELS = {
    "tiny": STDiT3Config(
        depth=4, hidden_size=192, num_heads=6, caption_channels=256, model_max_length=24
    ),
    "S": STDiT3Config(depth=12, hidden_size=384, num_heads=6),
    "XL/2": STDiT3Config(),
}
# Latents (frames, rows, columns) and batch. On a GPU: 144p, 240p, 480p and 720p of the recipes,
# 4:3 to 16:9, 51 to 102 frames, and a batch of images.
CPU_SHAPES: dict[str, list[tuple[LatentSize, int]]] = {
    "tiny": [((5, 8, 8), 8)],
    "S": [((5, 8, 8), 2)],
    "XL/2": [((2, 8, 8), 1)],
}
GPU_SHAPES: list[tuple[LatentSize, int]] = [
    ((1, 64, 64), 32),
    ((15, 18, 32), 16),
    ((15, 30, 53), 8),
    ((15, 60, 106), 2),
    ((30, 90, 160), 1),
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time STDiT3 forward and backward.")
    parser.add_argument("--sizes", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--latent", type=_latent, help="frames x rows x columns, as 15x30x53")
    parser.add_argument("--batch", type=int, help="with --latent")
    parser.add_argument("--text", type=int, default=120, help="text tokens kept of each caption")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="default: bf16 on a GPU")
    parser.add_argument("--attention", choices=get_args(AttentionBackend), default="auto")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    ceiling = matmul_rate(device, dtype, args.repeats)
    print(f"{date.today()}, {_hardware(device)}, torch {torch.__version__}, {name}; ", end="")
    print(f"matrix product ceiling {ceiling / 1e12:.2f} TFLOP/s\n")
    print(
        "| model | latent | batch | tokens | forward ms | of ceiling | + backward ms | of ceiling |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for size in args.sizes:
        config = replace(MODELS[size], attention=args.attention)
        shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES[size]
        if args.latent:
            shapes = [(args.latent, args.batch or 1)]
        model = build_transformer(config).to(device, dtype)
        if args.recompute:
            apply_recompute(model)
        for latent, batch in shapes:
            text = min(args.text, config.model_max_length)
            given = inputs(config, latent, batch, text, device)
            forward, both = times(model, given, args.repeats, device)
            flops = batch * config.forward_flops(latent, text)
            print(
                f"| {size} | {'x'.join(map(str, latent))} | {batch} "
                f"| {batch * config.num_tokens(latent)} "
                f"| {1e3 * forward:.1f} | {flops / forward / ceiling:.1%} "
                f"| {1e3 * both:.1f} | {3 * flops / both / ceiling:.1%} |",
                flush=True,
            )


def inputs(
    config: STDiT3Config, latent: LatentSize, batch: int, text: int, device: torch.device
) -> dict[str, Any]:
    """Random inputs; captions keep `text` tokens of `model_max_length`."""
    length = config.model_max_length
    return {
        "x": torch.randn(batch, config.in_channels, *latent, device=device),
        "timestep": torch.full((batch,), 500.0, device=device),
        "y": torch.randn(batch, 1, length, config.caption_channels, device=device),
        "mask": (torch.arange(length) < text).expand(batch, -1),
        "fps": torch.full((batch,), 24.0, device=device),
        "height": torch.full((batch,), 8.0 * latent[1], device=device),
        "width": torch.full((batch,), 8.0 * latent[2], device=device),
    }


def times(
    model: nn.Module, given: dict[str, Any], repeats: int, device: torch.device
) -> tuple[float, float]:
    """Median seconds of a forward pass without gradients, and of forward and backward."""

    def forward() -> None:
        with torch.no_grad():
            model(**given)

    def both() -> None:
        model.zero_grad(set_to_none=True)
        model(**given).square().mean().backward()

    return _median_seconds(forward, repeats, device), _median_seconds(both, repeats, device)


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """FLOP/s of the fastest of some square matrix products."""
    rates = []
    for size in (4096, 8192, 16384) if device.type == "cuda" else (512, 1024, 2048):
        a = torch.randn(size, size, device=device, dtype=dtype)
        b = torch.randn(size, size, device=device, dtype=dtype)
        out = torch.empty_like(a)

        def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        rates.append(2 * size**3 / _median_seconds(product, repeats, device))
    return max(rates)


def _median_seconds(work: Callable[[], None], repeats: int, device: torch.device) -> float:
    seconds = []
    for turn in range(repeats + 2):  # two to warm up
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn >= 2:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _latent(text: str) -> LatentSize:
    frames, rows, columns = (int(n) for n in text.split("x"))
    return frames, rows, columns


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
