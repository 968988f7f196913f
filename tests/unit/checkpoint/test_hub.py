"""Weights from a model hub that runs on this machine."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from kinema.checkpoint.errors import HubError
from kinema.checkpoint.hub import in_cache, resolve
from kinema.checkpoint.places import HubFiles, Wanted
from tests.unit.checkpoint.loopback_hub import Hub

pytest.importorskip("huggingface_hub")

MODEL = HubFiles("makers/model", ("model.safetensors",))
VAE = HubFiles("makers/parts", ("vae/weights.safetensors",), elsewhere="https://example.org/vae")
TEXT = HubFiles(
    "makers/text", ("config.json", "pytorch_model.bin.index.json"), optional=("tokens.json", "no")
)


def content(seed: int = 0, size: int = 4000) -> bytes:
    torch.manual_seed(seed)
    return safetensors.torch.save({"a": torch.randn(size)})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: Any) -> Iterator[Hub]:
    hub = Hub()
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    hub.files = {
        "makers/model": {"model.safetensors": content(), "README.md": b"hello"},
        "makers/parts": {"vae/weights.safetensors": content(1)},
        "makers/text": {
            "config.json": b"{}",
            "pytorch_model.bin.index.json": json.dumps(index).encode(),
            "pytorch_model-1.bin": b"one",
            "pytorch_model-2.bin": b"two",
            "tokens.json": b"[]",
        },
        "makers/odd": {"weights-final.safetensors": content(2)},
    }
    hub.older = {"makers/model": {"model.safetensors": content(7)}}
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    # Read from the environment when it was imported, which another test may have done.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub.serving():
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def roles(**given: Any) -> dict[str, Wanted]:
    return {
        "model": Wanted("the transformer", "--ckpt-path", MODEL, given.get("model")),
        "vae": Wanted("the autoencoder", "--vae", VAE, given.get("vae")),
        "text": Wanted("the text encoder", "--text", TEXT, given.get("text"), folder=True),
    }


def test_downloads_once_and_then_needs_no_network(hub: Hub) -> None:
    first = resolve(roles())
    assert first["model"].read_bytes() == hub.files["makers/model"]["model.safetensors"]
    assert first["vae"].read_bytes() == hub.files["makers/parts"]["vae/weights.safetensors"]
    assert {p.name for p in first["text"].iterdir()} == {
        "config.json", "pytorch_model.bin.index.json", "pytorch_model-1.bin",
        "pytorch_model-2.bin", "tokens.json",
    }  # fmt: skip
    downloads = [r for r in hub.requests if r.startswith("GET") and "/resolve/" in r]
    assert len(downloads) == 7

    before = len(hub.requests)
    assert resolve(roles(), offline=True) == first
    assert len(hub.requests) == before, "offline mode asked the hub"

    assert resolve(roles()) == first
    assert len(hub.requests) == before, "asked the hub for what is here"


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_offline_names_all_that_is_missing_at_once(
    how: str, hub: Hub, monkeypatch: Any, tmp_path: Path
) -> None:
    resolve({"vae": roles()["vae"]})
    before = len(hub.requests)
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError) as caught:
        resolve(roles(), offline=how == "flag")
    text = str(caught.value)
    assert "3 files are missing" in text
    assert "the transformer: makers/model: model.safetensors\n    or --ckpt-path PATH" in text
    assert "config.json, pytorch_model.bin.index.json and its shards\n    or --text PATH" in text
    assert "autoencoder" not in text
    assert str(tmp_path / "cache") in text
    assert len(hub.requests) == before


def test_a_missing_shard_counts(hub: Hub) -> None:
    folder = resolve({"text": roles()["text"]})["text"]
    (folder / "pytorch_model-2.bin").unlink()
    assert in_cache(TEXT)["pytorch_model-2.bin"] is None
    with pytest.raises(HubError, match=r"1 file is missing(.|\n)*pytorch_model-2\.bin"):
        resolve(roles(model=__file__, vae=__file__), offline=True)


def test_local_paths_come_first(hub: Hub, tmp_path: Path, monkeypatch: Any) -> None:
    file, folder = tmp_path / "w.pth", tmp_path / "t5"
    file.touch()
    folder.mkdir()
    copy = tmp_path / "parts"
    (copy / "vae").mkdir(parents=True)
    (copy / "vae" / "weights.safetensors").touch()
    found = resolve(roles(model=file, vae=str(copy), text=folder), offline=True)
    assert found == {"model": file, "vae": copy / "vae" / "weights.safetensors", "text": folder}
    assert hub.requests == []
    with pytest.raises(HubError, match="no such file or folder"):
        resolve(roles(model=tmp_path / "gone.pth"), offline=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    for gone in ("./gone.pth", "weights/gone.pth", "weights/video/gone.pth", "weights/gone"):
        with pytest.raises(HubError, match=r"no such file(.|\n)*--vae takes a path, or a name"):
            resolve(roles(vae=gone))


def test_names_of_the_hub(hub: Hub) -> None:
    found = resolve(roles(model="makers/parts/vae/weights.safetensors"))
    assert found["model"].read_bytes() == hub.files["makers/parts"]["vae/weights.safetensors"]
    found = resolve({"model": roles(model="makers/model@v1")["model"]})
    assert found["model"].read_bytes() == hub.older["makers/model"]["model.safetensors"]
    # Without the name of a file, the usual ones are looked for.
    named = Wanted("the autoencoder", "--vae", VAE, "makers/model")
    found = resolve({"vae": named})
    assert found["vae"].name == "model.safetensors"
    assert resolve({"vae": named}, offline=True) == found
    text = Wanted("the text encoder", "--text", VAE, "makers/text", folder=True)
    assert (resolve({"text": text})["text"] / "pytorch_model-1.bin").is_file()
    with pytest.raises(HubError, match=r"usual name(.|\n)*weights-final\.safetensors"):
        resolve({"vae": Wanted("the autoencoder", "--vae", VAE, "makers/odd")})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("makers/modle", "no such path here, and no such repository"),
        ("makers/model/modle.safetensors", r"no such file(.|\n)*did you mean model\.safetensors"),
        ("makers/model@v9", "no revision 'v9'"),
        ("makers/gated", r"accept its terms(.|\n)*accept them on the page of makers/gated"),
        ("makers/private", r"private \(401(.|\n)*hf auth login"),
        ("makers/model/../../etc/passwd", r"outside the repository"),
    ],
)
def test_what_goes_wrong_is_said(given: str, message: str, hub: Hub) -> None:
    hub.gated.add("makers/gated")
    hub.private.add("makers/private")
    if given in ("makers/gated", "makers/private"):
        given += "/model.safetensors"
    with pytest.raises(HubError, match=message) as caught:
        resolve({"model": roles(model=given)["model"]})
    assert "--ckpt-path" in str(caught.value) or "@" in given or "gated" in given or ".." in given


@pytest.fixture
def impatient(monkeypatch: Any) -> None:
    """huggingface_hub waits longer before each attempt; its waiting is not tested here."""
    monkeypatch.setattr(time, "sleep", lambda _: None)


def test_no_network_and_nothing_here(hub: Hub, monkeypatch: Any) -> None:
    def patience(_: float) -> None:
        raise AssertionError("huggingface_hub waits to try again")

    monkeypatch.setattr(time, "sleep", patience)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    for given, what in ((None, "the transformer is not here"), ("a/b/c.pth", "no such path here")):
        with pytest.raises(HubError, match=what) as caught:
            resolve({"model": roles(model=given)["model"]})
        assert "could not be downloaded from http://127.0.0.1:9" in str(caught.value)


@pytest.mark.usefixtures("impatient")
def test_a_download_that_breaks_off_goes_on(hub: Hub) -> None:
    hub.files["makers/model"]["model.safetensors"] = content(size=3_200_000)
    hub.cut = [11_000_000]  # what is received is written in blocks of 10 MB
    found = resolve({"model": roles()["model"]})
    assert found["model"].read_bytes() == hub.files["makers/model"]["model.safetensors"]
    assert [r.startswith("bytes=1") for r in hub.ranges] == [True], "started from the beginning"


@pytest.mark.usefixtures("impatient")
def test_a_truncated_file_is_not_taken(hub: Hub) -> None:
    """A server that promises more than it sends, every time."""
    hub.cut = [100] * 50
    with pytest.raises(HubError, match=r"could not be downloaded(.|\n)*goes on where it stopped"):
        resolve({"model": roles()["model"]})
    assert in_cache(MODEL) == {"model.safetensors": None}
    hub.cut = []
    assert resolve({"model": roles()["model"]})["model"].stat().st_size > 5000


def test_a_full_disk_is_told(hub: Hub, monkeypatch: Any) -> None:
    import huggingface_hub

    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(HubError, match=r"disk is full(.|\n)*HF_HOME"):
        resolve({"model": roles()["model"]})


def test_an_index_that_leads_outside_is_refused(hub: Hub) -> None:
    index = {"weight_map": {"a": "../../secret.bin"}}
    hub.files["makers/text"]["pytorch_model.bin.index.json"] = json.dumps(index).encode()
    with pytest.raises(HubError, match="outside its folder"):
        resolve({"text": roles()["text"]})


WITHOUT = """
import sys
sys.modules["huggingface_hub"] = None
from pathlib import Path
from kinema.checkpoint.hub import resolve
from kinema.checkpoint.places import HubFiles, Wanted
wanted = {"model": Wanted("the transformer", "--ckpt-path", HubFiles("a/b", ("c.safetensors",)))}
for offline in (False, True):
    try:
        resolve(wanted, offline=offline)
    except ValueError as error:
        print(error)
"""


def test_without_the_package(monkeypatch: Any) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True
    )
    online, _, offline = done.stdout.partition("\noffline, and ")
    assert "pip install 'kinema[pretrained]'" in online
    assert offline.startswith("1 file is missing")
