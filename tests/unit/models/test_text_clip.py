"""CLIP's pooled vectors on a tiny CLIP: the same as transformers', one per caption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kinema.config.errors import KinemaError
from kinema.models.build import build_text_encoder
from kinema.models.config import CLIPTextConfig
from tests.unit.models.text_folders import write_clip

CONFIG = CLIPTextConfig(dim=16)
TEXTS = ["A cat", "", "a b c " * 40, "A cat"]


@pytest.mark.parametrize("end", [2, 189])
@pytest.mark.parametrize("whole", [False, True])
def test_vectors_are_those_of_the_padded_batch(tmp_path: Path, whole: bool, end: int) -> None:
    from transformers import CLIPTokenizer

    model: Any = write_clip(tmp_path / "clip", whole=whole, end=end)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "clip")
    ids = tokenizer(
        TEXTS, max_length=77, padding="max_length", truncation=True, return_tensors="pt"
    )["input_ids"]
    assert ids.max() == 189
    with torch.no_grad():
        want = model(ids).pooler_output
    encoder = build_text_encoder(CONFIG, tmp_path / "clip")
    random_state = torch.get_rng_state()
    got = encoder.encode(TEXTS)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert got.mask is None
    assert (got.y.shape, got.y.dtype) == ((4, 1, 16), torch.float32)
    torch.testing.assert_close(got.y[:, 0], want, atol=2e-6, rtol=1e-5)
    assert not torch.equal(got.y[0], got.y[1])
    assert torch.equal(encoder.encode(["A cat"]).y[0], got.y[3])
    encoder.free()
    encoder.to("cpu")
    assert torch.equal(encoder.encode(TEXTS).y, got.y)
    assert encoder.memory_bytes == sum(p.nbytes for p in encoder._network.parameters())
    assert len(str(encoder.weights_id)) == 16


def test_what_does_not_fit_is_shown_as_text(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    encoder = build_text_encoder(CLIPTextConfig(dim=16, max_tokens=5), tmp_path / "clip")
    assert encoder.lost("a b c") == ""
    assert encoder.lost("a b C Dé f") == "Dé f"


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(KinemaError, match="openai/clip-vit-base-patch32"):
        build_text_encoder(CONFIG)
    write_clip(tmp_path / "clip")
    with pytest.raises(KinemaError, match=r"16 channels \(hidden_size\), the settings say 512"):
        build_text_encoder(CLIPTextConfig(), tmp_path / "clip")
    with pytest.raises(KinemaError, match="takes 77 tokens, the settings say 78"):
        build_text_encoder(CLIPTextConfig(dim=16, max_tokens=78), tmp_path / "clip")
    encoder = build_text_encoder(CONFIG, tmp_path / "clip")
    (tmp_path / "clip/model.safetensors").write_bytes(b"12345678")
    with pytest.raises(KinemaError, match="cannot be read"):
        encoder.encode(["a"])
    (tmp_path / "clip/merges.txt").unlink()
    with pytest.raises(KinemaError, match=r"tokenizer.json or vocab.json with merges.txt"):
        build_text_encoder(CONFIG, tmp_path / "clip")


def test_weights_that_lack_something_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_clip(tmp_path / "clip")
    file = tmp_path / "clip/model.safetensors"
    state = load_file(file)
    del state[max(k for k in state if "final_layer_norm" in k)]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(KinemaError, match="1 missing, 0 of another shape"):
        build_text_encoder(CONFIG, tmp_path / "clip").encode(["a"])
