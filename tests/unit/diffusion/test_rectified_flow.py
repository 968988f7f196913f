from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kinema.diffusion.config import RectifiedFlowConfig
from kinema.diffusion.rectified_flow import RectifiedFlow, guided, shift

B, C, T, H, W = 3, 4, 5, 2, 3


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clip_and_noise() -> tuple[Tensor, Tensor]:
    return normal(1, B, C, T, H, W), normal(2, B, C, T, H, W)


def sizes(latent_frames: int = 15, height: int = 240, width: int = 426) -> dict[str, Tensor]:
    return {
        "latent_frames": torch.full((B,), latent_frames),
        "height": torch.full((B,), height),
        "width": torch.full((B,), width),
    }


FLOWS = [
    RectifiedFlowConfig(),
    RectifiedFlowConfig(use_discrete_timesteps=True),
    RectifiedFlowConfig(use_timestep_transform=True),
    RectifiedFlowConfig(num_timesteps=1, use_timestep_transform=True, transform_scale=0.5),
]


# The convention: range, direction, sign


def test_ends_of_the_path() -> None:
    x0, noise = clip_and_noise()
    flow = RectifiedFlow(RectifiedFlowConfig())
    assert torch.equal(flow.add_noise(x0, noise, torch.zeros(B)), x0)
    assert torch.equal(flow.add_noise(x0, noise, torch.full((B,), 1000.0)), noise)
    assert torch.allclose(
        flow.add_noise(x0, noise, torch.full((B,), 250.0)), 0.75 * x0 + 0.25 * noise
    )


@pytest.mark.parametrize("config", FLOWS)
@pytest.mark.parametrize("steps", [1, 7, 30])
def test_the_exact_velocity_recovers_the_clip(config: RectifiedFlowConfig, steps: int) -> None:
    x0, noise = clip_and_noise()
    flow = RectifiedFlow(config)
    target = flow.target(x0, noise)
    timesteps = flow.sampling_timesteps(steps, **sizes())
    assert timesteps.shape == (steps, B)
    assert torch.equal(timesteps[0], torch.full((B,), float(config.num_timesteps)))
    seen: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        assert x_mask is None
        assert torch.allclose(x, flow.add_noise(x0, noise, t), atol=1e-5)  # on the path
        seen.append(t)
        return torch.cat([target, torch.full_like(target, torch.nan)], dim=1)  # extra channels

    got = flow.sample(velocity, noise, timesteps)
    assert torch.allclose(got, x0, atol=1e-5)
    assert torch.equal(torch.stack(seen), timesteps)
    assert (torch.stack(seen)[1:] < torch.stack(seen)[:-1]).all()  # from noise to clip


def test_everything_is_float32_whatever_comes_in() -> None:
    x0, noise = (v.bfloat16() for v in clip_and_noise())
    t = torch.full((B,), 333.0)
    flow = RectifiedFlow(RectifiedFlowConfig())
    assert flow.add_noise(x0, noise, t).dtype == torch.float32
    assert flow.target(x0, noise).dtype == torch.float32
    assert flow.loss(x0, x0, noise).dtype == torch.float32
    sampled = flow.sample(lambda x, t, m: x.bfloat16(), noise, torch.full((1, B), 1000.0))
    assert sampled.dtype == torch.float32
    assert guided(x0, noise, 7.0).dtype == torch.float32


# Timesteps


def test_uniform_timesteps_are_the_draws() -> None:
    flow = RectifiedFlow(RectifiedFlowConfig())
    draws = torch.tensor([0.0, 0.25, 0.999])
    got = flow.training_timesteps(draws, latent_frames=1, height=256, width=256)
    assert torch.allclose(got, draws * 1000)


def test_discrete_timesteps_are_whole_and_below_the_last() -> None:
    flow = RectifiedFlow(RectifiedFlowConfig(use_discrete_timesteps=True))
    draws = flow.draw(5000, torch.Generator().manual_seed(0))
    got = flow.training_timesteps(draws, latent_frames=1, height=256, width=256)
    assert torch.equal(got, got.round())
    assert got.min() >= 0
    assert got.max() <= 999


def test_logit_normal_has_its_quantiles() -> None:
    config = RectifiedFlowConfig(sample_method="logit-normal", loc=0.5, scale=1.5)
    flow = RectifiedFlow(config)
    draws = flow.draw(20_000, torch.Generator().manual_seed(0))
    got = flow.training_timesteps(draws, latent_frames=1, height=256, width=256)
    for share, deviations in ((0.1587, -1.0), (0.5, 0.0), (0.8413, 1.0)):
        want = 1000 / (1 + math.exp(-(0.5 + 1.5 * deviations)))
        assert abs(float(got.quantile(share)) - want) < 15


def test_draws_come_from_the_generator_alone() -> None:
    flow = RectifiedFlow(RectifiedFlowConfig())
    torch.manual_seed(1)
    first = flow.draw(8, torch.Generator().manual_seed(7))
    torch.manual_seed(2)
    assert torch.equal(first, flow.draw(8, torch.Generator().manual_seed(7)))


# The shift


def test_shift_by_hand() -> None:
    got = shift(torch.tensor([200.0]), latent_frames=15, height=144, width=256)
    ratio = math.sqrt(144 * 256) / 512 * math.sqrt(15)
    assert float(got) == pytest.approx(1000 * ratio * 0.2 / (1 + (ratio - 1) * 0.2), rel=1e-6)


def test_shift_grows_with_size_and_keeps_the_ends() -> None:
    t = torch.linspace(0, 1000, 101)
    image, clip, large = (
        shift(t, latent_frames=n, height=h, width=w)
        for n, h, w in ((1, 144, 256), (15, 144, 256), (30, 720, 1280))
    )
    assert (image[1:-1] < clip[1:-1]).all()
    assert (clip[1:-1] < large[1:-1]).all()
    for shifted in (image, clip, large):
        assert shifted[0] == 0
        assert shifted[-1] == 1000


def test_shift_never_leaves_the_range() -> None:
    # A hair above 1000 would tell sampling that no frame is to be generated in the first step.
    for height in range(100, 2000, 7):
        got = shift(torch.tensor([1000.0]), latent_frames=5, height=height, width=height + 1)
        assert float(got) <= 1000.0
        assert float(got) > 999.9


def test_shift_of_no_latent_frames_is_finite() -> None:
    got = shift(torch.tensor([0.0, 500.0, 1000.0]), latent_frames=0, height=256, width=256)
    assert torch.isfinite(got).all()
    assert (got.diff() > 0).all()


def test_training_and_sampling_shift_alike() -> None:
    flow = RectifiedFlow(RectifiedFlowConfig(use_timestep_transform=True, transform_scale=0.8))
    levels = torch.tensor([1.0, 0.75, 0.5, 0.25])
    sampling = flow.sampling_timesteps(4, **sizes())[:, 0]
    training = flow.training_timesteps(levels, latent_frames=15, height=240, width=426)
    assert torch.allclose(sampling, training)


# Masks and loss


def test_masked_frames_stay_clean_and_out_of_the_loss() -> None:
    x0, noise = clip_and_noise()
    flow = RectifiedFlow(RectifiedFlowConfig())
    mask = torch.tensor([[True] * 5, [False, True, True, False, True], [False] * 5])
    x_t = flow.add_noise(x0, noise, torch.full((B,), 400.0), mask)
    per_frame = (x_t == x0).all(dim=4).all(dim=3).all(dim=1)
    assert torch.equal(per_frame, ~mask)

    prediction = flow.target(x0, noise)
    prediction = prediction + torch.where(mask[:, None, :, None, None], 2.0, torch.inf)
    loss = flow.loss(prediction, x0, noise, mask=mask)
    assert torch.allclose(loss, torch.tensor([4.0, 4.0, 0.0]))


def test_loss_is_a_mean_per_sample_and_takes_weights() -> None:
    x0, noise = clip_and_noise()
    flow = RectifiedFlow(RectifiedFlowConfig())
    offset = torch.tensor([0.0, 1.0, 3.0]).view(-1, 1, 1, 1, 1)
    prediction = flow.target(x0, noise) + offset
    assert torch.allclose(flow.loss(prediction, x0, noise), torch.tensor([0.0, 1.0, 9.0]))
    weighted = flow.loss(prediction, x0, noise, weight=torch.tensor([5.0, 2.0, 0.0]))
    assert torch.allclose(weighted, torch.tensor([0.0, 2.0, 0.0]))


def test_gradients_of_clean_frames_are_zero() -> None:
    x0, noise = clip_and_noise()
    mask = torch.tensor([[True, True, False, True, True]] * B)
    prediction = normal(3, B, C, T, H, W).requires_grad_()
    RectifiedFlow(RectifiedFlowConfig()).loss(prediction, x0, noise, mask=mask).sum().backward()
    assert prediction.grad is not None
    assert (prediction.grad[:, :, 2] == 0).all()
    assert (prediction.grad[:, :, 0] != 0).all()


# Sampling with a mask


def test_kept_frames_come_back_untouched_and_the_network_is_told() -> None:
    x0, noise = clip_and_noise()
    flow = RectifiedFlow(RectifiedFlowConfig())
    mask = torch.tensor([[0.0, 1, 1, 1, 0]] * B)
    z = torch.where(mask[:, None, :, None, None] == 1, noise, x0)

    def velocity(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        assert x_mask is not None
        assert torch.equal(x_mask, mask == 1)
        return x0 - noise

    got = flow.sample(velocity, z, flow.sampling_timesteps(5, **sizes()), mask=mask)
    assert torch.equal(got[:, :, [0, 4]], x0[:, :, [0, 4]])
    assert torch.allclose(got, x0, atol=1e-5)


def test_a_value_between_keeps_a_frame_until_its_level() -> None:
    x0, noise = clip_and_noise()
    flow = RectifiedFlow(RectifiedFlowConfig())
    mask = torch.full((B, T), 1.0)
    mask[:, 2] = 0.5
    asked: list[int] = []
    told: list[bool] = []

    def noise_of(step: int) -> Tensor:
        asked.append(step)
        return noise

    def velocity(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        assert x_mask is not None
        told.append(bool(x_mask[0, 2]))
        if not told[-1]:
            assert torch.equal(x[:, :, 2], x0[:, :, 2])
        return x0 - noise

    z = noise.clone()
    z[:, :, 2] = x0[:, :, 2]
    got = flow.sample(velocity, z, flow.sampling_timesteps(4, **sizes()), mask=mask, noise=noise_of)
    assert told == [False, False, True, True]  # t = 1000, 750, 500, 250
    assert asked == [2]
    assert torch.allclose(got, x0, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    flow = RectifiedFlow(RectifiedFlowConfig(use_timestep_transform=True))
    z = normal(5, B, C, T, H, W)
    mask = torch.tensor([[1.0, 1, 1, 1, 1], [0, 0.4, 1, 1, 1], [0.9, 0.1, 0.5, 1, 0]])

    def noise_of(rows: list[int]) -> Tensor:
        return torch.stack([normal(100 + row, C, T, H, W) for row in rows])

    def velocity(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        assert x_mask is not None
        return torch.sin(x) + t[:, None, None, None, None] / 1000 + x_mask[:, None, :, None, None]

    together = flow.sample(
        velocity,
        z,
        flow.sampling_timesteps(6, **sizes()),
        mask=mask,
        noise=lambda step: noise_of([0, 1, 2]) + step,
    )
    for row in range(B):
        one = {k: v[row : row + 1] for k, v in sizes().items()}
        alone = flow.sample(
            velocity,
            z[row : row + 1],
            flow.sampling_timesteps(6, **one),
            mask=mask[row : row + 1],
            noise=lambda step, row=row: noise_of([row]) + step,
        )
        assert torch.equal(alone[0], together[row])


def test_steps_are_reported() -> None:
    flow = RectifiedFlow(RectifiedFlowConfig())
    steps: list[int] = []
    flow.sample(
        lambda x, t, m: x,
        normal(1, B, C, T, H, W),
        flow.sampling_timesteps(3, **sizes()),
        on_step=steps.append,
    )
    assert steps == [1, 2, 3]


def test_guidance() -> None:
    cond, uncond = torch.tensor([3.0]), torch.tensor([1.0])
    assert float(guided(cond, uncond, 1.0)) == 3.0
    assert float(guided(cond, uncond, 0.0)) == 1.0
    assert float(guided(cond, uncond, 7.0)) == 15.0
