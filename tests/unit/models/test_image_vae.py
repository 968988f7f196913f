"""The image autoencoder on videos: names, sizes, noise, precision, FLOPs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kinema.config.errors import ConfigError, KinemaError
from kinema.config.settings import from_dict, to_dict
from kinema.models.build import build_vae
from kinema.models.config import ImageVAEConfig, VAE2DConfig, VideoVAEConfig
from kinema.models.image_vae import ImageVAE
from kinema.models.vae import VideoVAE


def tiny(
    micro_batch_size: int | None = 2, widths: tuple[int, ...] = (4, 8, 8), depth: int = 1
) -> ImageVAEConfig:
    space = VAE2DConfig(block_out_channels=widths, layers_per_block=depth, norm_num_groups=2)
    return ImageVAEConfig(vae_2d=space, micro_batch_size=micro_batch_size)


def build(config: ImageVAEConfig) -> ImageVAE:
    torch.manual_seed(0)
    return ImageVAE(config).eval()


def video(batch: int = 1, frames: int = 5, height: int = 16, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


def test_settings_survive_a_round_trip() -> None:
    assert from_dict(ImageVAEConfig, to_dict(tiny(None))) == tiny(None)
    with pytest.raises(ConfigError, match="scaling_factor"):
        from_dict(ImageVAEConfig, {"scaling_factor": 0.0})


def test_names_are_those_of_the_2d_part_of_the_video_autoencoder() -> None:
    """Which parity proves to be diffusers' names, below `spatial_vae.module.`."""
    with torch.device("meta"):
        image, both = build_vae(ImageVAEConfig()), VideoVAE(VideoVAEConfig())
    want = {k: v.shape for k, v in both.spatial_vae.module.state_dict().items()}
    assert {k: v.shape for k, v in image.state_dict().items()} == want
    assert len(want) == 248
    assert sum(p.numel() for p in image.parameters()) == 83_653_863


def test_it_is_the_2d_part_of_the_video_autoencoder() -> None:
    config = tiny()
    image, both = build(config), VideoVAE(VideoVAEConfig(vae_2d=config.vae_2d))
    both.spatial_vae.module.load_state_dict(image.state_dict())
    clip = video(batch=2)
    with torch.no_grad():
        z = image.encode(clip)
        assert torch.equal(z, both.spatial_vae.encode(clip))
        assert torch.equal(image.decode(z, 5), both.spatial_vae.decode(z))


@pytest.mark.parametrize("size", [(1, 16, 16), (3, 18, 13), (2, 4, 31)])
def test_latent_size_is_what_encode_gives_and_decode_takes(size: tuple[int, int, int]) -> None:
    config = tiny()
    vae = build(config)
    frames, height, width = size
    with torch.no_grad():
        z = vae.encode(video(1, *size))
        assert (
            z.shape == (1, 4, *config.latent_size(*size)) == (1, 4, frames, height // 4, width // 4)
        )
        assert vae.decode(z, frames).shape == (1, 3, frames, height // 4 * 4, width // 4 * 4)


@pytest.mark.parametrize("size", [(3, 16), (16, 3)])
def test_frames_smaller_than_a_latent_position(size: tuple[int, int]) -> None:
    height, width = size
    with pytest.raises(KinemaError, match=f"{width}x{height} are smaller than one latent pos.*4x4"):
        build(tiny()).encode(video(height=height, width=width))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, None])
def test_a_video_is_its_frames_one_by_one(micro_batch_size: int | None) -> None:
    vae, clip = build(tiny(micro_batch_size)), video(batch=2)
    with torch.no_grad():
        z = vae.encode(clip)
        decoded = vae.decode(z, 5)
        for t in range(5):
            alone = vae.encode(clip[:, :, t : t + 1])
            assert torch.allclose(alone, z[:, :, t : t + 1], atol=1e-6)
            assert torch.allclose(vae.decode(alone, 1), decoded[:, :, t : t + 1], atol=1e-5)


def test_scaling_and_noise() -> None:
    vae, clip = build(tiny()), video()
    with torch.no_grad():
        mean = vae.encode(clip)
        before = torch.get_rng_state()
        drawn = vae.encode(clip, noise=torch.Generator().manual_seed(5))
        assert torch.equal(before, torch.get_rng_state())
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
        assert torch.equal(drawn, vae.encode(clip, noise=noise))
        assert not torch.allclose(mean, drawn)
        assert torch.equal(mean, vae.encode(clip, noise=torch.zeros_like(noise)))
        moments = vae.encode_video(clip, None)
    assert torch.allclose(mean, moments[:, :4] * 0.18215, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_weights_give_float32_latents(dtype: torch.dtype) -> None:
    vae, clip = build(tiny()), video()
    with torch.no_grad():
        want = vae.encode(clip)
        vae.to(dtype)
        z = vae.encode(clip)
        assert z.dtype == torch.float32
        assert (z - want).abs().max() < 0.02 * want.abs().max()
        assert vae.decode(z.to(dtype), 5).dtype == dtype


def test_gradients_reach_every_weight() -> None:
    vae = build(tiny())
    z = vae.encode(video(), noise=torch.Generator().manual_seed(0))
    vae.decode(z, 5).square().mean().backward()
    assert [n for n, p in vae.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("size", [(1, 16, 16), (3, 18, 13)])
@pytest.mark.parametrize(("widths", "depth"), [((4, 8, 8), 1), ((8,), 2), ((4, 4, 8, 8), 2)])
def test_flops_formula_counts_what_runs(
    size: tuple[int, int, int], widths: tuple[int, ...], depth: int
) -> None:
    config = tiny(widths=widths, depth=depth)
    with torch.device("meta"):
        vae = ImageVAE(config)
        clip = torch.empty(1, 3, *size)
    with torch.no_grad():
        with FlopCounterMode(display=False) as encoding:
            z = vae.encode(clip)
        with FlopCounterMode(display=False) as decoding:
            vae.decode(z, size[0])
    assert config.encode_flops(*size) == pytest.approx(encoding.get_total_flops(), rel=0.02)
    assert config.decode_flops(*size) == pytest.approx(decoding.get_total_flops(), rel=0.02)
