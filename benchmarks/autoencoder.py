"""Decoding and encoding with the autoencoders: `python benchmarks/autoencoder.py [--small] [...]`.

Prints one markdown table: whole micro-batches of frames, one frame at a time, and bands of rows.
Every number comes from a process of its own, so that its peak memory is its own: on a GPU what
PyTorch allocated, on a CPU the process's largest resident size less that before the call. Weights
are random; they change neither time nor memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch

from kinema.models.build import build_vae
from kinema.models.config import (
    ImageVAEConfig,
    Tiling,
    VAE2DConfig,
    VAEConfig,
    VAETemporalConfig,
    VideoVAEConfig,
)

TILINGS = {"whole": None, "one frame at a time": Tiling(rows=None), "bands of 32": Tiling()}
SMALL_2D = VAE2DConfig(block_out_channels=(16, 32, 64, 64), norm_num_groups=8)
SMALL_TIME = VAETemporalConfig(filters=16, num_groups=8)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the autoencoders.")
    parser.add_argument("--small", action="store_true", help="an eighth of the channels")
    parser.add_argument("--size", default="1280x720", help="WIDTHxHEIGHT")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], help="default: both")
    parser.add_argument("--vaes", nargs="+", choices=["image", "video"], default=["image", "video"])
    parser.add_argument("--row", help=argparse.SUPPRESS)  # the process of one row
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(**json.loads(args.row))))
        return
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
    width, height = (int(n) for n in args.size.split("x"))
    print(
        f"{date.today()}, {device}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{args.frames} frames of {width}x{height}{', an eighth of the channels' * args.small}\n"
    )
    print("| autoencoder | dtype | how | decode, s | GiB | encode, s | GiB | decode, TFLOP/s |")
    print("|---|---|---|---|---|---|---|---|")
    for vae in args.vaes:
        for dtype in args.dtypes or ["fp32", "bf16"]:
            for how in TILINGS:
                row = {"vae": vae, "dtype": dtype, "how": how, "small": args.small}
                row |= {"size": [args.frames, height, width]}
                got = run_alone(row | {"what": "decode"}) | run_alone(row | {"what": "encode"})
                print(
                    f"| {vae} | {dtype} | {how} | {got['decode_s']:.2f} | {got['decode_gib']:.2f} "
                    f"| {got['encode_s']:.2f} | {got['encode_gib']:.2f} | {got['tflops']:.3g} |",
                    flush=True,
                )


def run_alone(row: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, __file__, "--row", json.dumps(row)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def measure(
    vae: str, dtype: str, how: str, small: bool, size: list[int], what: str
) -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = vae_config(vae, small)
    network = build_vae(config).to(device, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    network.eval().requires_grad_(False)
    network.tiling = TILINGS[how]
    frames, height, width = size
    z = torch.randn(1, config.latent_channels, *config.latent_size(*size), device=device)
    video = torch.rand(1, 3, *size, device=device) * 2 - 1

    def call() -> object:
        return network.decode(z, frames) if what == "decode" else network.encode(video)

    if device.type == "cuda":
        call()  # kernels are chosen
    seconds, gib = _timed(call, device)
    measured = {f"{what}_s": seconds, f"{what}_gib": gib}
    if what == "decode":
        measured["tflops"] = config.decode_flops(frames, height, width) / seconds / 1e12
    return measured


def vae_config(vae: str, small: bool) -> VAEConfig:
    if vae == "image":
        return ImageVAEConfig(vae_2d=SMALL_2D) if small else ImageVAEConfig()
    return VideoVAEConfig(vae_2d=SMALL_2D, vae_temporal=SMALL_TIME) if small else VideoVAEConfig()


def _timed(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of one call, and GiB above what was there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident_peak()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    after = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_peak()
    return seconds, (after - before) / 2**30


def resident_peak() -> int:
    """The largest resident size this process has had, in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


if __name__ == "__main__":
    main()
