"""Reading and writing weights: formats, strictness, messages, memory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from kinema.checkpoint.errors import WeightsError
from kinema.checkpoint.known import recognise
from kinema.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from kinema.checkpoint.weights import iterate_tensors, load_weights, save_weights


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2, bias=False)
        self.first.bias.requires_grad_(False)
        self.register_buffer("scale", torch.ones(1))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def meta() -> Net:
    with torch.device("meta"):
        return Net()


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


EVERY_KIND = {
    "f32": torch.randn(3, 5),
    "bf16": torch.randn(7).bfloat16(),
    "f16": torch.randn(2, 2, 2).half(),
    "i64": torch.tensor(5),
    "bool": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
    "strided": torch.randn(4, 6).t(),
    "f8": torch.randn(3).to(torch.float8_e4m3fn),
}


def test_our_files_are_read_by_the_reference_and_back(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    record = write_safetensors(ours, EVERY_KIND, {"format": "pt"})
    read = safetensors.torch.load_file(ours)
    assert read.keys() == EVERY_KIND.keys()
    assert all(_equal(read[k], v) for k, v in EVERY_KIND.items())
    with safetensors.safe_open(ours, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert record.size == ours.stat().st_size
    safetensors.torch.save_file({k: v.contiguous() for k, v in EVERY_KIND.items()}, theirs)
    with SafetensorsFile(theirs) as file:
        assert all(_equal(file.read(k), v) for k, v in EVERY_KIND.items())


def _equal(a: Tensor, b: Tensor) -> bool:
    wide = torch.float32 if b.is_floating_point() else b.dtype
    return a.dtype == b.dtype and torch.equal(a.to(wide), b.to(wide))


def test_equal_tensors_give_equal_files(tmp_path: Path) -> None:
    first = write_safetensors(tmp_path / "a", EVERY_KIND)
    second = write_safetensors(tmp_path / "b", dict(reversed(EVERY_KIND.items())))
    assert first == second
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("kind", ["single", "sharded", "folder", "index", "pth", "bin", "wrapped"])
@pytest.mark.parametrize("target", [net, meta])
def test_every_kind_of_source(kind: str, target: Any, tmp_path: Path) -> None:
    saved, module = net(1), target()
    path = tmp_path / "model.safetensors"
    if kind in ("single", "folder"):
        save_weights(path, saved.state_dict())
    elif kind in ("sharded", "index"):
        assert len(save_weights(path, saved.state_dict(), max_shard_bytes=50)) > 2
        path = tmp_path / "model.safetensors.index.json"
    else:
        path = tmp_path / ("model.bin" if kind == "bin" else "model.pth")
        state = saved.state_dict()
        torch.save({"state_dict": state, "epoch": 3} if kind == "wrapped" else state, path)
    report = load_weights(module, tmp_path if kind in ("folder", "sharded") else path)
    assert same(module, saved)
    assert (len(report.loaded), report.new, report.unexpected) == (4, (), ())
    assert not module.first.bias.requires_grad
    assert module.first.weight.requires_grad
    assert dict(iterate_tensors(path)).keys() == saved.state_dict().keys()


def test_old_torch_format(tmp_path: Path) -> None:
    saved, module = net(1), meta()
    path = tmp_path / "old.pt"
    torch.save(saved.state_dict(), path, _use_new_zipfile_serialization=False)
    load_weights(module, path)
    assert same(module, saved)


@pytest.mark.parametrize("target", [net, meta])
def test_dtype_is_the_modules(target: Any, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_weights(path, net(1).half().state_dict())
    full, other = target(), target().bfloat16()
    load_weights(full, path)
    load_weights(other, path)
    assert full.first.weight.dtype == torch.float32
    assert other.first.weight.dtype == torch.bfloat16


def test_mismatch_lists_everything_and_touches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "wrong.safetensors"
    save_weights(
        path, {"first.weight": torch.zeros(3, 3), "third": torch.zeros(2), "scale": torch.zeros(1)}
    )
    module = net()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(module, path)
    text = str(caught.value)
    assert "wrong.safetensors" in text
    assert "2 tensors missing from the file (first.bias, second.weight)" in text
    assert "1 tensors unknown to the model (third)" in text
    assert "first.weight [3, 3] in the file, [4, 3] here" in text
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_declared_differences_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "part.safetensors"
    state = net(1).state_dict()
    save_weights(path, {"first.weight": state["first.weight"], "old.pos": torch.zeros(7)})
    module = net()
    report = load_weights(
        module, path, allow_new=[r"first\.bias", r"second\..*", "scale"], allow_unexpected=["old.*"]
    )
    assert torch.equal(module.first.weight, state["first.weight"])
    assert set(report.new) == {"first.bias", "second.weight", "scale"}
    assert str(report) == (
        f"{path}: loaded 1 tensors (12 numbers), new 3 tensors (13 numbers), "
        "unexpected 1 tensors (7 numbers)"
    )
    with pytest.raises(WeightsError, match="missing"):
        load_weights(module, path, allow_new=["second"], allow_unexpected=["old.*"])
    with pytest.raises(AssertionError, match="without memory"):
        load_weights(meta(), path, allow_new=[".*"], allow_unexpected=[".*"])


def test_initial_values_for_what_the_file_lacks(tmp_path: Path) -> None:
    """Of a module on the meta device: asked once, for those alone that are not left to others."""
    path, state, module = tmp_path / "part.safetensors", net(1).state_dict(), meta()
    save_weights(path, {"first.weight": state["first.weight"]})
    asked: list[list[str]] = []

    def initial(names: Sequence[str]) -> dict[str, torch.Tensor]:
        asked.append(list(names))
        return {name: net(2).state_dict()[name] for name in names}

    report = load_weights(module, path, allow_new=[".*"], leave={"second.weight"}, initial=initial)
    assert [sorted(names) for names in asked] == [["first.bias", "scale"]]
    assert set(report.new) == {"first.bias", "scale", "second.weight"}
    assert module.second.weight.is_meta
    found, other = module.state_dict(), net(2).state_dict()
    assert torch.equal(found["first.weight"], state["first.weight"])
    assert all(torch.equal(found[name], other[name]) for name in asked[0])
    whole = meta()
    save_weights(path, state)
    load_weights(whole, path, allow_new=[".*"], initial=initial)
    assert len(asked) == 1
    assert same(whole, net(1))


def test_rename(tmp_path: Path) -> None:
    path, saved, module = tmp_path / "r.safetensors", net(1), meta()
    save_weights(path, {f"module.{k}": v for k, v in saved.state_dict().items()})
    load_weights(module, path, rename=lambda name: name.removeprefix("module."))
    assert same(module, saved)


def test_weights_of_another_model_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    save_weights(
        path,
        {
            "spatial_vae.module.encoder.conv_in.weight": torch.zeros(1),
            "temporal_vae.encoder.conv_in.conv.weight": torch.zeros(1),
        },
    )
    with pytest.raises(WeightsError, match=r"looks like video autoencoder \(Open-Sora 1\.2\)"):
        load_weights(net(), path)


@pytest.mark.parametrize(
    ("names", "model"),
    [
        (["spatial_blocks.27.x", "spatial_blocks.0.x", "temporal_blocks.0.x", "fps_embedder.mlp"],
         "STDiT3 (Open-Sora 1.2), depth 28"),
        (["blocks.0.attn_temp.qkv", "fl_embedder.mlp", "t_block_temp.1", "t_block.1"],
         "STDiT2 (Open-Sora 1.1), depth 1"),
        (["blocks.0.attn_temp.qkv", "t_block.1", "pos_embed_temporal"],
         "STDiT (Open-Sora 1.0), depth 1"),
        (["blocks.0.cross_attn.q_linear.weight", "t_block.1"],
         "PixArt (image transformer), depth 1"),
        (["encoder.down_blocks.0.x", "decoder.up_blocks.0.x", "quant_conv.weight"],
         "2D autoencoder (AutoencoderKL)"),
        (["module.double_blocks.0.x", "module.single_blocks.0.x"],
         "MMDiT (Open-Sora 2.0) or FLUX below 'module.', depth 1"),
        (["something.else"], None),
    ],
)  # fmt: skip
def test_recognition(names: list[str], model: str | None) -> None:
    assert recognise(dict.fromkeys(names, torch.Size([1]))) == model


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch evil-ran",)


@pytest.mark.parametrize("old", [False, True])
def test_pickled_code_is_refused(old: bool, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    torch.save({"w": Evil()}, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(WeightsError, match="refused"):
        load_weights(net(), path)
    assert not (tmp_path / "evil-ran").exists()


def broken_files() -> dict[str, bytes]:
    whole = safetensors.torch.save({"a": torch.zeros(100)})
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])

    def with_header(**changes: object) -> bytes:
        text = json.dumps({"a": header["a"] | changes}).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length :]

    return {
        "empty.safetensors": b"",
        "text.safetensors": b"<html>404 not found</html>",
        "cut-header.safetensors": whole[:20],
        "cut-data.safetensors": whole[:-7],
        "lie.safetensors": with_header(shape=[50]),
        "negative.safetensors": with_header(data_offsets=[-400, 0]),
        "kind.safetensors": with_header(dtype="F4"),
        "fraction.safetensors": with_header(shape=[100.0]),
        "deep.safetensors": struct.pack("<Q", 200_000) + b"[" * 200_000,
        "list.safetensors": struct.pack("<Q", 2) + b"[]",
        "empty.pth": b"",
        "text.pth": b"<html>404 not found</html>",
        "bad.safetensors.index.json": b'{"weight_map": [',
        "no-map.safetensors.index.json": b"{}",
        "outside.safetensors.index.json": b'{"weight_map": {"a": "../secret.safetensors"}}',
        "missing.safetensors.index.json": b'{"weight_map": {"a": "gone.safetensors"}}',
        "weights.txt": b"hello",
    }


@pytest.mark.parametrize("name", broken_files())
def test_broken_files_give_one_clear_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(broken_files()[name])
    with pytest.raises(WeightsError) as caught:
        load_weights(net(), path)
    assert name in str(caught.value)


def test_a_page_is_not_called_dangerous(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(b"<html>404 not found</html>")
    with pytest.raises(WeightsError, match="not a PyTorch file"):
        load_weights(net(), path)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    state = net().state_dict()
    path = tmp_path / "q.safetensors"
    save_weights(path, state | {"first.weight": torch.ones(4, 3, dtype=torch.int8)})
    with pytest.raises(WeightsError, match=r"another kind of number \(first.weight torch.int8"):
        load_weights(net(), path)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    torch.save({**net().state_dict(), 1: torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="1 tensors unknown to the model"):
        load_weights(net(), tmp_path / "w.pth")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        load_weights(net(), tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match="no weights under a known name"):
        load_weights(net(), tmp_path)


def test_a_cut_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "cut.pth"
    torch.save(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(WeightsError, match="cut off"):
        load_weights(net(), path)


def test_saving_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": torch.zeros(3)})

    class Unreadable(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            if name == "b":
                raise RuntimeError("the device is lost")
            return super().__getitem__(name)

    with pytest.raises(RuntimeError, match="device is lost"):
        save_weights(path, Unreadable(a=torch.ones(3), b=torch.ones(3)))
    assert os.listdir(tmp_path) == ["w.safetensors"]
    assert torch.equal(dict(iterate_tensors(path))["a"], torch.zeros(3))


LOAD_IN_A_PROCESS = """
import resource, sys, torch
from kinema.checkpoint.weights import load_weights
from kinema.models.build import build_transformer
from kinema.models.config import STDiT3Config
with torch.device("meta"):
    model = build_transformer(STDiT3Config()).half()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = load_weights(model, sys.argv[1])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(report.loaded_parameters, (after - before) * 1024)
"""


def test_full_size_weights_load_within_their_own_size(tmp_path: Path) -> None:
    """STDiT3-XL/2 in half precision as two sparse shards: no second copy of anything in memory."""
    from kinema.models.build import build_transformer
    from kinema.models.config import STDiT3Config

    with torch.device("meta"):
        state = build_transformer(STDiT3Config()).half().state_dict()
    names = list(state)
    weight_map, total = {}, 0
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = tmp_path / f"model-{number}.safetensors"
        total += write_sparse(file, {n: state[n] for n in part})
        weight_map.update(dict.fromkeys(part, file.name))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert total > 2e9
    done = subprocess.run(
        [sys.executable, "-c", LOAD_IN_A_PROCESS, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    parameters, grown = map(int, done.stdout.split())
    assert parameters == sum(t.numel() for t in state.values())
    assert grown <= total + 64 * 2**20, f"{grown / 1e9:.2f} GB for {total / 1e9:.2f} GB of weights"


def write_sparse(path: Path, tensors: dict[str, Tensor]) -> int:
    """A safetensors file whose data is a hole: full size, next to no disk."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        span = [offset, offset + tensor.nbytes]
        dtype = {torch.float16: "F16", torch.float32: "F32"}[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return offset
