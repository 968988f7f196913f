from __future__ import annotations

from typing import Any

import pytest

from kinema.config.errors import ConfigError
from kinema.config.settings import fingerprint, from_dict, to_dict
from kinema.diffusion.config import FrameMaskConfig, RectifiedFlowConfig

PUBLISHED: dict[str, Any] = {  # Open-Sora 1.2, stage 1
    "random": 0.05,
    "intepolate": 0.005,
    "quarter_random": 0.005,
    "quarter_head": 0.005,
    "quarter_tail": 0.005,
    "quarter_head_tail": 0.005,
    "image_random": 0.025,
    "image_head": 0.05,
    "image_tail": 0.025,
    "image_head_tail": 0.025,
}


def test_the_published_spelling_is_read() -> None:
    config = from_dict(FrameMaskConfig, PUBLISHED)
    assert config.interpolate == 0.005
    right = {("interpolate" if k == "intepolate" else k): v for k, v in PUBLISHED.items()}
    assert fingerprint(config) == fingerprint(from_dict(FrameMaskConfig, right))
    assert from_dict(FrameMaskConfig, to_dict(config)) == config
    ratios = config.ratios()
    assert list(ratios)[-1] == "identity"
    assert ratios["identity"] == pytest.approx(0.8)
    assert sum(ratios.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"random": 0.7, "image_head": 0.4}, "sum to 1.1"),
        ({"random": -0.1}, "between 0 and 1"),
        ({"quater_head": 0.1}, "did you mean 'quarter_head'"),
        ({"interpolate": 0.1, "intepolate": 0.1}, "the same ratio"),
        ({"random": 0.2, "identity": 0.5}, "identity is the rest, 0.8"),
    ],
)
def test_wrong_ratios_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(FrameMaskConfig, data, where="masks")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"loc": 0.5}, "no effect with sample_method: uniform"),
        ({"scale": 2.0}, "no effect with sample_method: uniform"),
        ({"transform_scale": 2.0}, "no effect without use_timestep_transform"),
        ({"sample_method": "logit-normal", "use_discrete_timesteps": True}, "no effect"),
        ({"sample_method": "logit_normal"}, "is not one of 'uniform' or 'logit-normal'"),
        ({"sample_method": "logit-normal", "scale": 0.0}, "above 0"),
        ({"num_sampling_steps": 0}, "at least 1"),
        ({"num_timesteps": 0}, "at least 1"),
        ({"cfg_scale": -1.0}, "not be negative"),
        ({"transform_scale": 0.0, "use_timestep_transform": True}, "above 0"),
        ({"use_timestep_transfrom": True}, "did you mean 'use_timestep_transform'"),
    ],
)
def test_wrong_or_idle_settings_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(RectifiedFlowConfig, data, where="diffusion")


def test_published_scheduler_settings_are_read() -> None:
    stage1 = {"type": "rflow", "use_timestep_transform": True, "sample_method": "logit-normal"}
    config = from_dict(RectifiedFlowConfig, stage1)
    assert (config.num_sampling_steps, config.cfg_scale) == (30, 7.0)
