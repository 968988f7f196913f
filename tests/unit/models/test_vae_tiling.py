"""Bands of rows: the same as whole frames, without seams, in less memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kinema.models.config import (
    ImageVAEConfig,
    Tiling,
    VAE2DConfig,
    VAETemporalConfig,
    VideoVAEConfig,
)
from kinema.models.image_vae import ImageVAE
from kinema.models.vae import VideoVAE
from kinema.models.vae_tiling import BandedMap, in_parts
from tests.unit.models.trained_vae import (
    psnr,
    trained_image_vae,
    trained_video_vae,
    world_clips,
)

BAND = 12


def space(levels: int = 3) -> VAE2DConfig:
    widths = (4, 8, 8, 4, 8)[:levels]
    return VAE2DConfig(block_out_channels=widths, layers_per_block=1, norm_num_groups=2)


def time(downsample: tuple[bool, ...] = (False, True, True)) -> VAETemporalConfig:
    return VAETemporalConfig(
        filters=4,
        num_res_blocks=1,
        num_groups=2,
        channel_multipliers=(1, 2, 2, 4)[: len(downsample) + 1],
        temporal_downsample=downsample,
    )


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def same(vae: ImageVAE | VideoVAE, video: Tensor, rows: int | None) -> None:
    frames = video.shape[2]
    with torch.no_grad():
        vae.tiling = None
        z = vae.encode(video)
        want = vae.decode(z, frames)
        vae.tiling = Tiling(rows=rows)
        given = z.clone(), video.clone()
        assert torch.allclose(vae.encode(video), z, atol=1e-4)
        got = vae.decode(z, frames)
        assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert torch.equal(z, given[0])
    assert torch.equal(video, given[1])


@pytest.mark.parametrize("rows", [1, 3, 8, 1000, None])
def test_images_in_bands_are_whole_images(rows: int | None) -> None:
    torch.manual_seed(0)
    same(ImageVAE(ImageVAEConfig(vae_2d=space())).eval(), noise(2, 3, 2, 37, 30), rows)


@pytest.mark.parametrize("levels", [1, 2, 4, 5])
def test_any_number_of_levels(levels: int) -> None:
    torch.manual_seed(0)
    same(ImageVAE(ImageVAEConfig(vae_2d=space(levels))).eval(), noise(1, 3, 1, 50, 33), 5)


@pytest.mark.parametrize("rows", [2, 5, None])
@pytest.mark.parametrize("downsample", [(False, True, True), (True,), ()])
def test_videos_in_bands_are_whole_videos(rows: int | None, downsample: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    config = VideoVAEConfig(vae_2d=space(2), vae_temporal=time(downsample), micro_frame_size=5)
    same(VideoVAE(config).eval(), noise(2, 3, 7, 27, 20), rows)


@pytest.mark.parametrize("trained", [trained_image_vae, trained_video_vae])
def test_trained_autoencoders_agree_to_more_than_40_db(
    trained: Callable[[], ImageVAE | VideoVAE], whole: dict[str, Any]
) -> None:
    vae, video = trained(), world_clips()[:1]
    z, want = whole[trained.__name__]
    assert psnr(want, video) > 24, "this autoencoder has learnt nothing"
    got = in_bands(vae, z)
    assert psnr(got, want) > 100
    vae.tiling = Tiling(rows=BAND)
    try:
        assert psnr(vae.encode(video), z) > 100
    finally:
        vae.tiling = None


@pytest.mark.parametrize("trained", [trained_image_vae, trained_video_vae])
def test_no_seams(trained: Callable[[], ImageVAE | VideoVAE], whole: dict[str, Any]) -> None:
    """Steps between rows are no larger where bands meet than in the whole frame."""
    vae = trained()
    z, want = whole[trained.__name__]
    assert border_steps(in_bands(vae, z), want) == pytest.approx(1.0, abs=1e-4)


def test_tiles_without_neighbours_would_show(whole: dict[str, Any]) -> None:
    """The two tests above see what tiles that are coded for themselves do."""
    vae = trained_image_vae()
    z, want = whole["trained_image_vae"]
    cut = BAND // vae.config.spatial_stride
    tiles = torch.cat([vae.decode(part, 17) for part in z.split(cut, dim=3)], dim=3)
    assert psnr(tiles, want) < 40
    assert border_steps(tiles, want) > 1.1


@pytest.fixture(scope="module")
def whole() -> dict[str, tuple[Tensor, Tensor]]:
    """Latents of one clip and what they decode to at once, by autoencoder."""
    found = {}
    for trained in (trained_image_vae, trained_video_vae):
        vae = trained()
        z = vae.encode(world_clips()[:1])
        found[trained.__name__] = (z, vae.decode(z, 17))
    return found


def in_bands(vae: ImageVAE | VideoVAE, z: Tensor) -> Tensor:
    vae.tiling = Tiling(rows=BAND)
    try:
        return vae.decode(z, 17)
    finally:
        vae.tiling = None


def border_steps(video: Tensor, want: Tensor) -> float:
    """Mean step between the rows at the borders of bands, over that of the whole frame's."""
    borders = torch.arange(BAND, video.shape[3], BAND)
    steps = [x[:, :, :, borders] - x[:, :, :, borders - 1] for x in (video, want)]
    return float(steps[0].abs().mean() / steps[1].abs().mean())


def test_gradients_pass() -> None:
    torch.manual_seed(0)
    vae = VideoVAE(VideoVAEConfig(vae_2d=space(2), vae_temporal=time()))
    video = noise(1, 3, 5, 18, 10)
    grads: list[list[Tensor]] = []
    for tiling in (None, Tiling(rows=4)):
        vae.tiling = tiling
        vae.zero_grad()
        vae(video, noise=torch.Generator().manual_seed(0)).video.square().mean().backward()
        grads.append([p.grad.clone() for p in vae.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) == len(list(vae.parameters()))
    scale = max(float(g.abs().max()) for g in grads[0])
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() < 1e-4 * scale


def test_memory_of_a_residual_is_reused_only_when_nothing_else_reads_it() -> None:
    def network(x: Tensor) -> Any:
        x = F.silu(x)
        F.group_norm(x, 1, torch.ones(2), torch.zeros(2))  # now all rows of x are in memory
        return conv(x) + x  # whose neighbours this needs

    conv = nn.Conv2d(2, 2, 3, padding=1)
    x = noise(1, 2, 9, 4)
    with torch.no_grad():
        assert torch.allclose(in_parts(network, x, size=None, rows=2), network(x), atol=1e-5)


def test_functions_without_bands_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match="cannot be computed in bands"):
        F.relu(BandedMap.of(noise(1, 2, 4, 4), 2))  # type: ignore[arg-type]


class PeakBytes(TorchDispatchMode):
    """Most bytes that tensors made under it held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_peak_memory_of_a_720p_frame(kind: str) -> None:
    """On fake tensors, which is also how generation estimates it. Whole frames take six maps of
    the first level to decode, and more than four to encode."""
    width, size = 8, (720, 1280)
    shape = VAE2DConfig(
        block_out_channels=(width, 2 * width, 2 * width), layers_per_block=1, norm_num_groups=2
    )
    peaks = {}
    with FakeTensorMode():
        vae: ImageVAE | VideoVAE = (
            ImageVAE(ImageVAEConfig(vae_2d=shape))
            if kind == "image"
            else VideoVAE(VideoVAEConfig(vae_2d=shape, vae_temporal=time()))
        )
        video = torch.empty(1, 3, 1, *size)
        z = torch.empty(1, 4, 1, size[0] // 4, size[1] // 4)
        for tiling in (None, Tiling(rows=32)):
            vae.tiling = tiling
            for call in (lambda: vae.encode(video), lambda: vae.decode(z, 1)):
                with torch.no_grad(), PeakBytes() as counter:
                    call()
                peaks.setdefault(tiling is None, []).append(counter.peak)
    one_map = 4 * width * size[0] * size[1]
    encoding, decoding = (peak / one_map for peak in peaks[False])
    assert encoding < 3.4  # the video in two orders of memory, a map, and one beside it
    assert decoding < 4.5  # a doubled map of twice the width, and two of these
    for banded, usual in zip(peaks[False], peaks[True], strict=True):
        assert banded < 0.75 * usual
