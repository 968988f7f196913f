"""Rectified flow, frame masks, learning-rate schedules and EMA of the original, on our code."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from kinema.config.settings import from_dict
from kinema.diffusion.config import FrameMaskConfig, FrameMaskKind, RectifiedFlowConfig
from kinema.diffusion.masks import frame_mask, pick_kind
from kinema.diffusion.rectified_flow import (
    SHIFT_BASE_FRAMES,
    SHIFT_BASE_PIXELS,
    RectifiedFlow,
    guided,
    shift,
)
from kinema.training.config import OneCycleSchedule, WarmupSchedule
from kinema.training.ema import EMA
from kinema.training.schedule import learning_rate
from tests.parity.case import Case, adapter
from tests.parity.exceptions import DEFECTS_NOT_COPIED


def opensora_latent_frames(num_frames: Tensor, *, image: bool) -> Tensor:
    """Latent frames as 1.2's timestep transform counts them, from frames in pixels; ours asks the
    latent. One flag for the batch, because 1.2 lets the first row decide for all."""
    return torch.ones_like(num_frames) if image else num_frames // 17 * 5


@dataclass(frozen=True)
class Stub:
    """The formula that stands for the network in these cases, with the case's own numbers."""

    of_x: float
    constant: float
    of_t: float
    of_y: float
    clean: float
    """Factor on clean frames."""
    second: float
    """Factor on the second half of the channels."""

    @classmethod
    def read(cls, text: str) -> Stub:
        """From `config.stub`, which spells the formula out."""
        number = r"(-?[\d.]+(?:e-?\d+)?)"
        parts = (
            rf"a = {number}\*x \+ {number} \+ {number}\*t\[",
            rf"a = a \+ {number}\*y\.mean\(dim=all non-batch dims\)",
            rf"a = where\(x_mask\[:,None,:,None,None\], a, {number}\*a\)",
            rf"return cat\(\[a, {number}\*a\], dim=1\)",
        )
        numbers: list[str] = []
        for part in parts:
            found = re.search(part, text)
            assert found is not None, f"the formula of the stub is another one: {text}"
            numbers += found.groups()
        return cls(*map(float, numbers))

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None, x_mask: Tensor | None) -> Tensor:
        a = self.of_x * x + self.constant + self.of_t * t[:, None, None, None, None]
        if y is not None:
            a = a + self.of_y * y.mean(dim=tuple(range(1, y.dim())))[:, None, None, None, None]
        if x_mask is not None:
            a = torch.where(x_mask[:, None, :, None, None], a, self.clean * a)
        return torch.cat([a, self.second * a], dim=1)


@adapter(r"rectified_flow\.timestep_transform$")
def timestep_transform_rows(case: Case) -> None:
    config = case.config
    # Another base of the shift is a factor on its scale.
    pixels, base_frames = (
        config.get("base_resolution", SHIFT_BASE_PIXELS) / SHIFT_BASE_PIXELS,
        config.get("base_num_frames", SHIFT_BASE_FRAMES) / SHIFT_BASE_FRAMES,
    )
    frames = case.input("num_frames")
    latent_frames = torch.where(frames == 1, 1, opensora_latent_frames(frames, image=False))
    got = shift(
        case.input("t"),
        latent_frames=latent_frames,
        height=case.input("height"),
        width=case.input("width"),
        scale=case.input("scale") / (pixels * base_frames) ** 0.5,
        num_timesteps=config["num_timesteps"],
    )
    assert torch.isfinite(got).all()
    # Below 17 frames the original counts 0 latent frames and sends every t to 0 or NaN.
    defect = latent_frames == 0
    assert not defect.all()
    assert DEFECTS_NOT_COPIED.allows(case.official, "out.t below 17 frames")
    case.check("out.t", torch.where(defect, case.tensors["out.t"], got))


@adapter(r"^v1\.2 timestep_transform$")
def timestep_transform_batch(case: Case) -> None:
    def of_row(name: str, suffix: str) -> Tensor:
        return case.input(name + suffix if case.has(f"in.{name}{suffix}") else name)

    for name in case.group("out"):  # t, t_b, ...
        suffix = name.removeprefix("t")
        frames = of_row("num_frames", suffix)
        got = shift(
            of_row("t", suffix),
            latent_frames=opensora_latent_frames(frames, image=bool(frames[0] == 1)),
            height=of_row("height", suffix),
            width=of_row("width", suffix),
        )
        case.check(f"out.{name}", got)


@adapter(r"RFlowScheduler \(t=None path")
def sample_t(case: Case) -> None:
    config, n = case.config, case.config["N"]
    frames = torch.tensor(config["num_frames"])
    for name, settings in config["schedulers"].items():
        flow_config = from_dict(
            RectifiedFlowConfig, {"num_timesteps": config["num_timesteps"], **settings}
        )
        torch.manual_seed(case.entry["seed"])
        if flow_config.use_discrete_timesteps:
            whole = torch.randint(0, config["num_timesteps"], (n,))
            draws = (whole + 0.5) / config["num_timesteps"]
        elif flow_config.sample_method == "logit-normal":
            draws = torch.normal(torch.zeros(n, 1), torch.ones(n, 1))[:, 0]
        else:
            draws = torch.rand(n)
        got = RectifiedFlow(flow_config).training_timesteps(
            draws,
            latent_frames=opensora_latent_frames(frames, image=bool(frames == 1)),
            height=config["height"],
            width=config["width"],
        )
        case.check(f"out.{name}", got)


@adapter(r"RFLOW\.training_losses")
def training_losses(case: Case) -> None:
    flow = RectifiedFlow(flow_config(case.config))
    stub = Stub.read(case.config["stub"])
    x0, noise = case.input("x_start"), case.input("noise")
    y = case.input("y") if case.has("in.y") else None

    def loss(t: str, *, masked: bool = False, weighted: bool = False) -> Tensor:
        timesteps = case.input(t)
        mask = case.input("mask") if masked else None
        weight = case.input("weights")[timesteps] if weighted else None
        prediction = stub(flow.add_noise(x0, noise, timesteps, mask), timesteps, y, mask)
        return flow.loss(prediction, x0, noise, mask=mask, weight=weight)

    case.check_each(
        {
            "out.x_t": lambda: flow.add_noise(x0, noise, case.input("t")),
            "out.x_t_mask": lambda: flow.add_noise(x0, noise, case.input("t"), case.input("mask")),
            "out.loss": lambda: loss("t"),
            "out.loss_mask": lambda: loss("t", masked=True),
            "out.loss_weights": lambda: loss("t_int", weighted=True),
            "out.loss_weights_mask": lambda: loss("t_int", masked=True, weighted=True),
        }
    )


def flow_config(given: dict[str, Any]) -> RectifiedFlowConfig:
    """Of a case's settings, those that are the flow's."""
    ours = {field.name for field in fields(RectifiedFlowConfig)}
    return from_dict(RectifiedFlowConfig, {k: v for k, v in given.items() if k in ours})


@adapter(r"RFLOW\.sample$")
def sample(case: Case) -> None:
    config = case.config
    flow, stub = RectifiedFlow(flow_config(config)), Stub.read(config["stub"])
    z, frames = case.input("z"), case.input("num_frames")
    timesteps = flow.sampling_timesteps(
        config["num_sampling_steps"],
        latent_frames=opensora_latent_frames(frames, image=bool(frames[0] == 1)),
        height=case.input("height"),
        width=case.input("width"),
    )
    seen: list[dict[str, Tensor]] = []
    y = torch.cat([case.input("y"), case.input("y_null")])

    def velocity(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        # The original runs both halves as one batch of 2B.
        both, t2 = torch.cat([x, x]), torch.cat([t, t])
        mask2 = None if x_mask is None else torch.cat([x_mask, x_mask])
        seen.append({"x": both, "t": t2} | ({} if mask2 is None else {"x_mask": mask2}))
        cond, uncond = stub(both, t2, y, mask2).chunk(2)
        return guided(cond, uncond, config["cfg_scale"])

    got = flow.sample(
        velocity,
        z,
        timesteps,
        mask=case.input("mask") if case.has("in.mask") else None,
        noise=(lambda step: case.input("noise")[step]) if case.has("in.noise") else None,
    )
    assert len(seen) == config["num_sampling_steps"]
    case.check_each(
        {
            "out.z": lambda: got,
            "out.t_seen": lambda: torch.stack([s["t"] for s in seen]),
            "out.model_input_last": lambda: seen[-1]["x"],
            "out.x_mask_seen": lambda: torch.stack([s["x_mask"] for s in seen]),
        }
    )


class PythonDraws:
    """The draws of the original: Python's generator, and torch's for vectors."""

    def unit(self) -> float:
        return random.random()

    def integer(self, low: int, high: int) -> int:
        return random.randint(low, high)

    def units(self, n: int) -> Tensor:
        return torch.rand(n)


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def _kind(official_name: str) -> FrameMaskKind:
    name = {"intepolate": "interpolate"}.get(official_name, official_name)
    return cast(FrameMaskKind, name)


def _row(mask: Tensor) -> str:
    return "".join("1" if noised else "0" for noised in mask.tolist())


@adapter(r"train_utils\.MaskGenerator", kind="json")
def mask_generator(case: Case) -> None:
    table = case.table()
    draws = PythonDraws()
    assert table["per_type"]
    for kind, num_frames, seed, want in table["per_type"]:
        _seed(seed)
        draws.unit()  # the original picks a kind even where there is only one
        got = _row(frame_mask(_kind(kind), num_frames, draws))
        if DEFECTS_NOT_COPIED.allows(case.official, f"{kind} T={num_frames} {want}"):
            assert "1" in got
            continue
        assert got == want, f"{kind}, {num_frames} frames, seed {seed}: {got} != {want}"

    compared = 0
    for name, rows in table["sequences"].items():
        stage = name.rpartition("_T")[0]
        if stage not in table["distribution"]:
            continue  # its ratios are not in the file
        ratios = {_kind(k): v for k, v in table["distribution"][stage]["ratios"].items()}
        _seed(table["sequences_seed"])
        for index, want in enumerate(rows):
            got = _row(frame_mask(pick_kind(ratios, draws.unit()), len(want), draws))
            assert got == want, f"{name}, draw {index}: {got} != {want}"
        compared += 1
    assert compared

    for stage, entry in table["distribution"].items():
        config = from_dict(FrameMaskConfig, entry["ratios"])
        ratios = config.ratios()
        _seed(0)
        n = 4000
        masks = torch.stack(
            [frame_mask(pick_kind(ratios, draws.unit()), entry["T"], draws) for _ in range(n)]
        )
        got_all = float(masks.all(dim=1).float().mean())
        assert abs(got_all - entry["all_true"]) < 0.04, f"{stage}: {got_all}"


@adapter(r"utils\.lr_scheduler")
def lr_schedules(case: Case) -> None:
    for name, config in case.config.items():
        want = case.tensors[f"out.{name}"]
        if config["cls"] == "LinearWarmupLR":
            schedule: WarmupSchedule | OneCycleSchedule = WarmupSchedule(
                warmup_steps=config["warmup_steps"]
            )
            lr = config["lr"]
        else:
            assert config["cls"] == "OneCycleScheduler"
            anneal: Literal["cosine", "linear"] = (
                "cosine" if config["anneal_strategy"] == "cos" else "linear"
            )
            schedule = OneCycleSchedule(
                type="one-cycle",
                min_lr=config["min_lr"],
                max_lr=config["max_lr"],
                warmup_steps=config["warmup_steps"],
                cooldown_steps=config["cooldown_steps"],
                anneal=anneal,
            )
            lr = config["final_lr"]
            if DEFECTS_NOT_COPIED.allows(case.official, f"{name} {config['anneal_strategy']}"):
                case.checked.add(f"out.{name}")
                continue
        got = torch.tensor([learning_rate(schedule, lr, i) for i in range(len(want))])
        case.check(f"out.{name}", got)


@adapter(r"train_utils\.update_ema")
def ema(case: Case) -> None:
    parameters, start = case.group("in.model"), case.group("in.ema")
    model = nn.Module()
    for name, value in parameters.items():
        # Only the names tell what is a buffer and what does not train.
        if name.startswith("buf"):
            model.register_buffer(name, value.clone())
        else:
            trainable = not name.startswith("frozen")
            model.register_parameter(name, nn.Parameter(value.clone(), requires_grad=trainable))
    average = EMA(model, case.config["decay"])
    with torch.no_grad():
        for name, value in average.state_dict().items():
            value.copy_(start[name])
    average.update(model)
    for name, value in average.state_dict().items():
        case.check(f"out.ema.{name}", value)
    # Then 1 is added to the parameters that a second update is recorded for.
    for name in case.group("out.ema2"):
        with torch.no_grad():
            model.get_parameter(name).add_(1.0)
    average.update(model)
    for name in case.group("out.ema2"):
        case.check(f"out.ema2.{name}", average.state_dict()[name])
