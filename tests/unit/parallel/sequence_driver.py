"""Runs what ranks share, on several forked ranks that meet once for all cases.

    python -m tests.unit.parallel.sequence_driver RANKS RESULTS

Every rank checks every case; what rank 0 found goes to the JSON file RESULTS, by case.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from kinema.data.buckets import Bucket
from kinema.data.loader import Batch, ClipKey, SkippedRow
from kinema.models.config import STDiT2Config, STDiT3Config, STDiTConfig
from kinema.models.image_vae import ImageVAE
from kinema.models.stdit import STDiT
from kinema.models.stdit2 import STDiT2
from kinema.models.stdit3 import STDiT3
from kinema.models.transformer import ClipShape, Transformer
from kinema.models.vae import VideoVAE
from kinema.parallel.compile import compile_blocks
from kinema.parallel.encode import encode_shared
from kinema.parallel.gradients import GradientMean
from kinema.parallel.recompute import apply_recompute
from kinema.parallel.sequence import SequenceGroups, share_frames
from kinema.parallel.world import World, open_world
from kinema.training.agree import agree_on_rows
from tests.unit.models import test_image_vae, test_vae

SIZE: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 24,
    "num_heads": 2,
    "caption_channels": 10,
    "model_max_length": 7,
    "attention": "math",
}
MODELS: dict[str, Callable[..., Transformer]] = {
    "stdit": lambda **more: STDiT(STDiTConfig(**SIZE, **more)),
    "stdit2": lambda **more: STDiT2(STDiT2Config(**SIZE, **more)),
    "stdit3": lambda **more: STDiT3(STDiT3Config(**SIZE, **more)),
}
Grads = dict[str, Tensor]
Result = tuple[Tensor, Grads]


def build(name: str, **more: Any) -> Transformer:
    """A model in float64 in which no branch is silent."""
    model = MODELS[name](**more).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key != "rope.freqs":
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.2 * draw)
    return model


def inputs(latent: tuple[int, int, int], *, masked: bool, seed: int = 1) -> dict[str, Any]:
    """Three clips with texts of uneven lengths, one of them without any."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    noised = torch.rand(3, latent[0], generator=generator) > 0.4
    return {
        "x": draw(3, 4, *latent),
        "timestep": torch.tensor([3.0, 500.0, 990.0]),
        "text": draw(3, 1, 7, 10),
        "mask": torch.arange(7) < torch.tensor([2, 7, 0])[:, None],
        "x_mask": noised if masked else None,
        "shape": ClipShape(*torch.tensor([[24.0], [48.0], [64.0], [17.0]]).expand(4, 3)),
    }


def weighed(out: Tensor) -> Tensor:
    """A loss in which every element of the output counts otherwise."""
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum()


def run(model: Transformer, given: dict[str, Any]) -> Result:
    """Output and gradients."""
    out = model.predict(**given)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(weighed(out), [*parameters.values()])
    return out.detach(), dict(zip(parameters, grads, strict=True))


@dataclass(frozen=True)
class Ranks:
    """This rank among the others, all of which can share a clip."""

    world: World
    groups: SequenceGroups

    def all(self) -> AbstractContextManager[None]:
        return self.groups.use(self.world.size)

    def shared(self, model: Transformer) -> Transformer:
        share_frames(model, self.groups)
        return model

    def summed(self, grads: Grads) -> Grads:
        """The sum of gradients over the ranks that share."""
        sizes = [g.numel() for g in grads.values()]
        total = self.groups.stack(torch.cat([g.flatten() for g in grads.values()])).sum(0)
        parts = zip(grads.items(), total.split(sizes), strict=True)
        return {name: part.view_as(grad) for (name, grad), part in parts}


def check_equal(got: Result, want: Result) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-12)
    largest = max(float(grad.abs().max()) for grad in want[1].values())
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-11 * largest)


in_float64 = mock.patch.object(Tensor, "float", Tensor.double)
"""Modulation, rotation and the output are float32 in models of any dtype; not herein."""


# Cases: each is the same on every rank, all of which share


@in_float64
def equal(here: Ranks, name: str, latent: tuple[int, int, int], masked: bool) -> None:
    given = inputs(latent, masked=masked)
    want = run(build(name), given)
    model = copy.deepcopy(here.shared(build(name)))  # copies are shared as well
    degree = 2
    while degree <= here.world.size:
        with here.groups.use(degree):
            out, grads = run(model, given)
            check_equal((out, here.summed(grads)), want)
        degree *= 2
    # Outside of `use` each rank is alone.
    check_equal(run(model, given), want)


@in_float64
def patches_of_two_frames(here: Ranks) -> None:
    given = inputs((5, 4, 4), masked=False)
    want = run(build("stdit", patch_size=(2, 2, 2)), given)
    model = here.shared(build("stdit", patch_size=(2, 2, 2)))
    with here.all():
        out, grads = run(model, given)
        check_equal((out, here.summed(grads)), want)


@in_float64
def recomputed(here: Ranks, kind: Literal["full", "selective"]) -> None:
    """The backward pass runs after `use`, and still shares what it recomputes."""
    given = inputs((5, 6, 4), masked=True)
    want = run(build("stdit3"), given)
    model = here.shared(build("stdit3"))
    apply_recompute(model, kind=kind)
    with here.all():
        out = model.predict(**given)
    weighed(out).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    with here.all():
        check_equal((out.detach(), here.summed(grads)), want)


def in_autocast(here: Ranks) -> None:
    """What is sent in bfloat16 would be cast to it anyway."""
    given = inputs((5, 6, 4), masked=True)
    given["x"], given["text"] = given["x"].float(), given["text"].float()
    with torch.autocast("cpu", torch.bfloat16):
        want, wanted = run(build("stdit3").float(), given)
        with here.all():
            out, grads = run(here.shared(build("stdit3").float()), given)
            total = here.summed(grads)
    # Other numbers of rows at once round otherwise, by a unit in the last place of bfloat16.
    assert float((out - want).norm()) < 0.01 * float(want.norm())
    for name, grad in wanted.items():
        assert float((total[name] - grad).norm()) < 0.05 * float(grad.norm()) + 1e-3, name


def compiled(here: Ranks) -> None:
    """Without breaks of the graph, which would leave the exchange out of it."""
    given = inputs((5, 6, 4), masked=False)
    want = run(build("stdit3"), given)
    model = here.shared(build("stdit3"))
    compile_blocks(model, backend="aot_eager")
    counters.clear()
    with here.all():
        out, grads = run(model, given)
        # Compiled code casts and sums float32 parts in another order.
        torch.testing.assert_close(out, want[0], rtol=1e-5, atol=1e-5)
        total = here.summed(grads)
    for key, grad in want[1].items():
        torch.testing.assert_close(total[key], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()))
    assert counters["stats"]["unique_graphs"] == 2  # of a block in space and of one in time
    assert not counters["graph_break"]


def bytes_sent(here: Ranks, kind: Literal["full", "selective"] | None, half: bool) -> list[int]:
    """Bytes that leave this rank in each all-to-all of a step, T = 5 and S = 6."""
    sent: list[int] = []
    ranks = here.world.size

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if "all_to_all" in str(op):
                sent.append(args[0].nbytes * (ranks - 1) // ranks)
            return op(*args, **(kwargs or {}))

    model = here.shared(build("stdit3").float())
    if kind is not None:
        apply_recompute(model, kind=kind)
    given = inputs((5, 6, 4), masked=True)
    given["x"], given["text"] = given["x"].float(), given["text"].float()
    with Counting(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        with here.all():
            out = model.predict(**given)
        out.sum().backward()
    return sent


@in_float64
def weights_of_a_step(here: Ranks) -> None:
    """Two micro-batches on each of four ranks: one of each pair, then one of all: three in all.

    With weight = ranks * accumulation / 3 the mean over ranks is the mean over the three.
    """
    clips = [inputs((3, 4, 4), masked=True, seed=seed) for seed in (1, 2, 3)]
    alone = [run(build("stdit2"), clip)[1] for clip in clips]
    want = {n: torch.stack([grads[n] for grads in alone]).mean(0) for n in alone[0]}

    model = here.shared(build("stdit2"))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    means = GradientMean(trained.values(), here.world)
    means.zero()
    weight, accumulation = here.world.size * 2 / 3, 2
    for clip, degree in ((clips[here.world.rank // 2], 2), (clips[2], 4)):
        means.expect(last=degree == 4)
        with here.groups.use(degree):
            out = model.predict(**clip)
        (weighed(out) * weight / accumulation).backward()
    means.finish()
    nothing = torch.zeros(())
    grads = {n: p.grad for n, p in trained.items() if p.grad is not None}
    check_equal((nothing, grads), (nothing, want))


def encoded(here: Ranks, kind: str, clips: int) -> list[int]:
    """Shared encoding of clips of 12 frames; how many frames each rank encoded."""
    vae: VideoVAE | ImageVAE
    if kind == "video":  # in chunks of 5, 5 and 2 frames
        vae = test_vae.build(test_vae.tiny())
        vae.shift.fill_(0.5)
    else:
        vae = test_image_vae.build(test_image_vae.tiny())
    video = test_vae.video(clips, frames=12)
    with torch.no_grad():
        want = vae.encode(video, noise=torch.Generator().manual_seed(5))
    seen = []
    network = vae.spatial_vae.module.encoder if isinstance(vae, VideoVAE) else vae.encoder
    network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with here.all():
        got = encode_shared(vae, video, torch.Generator().manual_seed(5), here.groups)
        # Other numbers of frames at once round otherwise.
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
        assert all(torch.equal(got, other) for other in here.groups.stack(got))
    return here.world.gather(sum(seen))


def rows(here: Ranks) -> None:
    """The first rank could not read row 7, the last one neither 7 nor 9."""
    first, last = here.world.is_main, here.world.rank == here.world.size - 1
    bad = [7, 9] if last else [7] if first else []
    good = [row for row in (3, 7, 9, 4) if row not in bad]
    batch = Batch(
        video=torch.tensor(good).float().view(-1, 1, 1, 1, 1).expand(-1, 3, 5, 8, 8),
        text=[f"clip {row}" for row in good],
        fps=torch.tensor(good).float(),
        rows=np.array(good),
        keys=tuple(ClipKey(row, 0, 5, 8, 8) for row in good),
        decoded=(True,) * len(good),
        bucket=Bucket(0, "tiny", 5, 1.0, 8, 8, 4),
        weight=1.0,
        degree=here.world.size,
        skipped=[SkippedRow(row, f"{row}.mp4", "timeout", "took too long") for row in bad],
    )
    with here.all():
        agreed = agree_on_rows(batch, here.groups)
    assert agreed.rows.tolist() == [3, 4]
    assert agreed.video[:, 0, 0, 0, 0].tolist() == agreed.fps.tolist() == [3, 4]
    assert agreed.text == ["clip 3", "clip 4"]
    assert [skipped.row for skipped in agreed.skipped] == [7, 9]
    assert agree_on_rows(batch, here.groups).rows.tolist() == good  # alone


CASES: dict[str, Callable[[Ranks], Any]] = {
    # Frames and places that ranks divide and not, fewer of them than ranks, one of each.
    **{
        f"{name} {latent} {'masked' if masked else ''}".strip(): partial(
            equal, name=name, latent=latent, masked=masked
        )
        for name in MODELS
        for latent, masked in [((5, 6, 7), True), ((3, 4, 4), False), ((1, 6, 4), True)]
    },
    "stdit3 (4, 2, 2)": partial(equal, name="stdit3", latent=(4, 2, 2), masked=False),
    "patches of two frames": patches_of_two_frames,
    "autocast": in_autocast,
    "recompute full": partial(recomputed, kind="full"),
    "recompute selective": partial(recomputed, kind="selective"),
    "compiled": compiled,
    "bytes": partial(bytes_sent, kind=None, half=False),
    "bytes in bfloat16": partial(bytes_sent, kind=None, half=True),
    "bytes with full": partial(bytes_sent, kind="full", half=True),
    "bytes with selective": partial(bytes_sent, kind="selective", half=True),
    "weights of a step": weights_of_a_step,
    "video clips": partial(encoded, kind="video", clips=3),
    "one video clip": partial(encoded, kind="video", clips=1),
    "images": partial(encoded, kind="image", clips=3),
    "rows": rows,
}


def cases_of(ranks: int) -> list[str]:
    """On four ranks all but the one that is slow."""
    if ranks == 2:
        return ["compiled", "bytes", "stdit3 (5, 6, 7) masked"]
    return [name for name in CASES if name != "compiled"]


def rank_main(rank: int, ranks: int, port: str, results: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    found = {}
    with open_world("cpu", timeout=timedelta(seconds=100)) as world:
        here = Ranks(world, SequenceGroups(world, ranks, timeout=timedelta(seconds=100)))
        for name in cases_of(ranks):
            found[name] = CASES[name](here)
    if rank == 0:
        results.write_text(json.dumps(found))


def main() -> None:
    ranks, results = int(sys.argv[1]), Path(sys.argv[2])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            rank_main(rank, ranks, port, results)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    failed = False
    for _ in children:
        _, code = os.wait()
        if code and not failed:  # the others would wait for it
            failed = True
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
    sys.exit(failed)


if __name__ == "__main__":
    main()
