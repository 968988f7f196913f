"""Rectified flow, frame masks, learning-rate schedules and EMA of the original, on our code."""

from __future__ import annotations

import random
from typing import Literal, cast

import torch
from torch import Tensor, nn

from kinema.config.settings import from_dict
from kinema.diffusion.config import FrameMaskConfig, FrameMaskKind, RectifiedFlowConfig
from kinema.diffusion.masks import frame_mask, pick_kind
from kinema.diffusion.rectified_flow import RectifiedFlow, guided, shift
from kinema.training.config import OneCycleSchedule, WarmupSchedule
from kinema.training.ema import EMA
from kinema.training.schedule import learning_rate
from tests.parity.case import Case, adapter
from tests.parity.exceptions import DEFECTS_NOT_COPIED


def opensora_latent_frames(num_frames: Tensor, *, image: bool) -> Tensor:
    """Latent frames as 1.2's timestep transform counts them, from frames in pixels; ours asks the
    latent. One flag for the batch, because 1.2 lets the first row decide for all."""
    return torch.ones_like(num_frames) if image else num_frames // 17 * 5


def stub(x: Tensor, t: Tensor, y: Tensor | None, x_mask: Tensor | None) -> Tensor:
    """The formula that stands for the network in these cases (`config.stub` spells it out)."""
    a = 0.3 * x + 0.1 + 0.001 * t[:, None, None, None, None]
    if y is not None:
        a = a + 0.5 * y.mean(dim=tuple(range(1, y.dim())))[:, None, None, None, None]
    if x_mask is not None:
        a = torch.where(x_mask[:, None, :, None, None], a, 0.5 * a)
    return torch.cat([a, -2 * a], dim=1)


@adapter(r"rectified_flow\.timestep_transform$")
def timestep_transform_rows(case: Case) -> None:
    frames = case.input("num_frames")
    latent_frames = torch.where(frames == 1, 1, opensora_latent_frames(frames, image=False))
    got = shift(
        case.input("t"),
        latent_frames=latent_frames,
        height=case.input("height"),
        width=case.input("width"),
        scale=case.input("scale"),
        num_timesteps=case.config["num_timesteps"],
    )
    assert torch.isfinite(got).all()
    # Below 17 frames the original counts 0 latent frames and sends every t to 0 or NaN.
    defect = latent_frames == 0
    assert DEFECTS_NOT_COPIED.allows(case.official, "out.t below 17 frames")
    case.check("out.t", torch.where(defect, case.tensors["out.t"], got))


@adapter(r"^v1\.2 timestep_transform$")
def timestep_transform_batch(case: Case) -> None:
    for suffix in ("", "_b"):
        if not case.has(f"out.t{suffix}"):
            continue
        frames = case.input(f"num_frames{suffix}")
        latent_frames = opensora_latent_frames(frames, image=bool(frames[0] == 1))
        got = shift(
            case.input("t"),
            latent_frames=latent_frames,
            height=case.input("height"),
            width=case.input("width"),
        )
        case.check(f"out.t{suffix}", got)


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
    flow = RectifiedFlow(
        from_dict(RectifiedFlowConfig, {"num_timesteps": case.config["num_timesteps"]})
    )
    x0, noise, y, mask = (case.input(k) for k in ("x_start", "noise", "y", "mask"))
    t, t_int = case.input("t"), case.input("t_int")

    case.check("out.x_t", flow.add_noise(x0, noise, t))
    case.check("out.x_t_mask", flow.add_noise(x0, noise, t, mask))

    def loss(t: Tensor, mask: Tensor | None, weight: Tensor | None = None) -> Tensor:
        prediction = stub(flow.add_noise(x0, noise, t, mask), t, y, mask)
        return flow.loss(prediction, x0, noise, mask=mask, weight=weight)

    case.check("out.loss", loss(t, None))
    case.check("out.loss_mask", loss(t, mask))
    weight = case.input("weights")[t_int]
    case.check("out.loss_weights", loss(t_int, None, weight))
    case.check("out.loss_weights_mask", loss(t_int, mask, weight))


@adapter(r"RFLOW\.sample$")
def sample(case: Case) -> None:
    config = case.config
    fields = ("num_timesteps", "use_discrete_timesteps", "use_timestep_transform")
    flow = RectifiedFlow(from_dict(RectifiedFlowConfig, {k: config[k] for k in fields}))
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

    masked = case.has("in.mask")
    got = flow.sample(
        velocity,
        z,
        timesteps,
        mask=case.input("mask") if masked else None,
        noise=(lambda step: case.input("noise")[step]) if masked else None,
    )
    case.check("out.z", got)
    case.check("out.t_seen", torch.stack([s["t"] for s in seen]))
    case.check("out.model_input_last", seen[-1]["x"])
    if masked:
        case.check("out.x_mask_seen", torch.stack([s["x_mask"] for s in seen]))


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
        if name.startswith("buf"):
            model.register_buffer(name, value.clone())
        else:
            trainable = not name.startswith("frozen")
            model.register_parameter(name, nn.Parameter(value.clone(), requires_grad=trainable))
    average = EMA(model, case.config["decay"])
    average.load_state_dict(start, where=case.name)
    average.update(model)
    for name, value in average.state_dict().items():
        case.check(f"out.ema.{name}", value)
    with torch.no_grad():
        model.get_parameter("a").add_(1.0)
    average.update(model)
    case.check("out.ema2.a", average.state_dict()["a"])
