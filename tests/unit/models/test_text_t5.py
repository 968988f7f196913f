"""The T5 encoder on a tiny one: the same states as transformers', from every kind of folder."""

from __future__ import annotations

import builtins
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kinema.config.errors import KinemaError
from kinema.models.build import build_text_encoder
from kinema.models.config import T5TextConfig
from kinema.models.text_t5 import T5TextEncoder
from tests.unit.models.text_folders import write_t5, write_weights

CONFIG = T5TextConfig(dim=16, max_tokens=24, precision="fp32")
TEXTS = ["A Red Circle", "", "one two three four five six seven eight nine ten one two three"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("text") / "t5"
    return folder, write_t5(folder)


@torch.no_grad()
def padded(model: Any, folder: Path, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """States as the originals work them out: all captions padded to one length, with a mask."""
    from transformers import T5Tokenizer

    found = T5Tokenizer.from_pretrained(folder)(
        [t.lower() for t in texts],
        max_length=length,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    mask = found["attention_mask"]
    return model(found["input_ids"], attention_mask=mask).last_hidden_state, mask.bool()


def test_features_are_those_of_the_padded_batch(t5: tuple[Path, Any]) -> None:
    folder, model = t5
    want, mask = padded(model, folder, TEXTS, CONFIG.max_tokens)
    got = build_text_encoder(CONFIG, folder).encode(TEXTS)
    assert got.mask is not None
    assert torch.equal(got.mask, mask)
    assert mask.sum(1).tolist()[1:] == [1, CONFIG.max_tokens]
    assert (got.y.shape, got.y.dtype) == ((3, 1, 24, 16), torch.float32)
    torch.testing.assert_close(got.y[:, 0][mask], want[mask], atol=2e-6, rtol=1e-5)
    assert not got.y[:, 0][~mask].any()


def test_a_caption_does_not_depend_on_its_neighbours(t5: tuple[Path, Any]) -> None:
    encoder = T5TextEncoder(CONFIG, t5[0])
    together = encoder.encode(TEXTS).y
    for row, text in enumerate(TEXTS):
        assert torch.equal(encoder.encode([text]).y[0], together[row])
    assert encoder.encode([]).y.shape == (0, 1, 24, 16)


@pytest.mark.parametrize("tokenizer", ["json", "spiece"])
@pytest.mark.parametrize("weights", ["sharded", "bin", "bin-sharded", "old-bin"])
def test_every_kind_of_folder(
    t5: tuple[Path, Any], tmp_path: Path, weights: str, tokenizer: str
) -> None:
    write_t5(tmp_path / "other", weights=weights, tokenizer=tokenizer)
    got = T5TextEncoder(CONFIG, tmp_path / "other").encode(TEXTS).y
    assert torch.equal(got, T5TextEncoder(CONFIG, t5[0]).encode(TEXTS).y)


def test_weights_of_a_whole_t5(t5: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = tmp_path / "whole", t5[1]
    shutil.copytree(t5[0], folder)
    more = {"decoder.final_layer_norm.weight": torch.ones(16), "lm_head.weight": torch.ones(2, 16)}
    state = model.state_dict()
    del state["shared.weight"]  # some files have its second name only
    write_weights(folder, state | more, "safetensors")
    got = T5TextEncoder(CONFIG, folder).encode(TEXTS).y
    assert torch.equal(got, T5TextEncoder(CONFIG, t5[0]).encode(TEXTS).y)


@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.02), ("int8", 0.04)])
def test_fewer_bits_change_little_and_take_less(
    t5: tuple[Path, Any], precision: Any, error: float
) -> None:
    exact = T5TextEncoder(CONFIG, t5[0])
    encoder = T5TextEncoder(T5TextConfig(dim=16, max_tokens=24, precision=precision), t5[0])
    want, got = exact.encode(TEXTS).y, encoder.encode(TEXTS).y
    assert got.dtype == torch.float32
    off = float((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt())
    assert 0 < off < error
    assert encoder.memory_bytes < 0.6 * exact.memory_bytes
    held = sum(
        p.qdata.nbytes + p.scale.nbytes + p.zero_point.nbytes if hasattr(p, "qdata") else p.nbytes
        for p in encoder._network.parameters()
    )
    # Scales are fp32 and counted so.
    assert encoder.memory_bytes == pytest.approx(held, rel=0.02)


def test_freed_weights_come_back(t5: tuple[Path, Any]) -> None:
    encoder = T5TextEncoder(CONFIG, t5[0])
    assert encoder._network is None  # read when first needed
    before = encoder.encode(TEXTS).y
    encoder.free()
    assert encoder._network is None
    encoder.to("cpu")
    assert torch.equal(encoder.encode(TEXTS).y, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_network_moves_between_devices(t5: tuple[Path, Any], precision: Any) -> None:
    encoder = T5TextEncoder(T5TextConfig(dim=16, max_tokens=24, precision=precision), t5[0])
    here = encoder.encode(TEXTS).y
    before = torch.cuda.memory_allocated()
    for ready in (True, False):  # moved, and read straight onto the device
        if not ready:
            encoder.free()
        encoder.to("cuda")
        there = encoder.encode(TEXTS)
        assert torch.cuda.memory_allocated() > before
        assert there.y.device.type == "cpu"
        torch.testing.assert_close(there.y, here, atol=0.05, rtol=0.05)
    encoder.to("cpu")
    assert torch.cuda.memory_allocated() == before
    torch.testing.assert_close(encoder.encode(TEXTS).y, here)


def test_what_does_not_fit_is_shown_as_text(t5: tuple[Path, Any]) -> None:
    encoder = T5TextEncoder(CONFIG, t5[0])
    assert encoder.lost("a red circle") == ""
    lost = encoder.lost(TEXTS[2])
    kept = TEXTS[2].removesuffix(lost)
    assert lost
    assert lost in TEXTS[2]
    assert encoder.lost(kept.strip()) == ""
    assert torch.equal(encoder.encode([kept]).y, encoder.encode([TEXTS[2]]).y)


def test_captions_are_cleaned_or_not(t5: tuple[Path, Any]) -> None:
    cleaned = T5TextEncoder(CONFIG, t5[0])
    plain = T5TextEncoder(T5TextConfig(dim=16, max_tokens=24, clean_caption=False), t5[0])
    assert cleaned._read(" A [Red] circle, see https://x.com ") == "a red circle, see"
    assert plain._read(" A [Red] circle, see https://x.com ") == "a [red] circle, see https://x.com"


def test_weights_have_a_name_by_content(t5: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(t5[0], folder)
    first = T5TextEncoder(CONFIG, t5[0]).weights_id
    assert T5TextEncoder(CONFIG, folder).weights_id == first
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert T5TextEncoder(CONFIG, folder).weights_id != first


def test_everything_that_is_missing_is_listed(t5: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(KinemaError, match="needs weights, and no folder"):
        build_text_encoder(CONFIG)
    with pytest.raises(KinemaError, match="this folder is missing"):
        build_text_encoder(CONFIG, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(KinemaError, match="DeepFloyd/t5-v1_1-xxl") as error:
        build_text_encoder(CONFIG, tmp_path / "empty")
    for name in ("config.json", "tokenizer.json or spiece.model", "model.safetensors"):
        assert name in str(error.value)
    write_t5(tmp_path / "shards", weights="bin-sharded")
    (tmp_path / "shards/pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(KinemaError, match="missing: pytorch_model-00002-of-00002"):
        build_text_encoder(CONFIG, tmp_path / "shards")


def test_weights_of_something_else_are_refused(t5: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "t5"
    shutil.copytree(t5[0], folder)
    with pytest.raises(KinemaError, match=r"16 channels \(d_model\), the settings say 32"):
        build_text_encoder(T5TextConfig(dim=32), folder)
    encoder = build_text_encoder(CONFIG, folder)
    state = t5[1].state_dict()
    del state["encoder.embed_tokens.weight"], state["encoder.final_layer_norm.weight"]
    write_weights(folder, state, "safetensors")
    with pytest.raises(KinemaError, match=r"1 \(encoder.final_layer_norm.weight\) missing, 0 unk"):
        encoder.encode(["a"])
    write_weights(folder, state | {"encoder.final_layer_norm.weight": torch.ones(8)}, "safetensors")
    with pytest.raises(KinemaError, match=r"is \(8,\), config.json asks for \(16,\)"):
        encoder.encode(["a"])
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"model_type": "umt5"}))
    with pytest.raises(KinemaError, match="'umt5' model, not T5"):
        build_text_encoder(CONFIG, folder)


class _Trap:
    def __reduce__(self) -> Any:
        return (Path("trap").touch, ())


def test_nothing_in_a_weights_file_is_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_t5(tmp_path / "t5", weights="bin")
    file = tmp_path / "t5/pytorch_model.bin"
    for content in (_Trap(), {"a": _Trap()}):
        file.write_bytes(pickle.dumps(content, protocol=2))
        encoder = T5TextEncoder(CONFIG, tmp_path / "t5")
        with pytest.raises(KinemaError, match="holds more than tensors"):
            encoder.encode(["a"])
    torch.save([1], file)
    with pytest.raises(KinemaError, match="not a table of tensors"):
        encoder.encode(["a"])
    file.write_bytes(b"")
    with pytest.raises(KinemaError, match="pytorch_model"):
        encoder.encode(["a"])
    assert not (tmp_path / "trap").exists()


def test_an_index_may_not_name_files_elsewhere(tmp_path: Path) -> None:
    write_t5(tmp_path / "t5", weights="sharded")
    index = tmp_path / "t5/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"shared.weight": "../secret.safetensors"}}))
    with pytest.raises(KinemaError, match="a file elsewhere"):
        T5TextEncoder(CONFIG, tmp_path / "t5")


@pytest.mark.parametrize("missing", ["transformers", "ftfy", "torchao.quantization"])
def test_a_missing_package_says_what_to_install(
    t5: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name == missing:
            raise ImportError(name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    config = T5TextConfig(dim=16, precision="int8")
    with pytest.raises(KinemaError, match=r"pip install 'kinema\[pretrained\]'"):
        build_text_encoder(config, t5[0]).encode(["a cat"])
