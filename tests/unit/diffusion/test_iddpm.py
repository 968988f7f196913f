"""IDDPM: what it promises of its formulas, masks and noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kinema.config.errors import ConfigError, KinemaError
from kinema.config.settings import from_dict
from kinema.diffusion.config import IDDPMConfig, RectifiedFlowConfig, process_mismatch
from kinema.diffusion.dpm_solver import ContinuousSchedule
from kinema.diffusion.iddpm import IDDPM
from kinema.diffusion.noise_schedule import NoiseSchedule, respaced
from kinema.diffusion.process import build_process

SHAPE = (2, 4, 3, 4, 4)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed))


def row_noise(rows: list[int], steps: int) -> Callable[[int], Tensor]:
    """Noise keyed by (sample, number), as generation draws it."""

    def noise(number: int) -> Tensor:
        assert 0 <= number < 2 * steps
        return torch.stack([randn(1000 * row + number, *SHAPE[1:]) for row in rows])

    return noise


def times(process: IDDPM, steps: int, count: int = SHAPE[0]) -> Tensor:
    rows = torch.ones(count)
    return process.sampling_timesteps(steps, latent_frames=rows, height=rows, width=rows)


def gaussian_network(process: IDDPM, mean: float, deviation: float) -> Callable[..., Tensor]:
    """The exact noise prediction where all clips are normal: what training would end in."""
    schedule = ContinuousSchedule(process.config.num_timesteps)

    def network(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        a = schedule.alpha(schedule.time(t)).square().float().view(-1, 1, 1, 1, 1)
        spread = a * deviation**2 + (1 - a)
        epsilon = (1 - a).sqrt() / spread * (x - a.sqrt() * mean)
        return torch.cat([epsilon, torch.zeros_like(x)], dim=1)

    return network


# Timesteps


def test_training_timesteps_are_whole_and_all_are_drawn() -> None:
    process = IDDPM(IDDPMConfig(num_timesteps=50, num_sampling_steps=50))
    raw = process.draw(4000, torch.Generator().manual_seed(0))
    t = process.training_timesteps(raw, latent_frames=1, height=1, width=1)
    assert t.dtype == torch.float32
    assert set(t.tolist()) == set(map(float, range(50)))
    edge = torch.tensor([0.0, 1.0 - 2**-24])
    found = process.training_timesteps(edge, latent_frames=1, height=1, width=1)
    assert found.tolist() == [0.0, 49.0]


def test_sampling_goes_from_the_last_timestep_to_zero() -> None:
    t = times(IDDPM(IDDPMConfig()), 4)
    assert t[:, 0].tolist() == [999.0, 666.0, 333.0, 0.0]
    assert torch.equal(t[:, 0], t[:, 1])
    assert times(IDDPM(IDDPMConfig()), 1000)[:, 0].tolist() == [
        float(i) for i in range(999, -1, -1)
    ]


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [("3", [0, 4, 9]), ("1", [0]), ("2,1", [0, 4, 5]), ("ddim5", [0, 2, 4, 6, 8])],
)
def test_respacing(spacing: str, expected: list[int]) -> None:
    # round(4.5) is 4: Python rounds ties to even, as the original does.
    assert respaced(10, spacing) == expected


@pytest.mark.parametrize("spacing", ["11", "0", "6,1", "ddim7"])
def test_spacings_that_do_not_exist_are_refused(spacing: str) -> None:
    with pytest.raises(KinemaError, match=spacing):
        respaced(10, spacing)


def test_a_respaced_schedule_has_the_noise_of_its_timesteps() -> None:
    whole = NoiseSchedule.linear(1000, range(1000))
    some = NoiseSchedule.linear(1000, respaced(1000, "40"))
    torch.testing.assert_close(some.alphas_cumprod, whole.alphas_cumprod[some.timesteps])


# Training


@pytest.mark.parametrize("t", [0, 10, 999])
def test_added_noise_keeps_the_variance(t: int) -> None:
    process = IDDPM(IDDPMConfig())
    big = (2, 4, 8, 32, 32)
    x_t = process.add_noise(randn(1, *big), randn(2, *big), torch.full((2,), float(t)))
    assert float(x_t.var()) == pytest.approx(1.0, abs=0.02)
    assert x_t.dtype == torch.float32


def test_masked_frames_are_noised_to_timestep_zero() -> None:
    process, x0, noise = IDDPM(IDDPMConfig()), randn(1), randn(2)
    t = torch.tensor([500.0, 20.0])
    mask = torch.tensor([[True, False, True], [False, True, True]])
    x_t = process.add_noise(x0, noise, t, mask)
    least = process.add_noise(x0, noise, torch.zeros(2))
    full = process.add_noise(x0, noise, t)
    keep = ~mask[:, None, :, None, None].expand(SHAPE)
    assert torch.equal(x_t[keep], least[keep])
    assert torch.equal(x_t[~keep], full[~keep])
    assert 0 < float((least - x0).abs().max()) < 0.1


def test_the_right_prediction_costs_nothing_but_its_variance() -> None:
    process, x0, noise = IDDPM(IDDPMConfig()), randn(1), randn(2)
    t = torch.tensor([1.0, 4.0])
    # -1: the posterior's own variance, so that the step is the true one.
    right = torch.cat([noise, torch.full(SHAPE, -1.0)], dim=1)
    found = process.loss_terms(right, x0, noise, t)
    assert found["mse"].tolist() == [0.0, 0.0]
    assert found["vb"].abs().max() < 1e-6
    wide = torch.cat([noise, torch.full(SHAPE, 1.0)], dim=1)
    assert process.loss_terms(wide, x0, noise, t)["vb"].min() > 1e-6
    assert torch.equal(
        process.loss(wide, x0, noise, t), process.loss_terms(wide, x0, noise, t)["vb"]
    )


def test_only_the_variance_learns_from_the_bound() -> None:
    process, x0, noise = IDDPM(IDDPMConfig()), randn(1), randn(2)
    for t in (0.0, 500.0):
        prediction = randn(3, 2, 8, 3, 4, 4).requires_grad_()
        process.loss_terms(prediction, x0, noise, torch.full((2,), t))["vb"].sum().backward()
        assert prediction.grad is not None
        assert not prediction.grad[:, :4].any()
        assert prediction.grad[:, 4:].abs().mean(dim=(1, 2, 3, 4)).min() > 0


def test_clean_frames_leave_the_loss_even_where_it_is_infinite() -> None:
    process, x0, noise = IDDPM(IDDPMConfig()), randn(1), randn(2)
    t = torch.tensor([0.0, 700.0])
    mask = torch.tensor([[True, False, True], [True, True, True]])
    prediction = randn(3, 2, 8, 3, 4, 4)
    want = process.loss(prediction[:, :, [0, 2]], x0[:, :, [0, 2]], noise[:, :, [0, 2]], t)[0]
    prediction[0, :, 1] = float("inf")
    found = process.loss(prediction, x0, noise, t, mask=mask)
    assert found.isfinite().all()
    assert float(found[0]) == pytest.approx(float(want), rel=1e-6)
    assert process.loss(prediction, x0, noise, t, mask=torch.zeros(2, 3).bool()).tolist() == [0, 0]


def test_bf16_is_worked_on_in_float32() -> None:
    process, x0, noise = IDDPM(IDDPMConfig()), randn(1), randn(2)
    t = torch.tensor([300.0, 301.0])
    assert process.add_noise(x0.bfloat16(), noise.bfloat16(), t).dtype == torch.float32
    prediction = randn(3, 2, 8, 3, 4, 4).bfloat16()
    assert process.loss(prediction, x0, noise, t).dtype == torch.float32
    assert process.guided(prediction, prediction, 2.0).dtype == torch.float32


# Sampling


def test_guidance_leaves_other_channels_to_the_condition() -> None:
    cond, uncond = randn(1, 2, 8, 3, 4, 4), randn(2, 2, 8, 3, 4, 4)
    want = uncond + 4.0 * (cond - uncond)
    for channels, guided in ((None, 4), (3, 3)):
        found = IDDPM(IDDPMConfig(cfg_channel=channels)).guided(cond, uncond, 4.0)
        torch.testing.assert_close(found[:, :guided], want[:, :guided])
        assert torch.equal(found[:, guided:], cond[:, guided:])


@pytest.mark.parametrize("sampler", ["iddpm", "dpm-solver"])
def test_sampling_gives_the_distribution_that_the_network_knows(sampler: str) -> None:
    process = build_process(IDDPMConfig(sampler=sampler))  # type: ignore[arg-type]
    assert isinstance(process, IDDPM)
    network = gaussian_network(process, mean=0.7, deviation=0.5)
    shape = (16, 4, 4, 8, 8)
    z = process.sample(
        network,
        randn(1, *shape),
        times(process, 200, 16),
        noise=lambda number: randn(50 + number, *shape),
    )
    assert float(z.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(z.std()) == pytest.approx(0.5, abs=0.02)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    process, steps = IDDPM(IDDPMConfig()), 6
    network = gaussian_network(process, 0.3, 0.8)
    mask = torch.tensor([[1.0, 0.0, 0.5], [0.25, 1.0, 1.0]])
    z = randn(4)
    both = process.sample(
        network, z, times(process, steps), mask=mask, noise=row_noise([0, 1], steps)
    )
    alone = [
        process.sample(
            network,
            z[row : row + 1],
            times(process, steps, 1),
            mask=mask[row : row + 1],
            noise=row_noise([row], steps),
        )
        for row in range(2)
    ]
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-6)


def test_the_mask_says_what_is_kept_noised_and_generated() -> None:
    process, steps = IDDPM(IDDPMConfig()), 10
    network, z = gaussian_network(process, 5.0, 0.1), randn(4) * 0.1
    mask = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]])
    seen: list[Tensor] = []
    inputs: list[Tensor] = []

    def watched(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        assert x_mask is not None
        seen.append(x_mask.clone())
        inputs.append(x.clone())
        return network(x, t, x_mask)

    found = process.sample(
        watched, z, times(process, steps), mask=mask, noise=row_noise([0, 1], steps)
    )
    kept = (mask == 0)[:, None, :, None, None].expand(SHAPE)
    assert torch.equal(found[kept], z[kept])
    made = (mask == 1)[:, None, :, None, None].expand(SHAPE)
    assert float((found[made] - 5.0).abs().max()) < 1.0
    # A ratio of 0.5 of ten steps: clean at first, noised for the fifth from the end.
    assert [bool(m[0, 2]) for m in seen] == [False] * 5 + [True] * 5
    assert torch.equal(inputs[3][0, :, 2], z[0, :, 2])
    assert not torch.equal(inputs[4][0, :, 2], z[0, :, 2])
    assert float((found[0, :, 2] - 5.0).abs().max()) < 1.0
    assert not torch.equal(found[0, :, 2], z[0, :, 2])


def test_a_mask_of_ones_changes_nothing() -> None:
    process, steps = IDDPM(IDDPMConfig()), 5
    network, noise = gaussian_network(process, 0.0, 1.0), row_noise([0, 1], 5)
    plain = process.sample(network, randn(4), times(process, steps), noise=noise)
    masked = process.sample(
        network, randn(4), times(process, steps), mask=torch.ones(2, 3), noise=noise
    )
    assert torch.equal(plain, masked)


def test_finished_steps_are_counted() -> None:
    for config in (IDDPMConfig(), IDDPMConfig(sampler="dpm-solver")):
        process, done = build_process(config), []
        assert isinstance(process, IDDPM)
        process.sample(
            gaussian_network(process, 0.0, 1.0),
            randn(4),
            times(process, 3),
            noise=row_noise([0, 1], 3),
            on_step=done.append,
        )
        assert done == [1, 2, 3]


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_timesteps": 20}, "at least 21"),
        ({"num_sampling_steps": 1001}, "num_sampling_steps"),
        ({"num_sampling_steps": 0}, "num_sampling_steps"),
        ({"cfg_scale": -1.0}, "cfg_scale"),
        ({"cfg_channel": 0}, "cfg_channel"),
        ({"sampler": "ddim"}, "sampler"),
        ({"tables": "float16"}, "tables"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(IDDPMConfig, settings)


def test_networks_that_do_not_fit_are_named() -> None:
    iddpm = IDDPMConfig(cfg_channel=3)
    assert process_mismatch(iddpm, channels=4, pred_sigma=True) is None
    assert "pred_sigma" in (process_mismatch(iddpm, channels=4, pred_sigma=False) or "")
    assert "cfg_channel" in (process_mismatch(iddpm, channels=2, pred_sigma=True) or "")
    assert process_mismatch(RectifiedFlowConfig(), channels=4, pred_sigma=False) is None


def test_the_last_step_is_the_likelihood_of_the_clip() -> None:
    """At t = 0 the bound is -log2 of the probability of a bin of 2/255."""
    process, x0 = IDDPM(IDDPMConfig()), torch.zeros(SHAPE)
    noise = torch.zeros(SHAPE)
    exact = torch.cat([noise, torch.full(SHAPE, -1.0)], dim=1)
    found = process.loss_terms(exact, x0, noise, torch.zeros(2))["vb"]
    schedule = NoiseSchedule.linear(1000, range(1000))
    deviation = math.exp(0.5 * float(schedule.posterior_log_variance_clipped[0]))
    probability = math.erf(1 / 255 / deviation / math.sqrt(2))
    assert float(found[0]) == pytest.approx(-math.log2(probability), abs=1e-2)
