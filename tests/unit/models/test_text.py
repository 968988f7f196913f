"""The encoder without weights: fixed vectors, near spellings, masks, what did not fit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kinema.models.config import HashTextConfig, T5TextConfig
from kinema.models.text import HashTextEncoder, split_words

CONFIG = HashTextConfig(dim=512, max_tokens=8)


@pytest.fixture
def encoder() -> HashTextEncoder:
    return HashTextEncoder(CONFIG)


def test_shapes_and_masks(encoder: HashTextEncoder) -> None:
    features = encoder.encode(["a red circle", "", "one two three four five six seven eight nine"])
    assert features.y.shape == (3, 1, 8, 512)
    assert features.y.dtype == torch.float32
    assert features.mask.dtype == torch.bool
    assert features.mask.sum(dim=1).tolist() == [4, 1, 8]  # a begin marker first
    assert not features.y[:, 0][~features.mask].any()
    assert float(features.y[:, 0][features.mask].std()) == pytest.approx(1.0, abs=0.05)


def test_what_does_not_fit(encoder: HashTextEncoder) -> None:
    assert encoder.lost("one two three four five six seven Eight, nine ") == "eight, nine"
    assert encoder.lost("one two three four five six seven") == ""
    cut, whole = encoder.encode(["a b c d e f g h i", "a b c d e f g"]).y
    assert torch.equal(cut, whole)


def test_no_captions(encoder: HashTextEncoder) -> None:
    assert encoder.encode([]).y.shape == (0, 1, 8, 512)


def test_words() -> None:
    assert split_words("A red-hot circle, Moving LEFT!") == [
        *("a", "red", "-", "hot", "circle", ",", "moving", "left", "!")
    ]
    assert split_words(" \n\t") == []
    assert split_words("ＲＥＤ été 日本") == ["red", "été", "日本"]


def test_case_and_spacing_do_not_matter(encoder: HashTextEncoder) -> None:
    one, two = encoder.encode(["A  Red\ncircle", "a red circle"]).y
    assert torch.equal(one, two)


def test_near_spellings_are_near_and_others_are_not(encoder: HashTextEncoder) -> None:
    words = ["circle", "circles", "square", "red", "green"]
    vectors = encoder.encode(words).y[:, 0, 1]
    cosine = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    place = 0.04  # what the common place in the caption contributes
    assert cosine[0, 1] > 0.2
    for a, b in [(0, 2), (0, 3), (3, 4), (2, 4)]:
        assert abs(float(cosine[a, b]) - place) < 0.2, (words[a], words[b])


def test_place_tells_the_order_apart(encoder: HashTextEncoder) -> None:
    one, two = encoder.encode(["red over green", "green over red"]).y[:, 0]
    assert not torch.equal(one[1], two[3])
    assert float(torch.nn.functional.cosine_similarity(one[1], two[3], dim=0)) > 0.9


def test_same_in_another_process(encoder: HashTextEncoder) -> None:
    code = (
        "from kinema.models.config import HashTextConfig as C; "
        "from kinema.models.text import HashTextEncoder as E; "
        "print(E(C(dim=512, max_tokens=8)).encode(['a red circle']).y.numpy().tobytes().hex())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = encoder.encode(["a red circle"]).y.numpy().tobytes().hex()
    assert out.stdout.strip() == here


def test_values_never_change() -> None:
    """Checkpoints learned these numbers; a change here makes them read other words."""
    y = HashTextEncoder(HashTextConfig(dim=4, max_tokens=2)).encode(["red"]).y
    want = torch.tensor(
        [[2.361271, -0.46539, 0.065864, 0.547744], [-0.964151, 0.122215, 1.038233, -1.573534]]
    )
    torch.testing.assert_close(y[0, 0], want, atol=1e-6, rtol=0)


def test_t5_facts() -> None:
    config = T5TextConfig()
    assert (config.dim, config.max_tokens) == (4096, 300)
    # 2 FLOPs a weight and token, over the 4.5 billion weights of the encoder's layers.
    weights = 24 * (4 * 4096 * 4096 + 3 * 4096 * 10240)
    assert config.encode_flops() == pytest.approx(2 * 300 * weights, rel=0.02)
    # google/t5-v1_1-base has 109.6 million weights, 24.7 million of which are the embedding.
    base = T5TextConfig(dim=768, max_tokens=1).encode_flops()
    assert base == pytest.approx(2 * (109.6e6 - 24.7e6), rel=0.01)
    assert T5TextConfig(dim=64, max_tokens=8).encode_flops() > 0
    assert HashTextConfig().encode_flops() == 0.0
