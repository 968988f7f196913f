"""Numbers of classes as prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kinema.config.errors import KinemaError
from kinema.models.build import build_text_encoder
from kinema.models.config import ClassTextConfig, HashTextConfig


def test_prompts_are_class_numbers() -> None:
    encoder = build_text_encoder(ClassTextConfig(num_classes=1000))
    found = encoder.encode(["0", " 999 ", "207"])
    assert found.mask is None
    assert torch.equal(found.y, torch.tensor([0, 999, 207]))
    assert found.y.dtype == torch.int64
    assert encoder.lost("207") == ""
    assert encoder.memory_bytes == 0
    assert encoder.weights_id is None


@pytest.mark.parametrize("prompt", ["1000", "-1"])
def test_a_class_out_of_range(prompt: str) -> None:
    with pytest.raises(KinemaError, match=f"class {prompt} is out of range: 0 to 999"):
        build_text_encoder(ClassTextConfig()).encode(["1", prompt])


def test_a_caption_is_no_class() -> None:
    with pytest.raises(KinemaError, match="'a cat' is not the number of a class") as error:
        build_text_encoder(ClassTextConfig(num_classes=101)).encode(["a cat"])
    assert "from 0 to 100" in str(error.value)


def test_there_are_no_weights_to_name() -> None:
    for config in (ClassTextConfig(), HashTextConfig()):
        with pytest.raises(KinemaError, match="has no weights"):
            build_text_encoder(config, Path("t5"))
