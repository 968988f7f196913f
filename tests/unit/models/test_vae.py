"""The video autoencoder: sizes, chunks, noise, training forward, FLOPs, memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kinema.config.errors import ConfigError, KinemaError
from kinema.config.settings import from_dict, to_dict
from kinema.models.config import VAE2DConfig, VAETemporalConfig, VideoVAEConfig
from kinema.models.vae import VideoVAE
from kinema.models.vae_posterior import DiagonalGaussian


def tiny(
    micro_frame_size: int | None = 5,
    micro_batch_size: int | None = 2,
    widths: tuple[int, ...] = (4, 8, 8),
    downsample: tuple[bool, ...] = (False, True, True),
) -> VideoVAEConfig:
    return VideoVAEConfig(
        vae_2d=VAE2DConfig(block_out_channels=widths, layers_per_block=1, norm_num_groups=2),
        vae_temporal=VAETemporalConfig(
            filters=4,
            num_res_blocks=1,
            num_groups=2,
            channel_multipliers=(1, 2, 2, 4)[: len(downsample) + 1],
            temporal_downsample=downsample,
        ),
        micro_frame_size=micro_frame_size,
        micro_batch_size=micro_batch_size,
    )


def build(config: VideoVAEConfig) -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(config).eval()


def video(batch: int = 1, frames: int = 7, height: int = 16, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


def test_settings_survive_a_round_trip() -> None:
    config = tiny(micro_frame_size=None)
    assert from_dict(VideoVAEConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae_2d": {"block_out_channels": [4, 6], "norm_num_groups": 4}}, "multiple of norm_num"),
        ({"vae_2d": {"block_out_channels": []}}, "at least 1 item"),
        ({"vae_temporal": {"temporal_downsample": [True]}}, "one fewer"),
        ({"vae_temporal": {"filters": 6}}, "multiple of num_groups"),
        ({"shift": [0.0, 0.0]}, "4 channels"),
        ({"scale": [1.0, 1.0, 0.0, 1.0]}, "above 0"),
        ({"micro_frame_sizes": 17}, "micro_frame_size"),
    ],
)
def test_wrong_settings_say_what_is_wrong(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(VideoVAEConfig, changes)


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 6, 9, 10, 11])
@pytest.mark.parametrize("micro_frame_size", [None, 5])
def test_latent_size_is_what_encode_gives_and_decode_takes(
    frames: int, micro_frame_size: int | None
) -> None:
    config = tiny(micro_frame_size)
    vae = build(config)
    with torch.no_grad():
        z = vae.encode(video(frames=frames, height=18, width=13))
        assert z.shape == (1, 4, *config.latent_size(frames, 18, 13))
        assert vae.decode(z, frames).shape == (1, 3, frames, 16, 12)


def test_released_sizes() -> None:
    config = VideoVAEConfig()
    assert (config.spatial_stride, config.time_stride, config.latent_channels) == (8, 4, 4)
    assert config.latent_size(51, 480, 854) == (15, 60, 106)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(1, (1, 1)), (0, (1, 1)), (3, (1, 4)), (16, (16, 16)), (17, (17, 17)), (18, (17, 34)),
     (50, (34, 51)), (51, (51, 51)), (100, (85, 102))],
)  # fmt: skip
def test_nearest_frames(asked: int, expected: tuple[int, int]) -> None:
    assert VideoVAEConfig().nearest_frames(asked) == expected


def test_nearest_frames_without_chunks() -> None:
    config = VideoVAEConfig(micro_frame_size=None)
    assert config.nearest_frames(51) == (49, 52)
    assert config.nearest_frames(21) == (21, 21)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_any_number_of_levels(levels: int) -> None:
    config = tiny(widths=(4,) * levels)
    assert config.spatial_stride == 2 ** (levels - 1)
    vae = build(config)
    with torch.no_grad():
        z = vae.encode(video(frames=2, height=32, width=16))
        assert vae.decode(z, 2).shape == (1, 3, 2, 32, 16)


def test_no_time_compression() -> None:
    config = tiny(micro_frame_size=4, downsample=())
    assert config.latent_size(6, 16, 12) == (6, 4, 3)
    with torch.no_grad():
        assert build(config).encode(video(frames=6)).shape[2] == 6


def test_micro_batches_change_memory_not_the_result() -> None:
    whole, parts = build(tiny(micro_batch_size=None)), build(tiny(micro_batch_size=2))
    clip = video(batch=2)
    with torch.no_grad():
        z = whole.encode(clip, noise=torch.Generator().manual_seed(3))
        assert torch.allclose(
            z, parts.encode(clip, noise=torch.Generator().manual_seed(3)), atol=1e-6
        )
        assert torch.allclose(whole.decode(z, 7), parts.decode(z, 7), atol=1e-6)


def test_chunks_know_nothing_of_each_other() -> None:
    vae = build(tiny(micro_frame_size=5))
    clip = video(frames=10)
    other = clip.clone()
    other[:, :, 5:] = 0
    with torch.no_grad():
        z, z_other = vae.encode(clip), vae.encode(other)
    assert torch.equal(z[:, :, :2], z_other[:, :, :2])
    assert not torch.allclose(z[:, :, 2:], z_other[:, :, 2:])


def test_time_is_causal_within_a_chunk() -> None:
    # 2D latents, because norms see the whole chunk: convolutions alone are tested.
    from kinema.models.vae_temporal import CausalConv3d

    conv = CausalConv3d(2, 2, 3)
    x = torch.randn(1, 2, 6, 4, 4)
    later = x.clone()
    later[:, :, 4:] += 1
    assert torch.equal(conv(x)[:, :, :4], conv(later)[:, :, :4])


def test_encode_draws_nothing_by_itself() -> None:
    vae, clip = build(tiny()), video()
    with torch.no_grad():
        before = torch.get_rng_state()
        mean = vae.encode(clip)
        assert torch.equal(mean, vae.encode(clip))
        first = vae.encode(clip, noise=torch.Generator().manual_seed(5))
        assert torch.equal(first, vae.encode(clip, noise=torch.Generator().manual_seed(5)))
        assert torch.equal(before, torch.get_rng_state())
    assert not torch.allclose(mean, first)


def test_bfloat16_weights_give_float32_latents() -> None:
    vae = build(tiny()).bfloat16()
    assert vae.shift.flatten().tolist() == build(tiny()).shift.flatten().tolist()
    with torch.no_grad():
        z = vae.encode(video())
        assert z.dtype == torch.float32
        assert vae.decode(z, 7).dtype == torch.bfloat16


def test_frames_smaller_than_a_latent_position() -> None:
    with pytest.raises(KinemaError, match="2x3 are smaller than one latent position, 4x4"):
        build(tiny()).encode(video(height=3, width=2))


def test_training_forward() -> None:
    vae = build(tiny()).train()
    clip = video(batch=2)
    out = vae(clip, noise=torch.Generator().manual_seed(0))
    assert out.video.shape == clip.shape
    assert out.posterior.mean.shape == out.z.shape == (2, 4, 3, 4, 3)
    assert out.spatial_posterior.mean.shape == out.spatial_latents_rec.shape == (2, 4, 7, 4, 3)
    # the same pass as encode and decode, but for shift and scale
    z = vae.encode(clip, noise=torch.Generator().manual_seed(0))
    assert torch.allclose(out.z, z * vae.scale + vae.shift, atol=1e-5)
    assert torch.allclose(out.video, vae.decode(z, 7), atol=1e-5)
    loss = (out.video - clip).abs().mean()
    loss = loss + 1e-6 * (out.posterior.kl() + out.spatial_posterior.kl()).mean()
    loss.backward()
    assert [n for n, p in vae.named_parameters() if p.grad is None] == []


def test_frozen_2d_part_passes_gradients_on() -> None:
    vae = build(tiny()).train()
    vae.spatial_vae.requires_grad_(False)
    out = vae(video(), noise=torch.Generator().manual_seed(0))
    out.video.abs().mean().backward()
    assert not out.spatial_latents.requires_grad
    assert all(p.grad is None for p in vae.spatial_vae.parameters())
    assert all(p.grad is not None for p in vae.temporal_vae.parameters())


def test_kl_against_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(3, 4, 2, 5, 5, generator=generator)
    posterior = DiagonalGaussian.from_moments(moments)
    normal = torch.distributions.Normal(posterior.mean, (0.5 * posterior.logvar).exp())
    standard = torch.distributions.Normal(0.0, 1.0)
    want = torch.distributions.kl_divergence(normal, standard).flatten(1).sum(1)
    assert torch.allclose(posterior.kl(), want, rtol=1e-5)


def test_log_variance_is_clamped() -> None:
    posterior = DiagonalGaussian.from_moments(torch.tensor([[0.0, 0.0, 99.0, -99.0]]))
    assert posterior.logvar.tolist() == [[20.0, -30.0]]


def test_fitted_normalisation() -> None:
    vae = build(tiny())
    clips = [video(batch=2, frames=5), video(frames=9, height=24, width=24) * 0.5]
    with torch.no_grad():
        latents = [vae.encode(c) for c in clips]
        decoded = vae.decode(latents[0], 5)
        vae.fit_normalisation(latents)
        fitted = [vae.encode(c) for c in clips]
        again = vae.decode(fitted[0], 5)
    values = torch.cat([z.transpose(0, 1).flatten(1) for z in fitted], dim=1)
    assert torch.allclose(values.mean(1), torch.zeros(4), atol=1e-4)
    assert torch.allclose(values.std(1, correction=0), torch.ones(4), atol=1e-4)
    assert torch.allclose(decoded, again, atol=1e-5)


def test_normalisation_of_a_dead_channel_is_refused() -> None:
    vae = build(tiny())
    z = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    z[:, 2] = 1.0
    with pytest.raises(KinemaError, match="channel 2"):
        vae.fit_normalisation([z])
    with pytest.raises(KinemaError, match="no latents"):
        vae.fit_normalisation([])


@pytest.mark.parametrize("micro_frame_size", [None, 5])
@pytest.mark.parametrize("size", [(1, 16, 16), (7, 18, 13), (11, 16, 12)])
@pytest.mark.parametrize(
    "shape",
    [((4, 8, 8), (False, True, True)), ((8,), (True,)), ((4, 4, 8, 8), (True, False))],
)
def test_flops_formula_counts_what_runs(
    micro_frame_size: int | None,
    size: tuple[int, int, int],
    shape: tuple[tuple[int, ...], tuple[bool, ...]],
) -> None:
    config = tiny(micro_frame_size, widths=shape[0], downsample=shape[1])
    with torch.device("meta"):
        vae = VideoVAE(config)
    clip = torch.empty(1, 3, *size, device="meta")
    with torch.no_grad():
        with FlopCounterMode(display=False) as encoding:
            z = vae.encode(clip)
        with FlopCounterMode(display=False) as decoding:
            vae.decode(z, size[0])
    assert config.encode_flops(*size) == pytest.approx(encoding.get_total_flops(), rel=0.02)
    assert config.decode_flops(*size) == pytest.approx(decoding.get_total_flops(), rel=0.02)


def test_flops_of_the_released_size() -> None:
    config = VideoVAEConfig()
    with torch.device("meta"):
        vae = VideoVAE(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encode(torch.empty(1, 3, 20, 64, 96, device="meta"))
    assert config.encode_flops(20, 64, 96) == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert math.isclose(config.encode_flops(40, 64, 64), config.encode_flops(17, 64, 64) * 2
                        + config.encode_flops(6, 64, 64))  # fmt: skip
