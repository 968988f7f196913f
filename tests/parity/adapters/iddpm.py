"""IDDPM and DPM-Solver++ of the original, on our code."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.diffusion.config import IDDPMConfig
from kinema.diffusion.dpm_solver import ContinuousSchedule, DPMSolver
from kinema.diffusion.iddpm import IDDPM
from kinema.diffusion.noise_schedule import NoiseSchedule, respaced
from tests.parity.case import Case, adapter
from tests.parity.exceptions import DEFECTS_NOT_COPIED

CHANNELS_GUIDED_IN_V10 = 3
"""Hard-wired in 1.0; a setting of 1.1."""


@dataclass(frozen=True)
class Stub:
    """The formula that stands for the network in these cases, with the case's own numbers."""

    of_x: float
    constant: float
    of_t: float
    of_y: float
    clean: float
    """Factor on clean frames."""
    variance: float
    """Factor on the second half of the channels."""

    @classmethod
    def read(cls, text: str) -> Stub:
        """From `config.stub`, which spells the formula out."""
        number = r"(-?[\d.]+(?:e-?\d+)?)"
        found = re.search(
            rf"e = {number}\*x \+ {number} \+ {number}\*t\S* \+ {number}\*mean\(y per row\)", text
        )
        second = re.search(rf"return cat\(\[e, (?:{number}\*)?sin\(x\)\], dim=1\)", text)
        assert found is not None, f"the formula of the stub is another one: {text}"
        assert second is not None, f"the formula of the stub is another one: {text}"
        clean = re.search(rf"e = where\(x_mask\S*, e, {number}\*e\)", text)
        return cls(
            *map(float, found.groups()),
            clean=float(clean[1]) if clean else 1.0,
            variance=float(second[1] or 1.0),
        )

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, x_mask: Tensor | None = None) -> Tensor:
        of_row = self.of_t * t + self.of_y * y.mean(dim=tuple(range(1, y.dim())))
        e = self.of_x * x + self.constant + of_row[:, None, None, None, None]
        if x_mask is not None:
            e = torch.where(x_mask[:, None, :, None, None], e, self.clean * e)
        return torch.cat([e, self.variance * torch.sin(x)], dim=1)


def is_v10(case: Case) -> bool:
    return case.official.startswith("v1.0")


def iddpm_config(case: Case) -> IDDPMConfig:
    guided = case.config.get("cfg_channel")
    return IDDPMConfig(
        cfg_channel=CHANNELS_GUIDED_IN_V10 if is_v10(case) else guided,
        tables="float64" if is_v10(case) else "float32",
    )


@adapter(r"schedulers\.iddpm\.IDDPM \(noise_schedule linear")
def noise_schedule(case: Case) -> None:
    names = [name.rsplit(".", 1) for name in case.group("out")]
    spacings = set(case.config["respacings"])
    (total,) = {int(spacing) for spacing, _ in names if spacing not in spacings}
    tables = torch.float64 if is_v10(case) else torch.float32
    for spacing, table in names:
        schedule = NoiseSchedule.linear(total, respaced(total, spacing), tables)
        ours = {"timestep_map": "timesteps"}.get(table, table)
        case.check(f"out.{spacing}.{table}", getattr(schedule, ours))


@adapter(r"IDDPM\.training_losses \(EPSILON, LEARNED_RANGE, MSE\)")
def training_losses(case: Case) -> None:
    process, stub = IDDPM(iddpm_config(case)), Stub.read(case.config["stub"])
    assert not case.config["timestep_respacing"]
    x0, noise, y = case.input("x_start"), case.input("noise"), case.input("y")
    t = case.input("t").float()
    case.check("out.q_sample", process.add_noise(x0, noise, t))
    for kind in ("", "_mask", "_weights"):
        if not case.has(f"out.loss{kind}"):
            continue
        mask = case.input("mask") if kind == "_mask" else None
        weight = case.input("weights")[case.input("t")] if kind == "_weights" else None
        prediction = stub(process.add_noise(x0, noise, t, mask), t, y, mask)
        given = (prediction, x0, noise, t)
        found = process.loss_terms(*given, mask=mask, weight=weight)
        total = process.loss(*given, mask=mask, weight=weight)
        case.check_each(
            {
                f"out.loss{kind}": lambda total=total: total,
                f"out.mse{kind}": lambda found=found: found["mse"],
                f"out.vb{kind}": lambda found=found: found["vb"],
            }
        )


@adapter(r"IDDPM\.sample \(p_sample loop")
def sample(case: Case) -> None:
    process, stub = IDDPM(iddpm_config(case)), Stub.read(case.config["stub"])
    z, drawn = case.input("z"), case.input("noise")
    steps, count = case.config["num_sampling_steps"], len(z)
    mask = case.input("mask") if case.has("in.mask") else None
    y = torch.cat([case.input("y"), case.input("y_null")])
    seen: dict[str, list[Tensor]] = {"t": [], "x_mask": []}

    def network(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        # The original runs both halves as one batch of 2B.
        both, t2 = torch.cat([x, x]), torch.cat([t, t])
        mask2 = None if x_mask is None else torch.cat([x_mask, x_mask])
        seen["t"].append(t2.long())
        if mask2 is not None:
            seen["x_mask"].append(mask2)
        cond, uncond = stub(both, t2, y, mask2).chunk(2)
        return process.guided(cond, uncond, case.config["cfg_scale"])

    def noise(number: int) -> Tensor:
        # In the order of the original: with a mask each step draws for noised frames first.
        step, of_frames = number % steps, number >= steps
        row = step if mask is None else 2 * step + (not of_frames)
        return drawn[row][:count]

    rows = torch.ones(count)
    timesteps = process.sampling_timesteps(steps, latent_frames=rows, height=rows, width=rows)
    got = process.sample(network, z, timesteps, mask=mask, noise=noise)
    assert len(seen["t"]) == steps
    if mask is not None:
        kept = (mask == 0)[:, None, :, None, None]
        assert torch.equal(torch.where(kept, got, 0.0), torch.where(kept, z, 0.0))
        assert DEFECTS_NOT_COPIED.allows(case.official, "out.z kept frames")
        got = torch.where(kept, case.tensors["out.z"], got)
    case.check_each(
        {
            "out.z": lambda: got,
            "out.t_seen": lambda: torch.stack(seen["t"]),
            "out.x_mask_seen": lambda: torch.stack(seen["x_mask"]),
        }
    )


@adapter(r"dpm_solver\.NoiseScheduleVP\('discrete', linear betas")
def continuous_schedule(case: Case) -> None:
    found = re.search(r"linear betas (\d+)\)", case.official)
    assert found
    schedule, s = ContinuousSchedule(int(found[1])), case.input("t")
    case.check_each(
        {
            "out.alpha": lambda: schedule.alpha(s),
            "out.sigma": lambda: schedule.sigma(s),
            "out.lambda": lambda: schedule.lambda_(s),
            "out.total_N_T": lambda: torch.tensor(
                [schedule.num_timesteps, schedule.time(torch.tensor(schedule.num_timesteps - 1.0))]
            ),
        }
    )


@adapter(r"DPM_SOLVER\.sample \(dpmsolver\+\+, order 2, multistep, time_uniform\)")
def dpm_solver(case: Case) -> None:
    process, stub = DPMSolver(IDDPMConfig(sampler="dpm-solver")), Stub.read(case.config["stub"])
    z = case.input("z")
    scale = case.config["cfg_scale"]
    y = torch.cat([case.input("y_null"), case.input("y")])
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        assert x_mask is None
        if scale == 1.0:  # the original then runs no unconditional half either
            seen.append(t)
            return stub(x, t, case.input("y"))
        both, t2 = torch.cat([x, x]), torch.cat([t, t])
        seen.append(t2)
        uncond, cond = stub(both, t2, y).chunk(2)
        return process.guided(cond, uncond, scale)

    rows = torch.ones(len(z))
    timesteps = process.sampling_timesteps(
        case.config["num_sampling_steps"], latent_frames=rows, height=rows, width=rows
    )
    got = process.sample(network, z, timesteps)
    case.check_each({"out.z": lambda: got, "out.t_seen": lambda: torch.stack(seen)})
