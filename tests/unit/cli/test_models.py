"""`kinema models`: the list, one of it, and what a file is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kinema.checkpoint.convert import convert
from kinema.checkpoint.run import save_checkpoint
from kinema.checkpoint.weights import save_weights
from kinema.cli.main import app
from kinema.config.errors import KinemaError
from kinema.config.settings import to_dict
from kinema.generation.released import RELEASED
from tests.unit.checkpoint.tiny_networks import CONFIGS, network


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["models", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: Any) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(cache: Path, repository: str, *names: str) -> None:
    """Files in the cache, as huggingface_hub lays them out."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    commit = "0" * 40
    for name in names:
        file = folder / "snapshots" / commit / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)


def test_the_list(cache: Path) -> None:
    put(cache, "stabilityai/sd-vae-ft-ema", "diffusion_pytorch_model.safetensors")
    put(cache, "maxin-cn/Latte", "ucf101.pt")
    lines = run().stdout.splitlines()
    rows = {line.split()[0]: line for line in lines[1:-2]}
    assert list(rows) == [r.name for r in RELEASED]
    assert "1,208M" in rows["opensora-1.2"]
    assert "144p to 2048: image, 51 to 408" in rows["opensora-1.2"]
    assert rows["opensora-1.2"].count("480p 408; 720p 204, 408") == 2
    assert rows["opensora-1.2"].endswith("  hpcai-tech/OpenSora-STDiT-v3 and vae, text")
    assert rows["opensora-1.1"].endswith("  hpcai-tech/OpenSora-STDiT-v2-stage3 and text")
    assert rows["latte-xl2-ucf101"].endswith("  all here")
    assert "classes 0-999" in rows["dit-xl2-256"]
    assert "Open-Sora 2.0 follows" in lines[-1]


def test_one_of_them(cache: Path) -> None:
    put(cache, "hpcai-tech/OpenSora-VAE-v1.2", "model.safetensors")
    text = run("opensora-1.2").stdout
    assert "1,207,643,972 parameters" in text
    assert "video, 8x8x4, 393,341,007 parameters" in text
    assert "rectified flow, 30 steps, guidance 7" in text
    trained, rest = text.split("only extrapolates to:")
    beyond, several = rest.split("wants several GPUs of 80 GB in the original:")
    assert "480p   (848x480)  image, 51, 102, 204\n" in trained
    for part in (beyond, several.split("weights:")[0]):
        assert part.split() == ["480p", "(848x480)", "408", "720p", "(1280x720)", "204,", "408"]
    assert "hpcai-tech/OpenSora-STDiT-v3\n           model.safetensors: not here" in text
    assert str(cache / "models--hpcai-tech--OpenSora-VAE-v1.2") in text
    assert "dl.fbaipublicfiles.com" in run("dit-xl2-256").stdout
    with pytest.raises(KinemaError, match=r"did you mean opensora-1\.2"):
        run("opensora-1.3")
    with pytest.raises(KinemaError, match="two things"):
        run("opensora-1.2", "--check", "x")


def test_json(cache: Path) -> None:
    rows = json.loads(run("--json").stdout)
    assert [row["name"] for row in rows] == [r.name for r in RELEASED]
    one = json.loads(run("opensora-1.1", "--json").stdout)
    assert one["sampling"] == {"process": "iddpm", "steps": 100, "cfg_scale": 7.0}
    assert one["weights"]["text"]["repository"] == "DeepFloyd/t5-v1_1-xxl"
    assert {"resolution": "480p", "frames": [128]} in one["extrapolates"]


def test_check_of_what_fits(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", network("pixart").state_dict())
    convert(tmp_path / "w.safetensors", tmp_path / "p", "original", config=CONFIGS["pixart"])
    result = run("--check", str(tmp_path / "p" / "model.pth"))
    assert result.exit_code == 0
    assert "PixArt-alpha, depth 2, hidden size 24, 6 text tokens" in result.stdout
    assert "leaves    1 tables that are computed here" in result.stdout
    assert "fits      all" in result.stdout
    convert(tmp_path / "w.safetensors", tmp_path / "d", "diffusers", config=CONFIGS["pixart"])
    assert "layout of diffusers" in run("--check", str(tmp_path / "d")).stdout


def test_check_of_what_does_not(tmp_path: Path) -> None:
    state = network("stdit3").state_dict()
    for i in range(2):
        del state[f"spatial_blocks.{i}.mlp.fc1.bias"]
    state["strange"] = torch.zeros(2)
    state["temporal_blocks.0.attn.proj.bias"] = torch.zeros(3)
    save_weights(tmp_path / "w.safetensors", state)
    result = run("--check", str(tmp_path / "w.safetensors"))
    assert result.exit_code == 1
    assert "missing   2: spatial_blocks.0.mlp.fc1.bias, spatial_blocks.1" in result.stdout
    assert "unknown   1: strange" in result.stdout
    assert "wrong     1: temporal_blocks.0.attn.proj.bias [3] in the file, [24] here" in (
        result.stdout
    )
    assert "DOES NOT FIT" in result.stdout
    (facts,) = json.loads(run("--check", str(tmp_path / "w.safetensors"), "--json").stdout)
    assert facts["fits"] is False
    assert len(facts["missing"]) == 2

    save_weights(tmp_path / "o.safetensors", {"a": torch.zeros(1)})
    result = run("--check", str(tmp_path / "o.safetensors"))
    assert (result.exit_code, "no network that is known" in result.stdout) == (1, True)
    with pytest.raises(KinemaError, match="no such file"):
        run("--check", str(tmp_path / "gone.pth"))


def test_check_of_a_checkpoint_of_ours(tmp_path: Path) -> None:
    state = network("latte").state_dict()
    components = {"model": to_dict(CONFIGS["latte"])}
    folder = save_checkpoint(
        tmp_path, 0, 1, model=state, ema=state, state={}, components=components
    ).path
    result = run("--check", str(folder))
    assert result.exit_code == 0
    assert "(model): Latte, depth 2" in result.stdout
    assert "(ema): Latte, depth 2" in result.stdout


def test_released_sizes_are_named(tmp_path: Path) -> None:
    """A file of DiT-XL/2's shapes (a hole of the right size) is told to be DiT-XL/2."""
    from kinema.models.build import build_transformer
    from tests.unit.checkpoint.test_weights import write_sparse

    config = next(r for r in RELEASED if r.name == "dit-xl2-256").config.model
    with torch.device("meta"):
        model = build_transformer(config)
    state = model.state_dict() | {"pos_embed": torch.empty(1, 256, 1152, device="meta")}
    write_sparse(tmp_path / "dit.safetensors", {n: t.half() for n, t in state.items()})
    result = run("--check", str(tmp_path / "dit.safetensors"))
    assert result.exit_code == 0
    assert "is as     dit-xl2-256\n" in result.stdout


def test_a_terminal_gets_a_drawn_table(monkeypatch: Any, capsys: Any) -> None:
    import sys

    from kinema.cli.models import _table

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    _table(("name", "of"), [("opensora-1.2", "1.2")])
    text = capsys.readouterr().out
    assert "opensora-1.2" in text
    assert "│" in text or "|" in text
