"""Key lists of models that were built with frozen parts: which names say "never trained"."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kinema.models.build import build_transformer
from kinema.models.config import PixArtConfig, STDiT2Config, STDiT3Config, TransformerConfig
from tests.parity.adapters.dit import freeze_as_asked

SIZE: dict[str, Any] = {"depth": 2, "hidden_size": 24, "num_heads": 2}


@pytest.mark.parametrize(
    ("config", "asked", "part", "frozen"),
    [
        (STDiT2Config(**SIZE), {"freeze": "text"}, ".cross_attn.", True),
        (STDiT2Config(**SIZE), {"freeze": "not_temporal"}, ".attn_temp.", False),
        (PixArtConfig(**SIZE), {"freeze": "text"}, ".cross_attn.", True),
        (STDiT3Config(**SIZE), {"only_train_temporal": True}, "temporal_blocks.", False),
    ],
)
def test_what_trains(
    config: TransformerConfig, asked: dict[str, Any], part: str, frozen: bool
) -> None:
    with torch.device("meta"):
        model = freeze_as_asked(build_transformer(config), asked)
    trains = {n: p.requires_grad for n, p in model.named_parameters() if n != "rope.freqs"}
    assert trains == {name: (part in name) != frozen for name in trains}
    assert len(set(trains.values())) == 2
