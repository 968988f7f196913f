from __future__ import annotations

import pytest
import torch

from kinema.config.errors import KinemaError
from kinema.data.world import sample_scenes
from kinema.data.world_render import render
from kinema.models.config import VAE2DConfig, VAETemporalConfig, VideoVAEConfig
from kinema.models.vae import VideoVAE
from kinema.models.vae_init import LOGVAR, start_as_block_means


def config(*, groups: int = 1, filters: int = 16) -> VideoVAEConfig:
    return VideoVAEConfig(
        vae_2d=VAE2DConfig(
            block_out_channels=(8, 16, 32), layers_per_block=1, norm_num_groups=groups
        ),
        vae_temporal=VAETemporalConfig(
            filters=filters,
            channel_multipliers=(1, 1, 1),
            temporal_downsample=(True, True),
            num_res_blocks=1,
            num_groups=groups,
        ),
        micro_batch_size=None,
        spatial_scaling=1.0,
        shift=(0.0,) * 4,
        scale=(1.0,) * 4,
    )


def clips() -> torch.Tensor:
    frames = torch.stack([torch.from_numpy(render(s)[:17]) for s in sample_scenes(seed=5, count=6)])
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def test_untrained_it_already_paints_the_colours() -> None:
    torch.manual_seed(0)
    vae = VideoVAE(config())
    video = clips()
    with torch.no_grad():
        usual = (vae(video).video - video).abs().mean()
        start_as_block_means(vae)
        output = vae(video)
    assert usual > 0.4
    assert (output.video - video).abs().mean() < 0.12
    assert output.posterior.logvar.mean() == pytest.approx(LOGVAR, abs=0.1)


def test_latents_follow_the_colours_of_their_blocks() -> None:
    torch.manual_seed(0)
    vae = VideoVAE(config())
    start_as_block_means(vae)
    video = clips()
    blocks = video[:, :, ::4].unflatten(3, (16, 4)).unflatten(5, (16, 4)).mean(dim=(4, 6))
    with torch.no_grad():
        z = vae.encode(video)
    for colour in range(3):
        pair = torch.stack([blocks[:, colour].flatten(), z[:, colour].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.95


def test_every_weight_learns() -> None:
    """Branches that end in zeros wake up with the first step, and nothing else is asleep."""
    torch.manual_seed(0)
    vae = VideoVAE(config())
    start_as_block_means(vae)
    optimizer = torch.optim.SGD(vae.parameters(), lr=1e-3)
    video = clips()[:1, :, :5]
    for _ in range(2):
        optimizer.zero_grad()
        output = vae(video, noise=torch.Generator().manual_seed(0))
        ((output.video - video).abs().mean() + 1e-3 * output.posterior.kl().mean()).backward()
        optimizer.step()
    asleep = [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.any()]
    assert not asleep


def test_configurations_that_cannot_start_so_are_refused() -> None:
    with pytest.raises(KinemaError, match="4 channels in a group"):
        start_as_block_means(VideoVAE(config(groups=2)))
    with pytest.raises(KinemaError, match="4 channels in a group"):
        start_as_block_means(VideoVAE(config(filters=4)))
