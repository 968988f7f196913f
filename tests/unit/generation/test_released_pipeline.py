"""Pipelines of released models by name, from files in the forms that others publish."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kinema.checkpoint.places import HubFiles
from kinema.checkpoint.weights import save_weights
from kinema.config.errors import KinemaError
from kinema.generation import released
from kinema.generation.pipeline import Pipeline
from kinema.generation.released import Released
from tests.unit.generation.tiny import prompts_of, tiny_config, tiny_parts

FAMILIES = ("stdit2", "dit")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A family with a tiny model in the table, and its files: a `.pth` as trainers save it, and
    safetensors."""
    name = str(request.param)
    config = tiny_config(name)
    nowhere = HubFiles("nobody/nothing", ("model.safetensors",))
    tiny = Released(f"tiny-{name}", "1.1", "tiny", config, nowhere, nowhere, None, trained=())
    monkeypatch.setattr(released, "RELEASED", (*released.RELEASED, tiny))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    parts = tiny_parts(config)
    state = parts.model.state_dict() | parts.model.recomputed_tensors()
    wrapped = {f"module.{key}": tensor for key, tensor in state.items()}
    torch.save({"state_dict": wrapped}, tmp_path / "model.pth")
    save_weights(tmp_path / "vae.safetensors", parts.vae.state_dict())
    return name


@pytest.mark.parametrize("offload", ["none", "layers"])
def test_a_name_and_files_make_a_pipeline(family: str, offload: str, tmp_path: Path) -> None:
    pipeline = Pipeline.from_pretrained(
        f"tiny-{family}",
        model=tmp_path / "model.pth",
        vae=tmp_path / "vae.safetensors",
        offline=True,
        offload=offload,
        device="cpu",
    )
    clip = pipeline.generate(prompts_of(family)[0], seed=1)
    assert clip.record["pipeline"]["model"] == f"tiny-{family}"
    assert len(clip.record["pipeline"]["weights_sha256"]) == 64
    config = tiny_config(family)
    by_hand = Pipeline(config, tiny_parts(config), device="cpu").generate(
        clip.request.prompt, seed=1
    )
    assert (clip.frames == by_hand.frames).all()


def test_all_that_is_missing_is_named_at_once(family: str) -> None:
    with pytest.raises(KinemaError) as caught:
        Pipeline.from_pretrained(f"tiny-{family}", offline=True)
    assert "the transformer" in str(caught.value)
    assert "the autoencoder" in str(caught.value)


def test_other_names_are_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(KinemaError, match=r"did you mean opensora-1\.2"):
        Pipeline.from_pretrained("opensora-1,2")
    with pytest.raises(KinemaError, match="no such folder"):
        Pipeline.from_pretrained(tmp_path / "nothing")
    with pytest.raises(KinemaError, match="has its own weights"):
        Pipeline.from_pretrained(tmp_path, model=tmp_path / "model.pth")
    with pytest.raises(KinemaError, match="these weights do not fit"):
        Pipeline.from_pretrained(
            f"tiny-{family}",
            model=tmp_path / "vae.safetensors",
            vae=tmp_path / "vae.safetensors",
        ).generate(prompts_of(family)[0])


def test_nothing_is_downloaded_for_a_request_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(KinemaError, match=r"gone\.pth: no such file or folder"):
        Pipeline.from_pretrained("dit-xl2-256", vae="./gone.pth", device="cpu")
    pipeline = Pipeline.from_pretrained("dit-xl2-256", device="cpu")
    with pytest.raises(KinemaError, match="class 1000 is out of range"):
        pipeline.request("1000")
    fine = pipeline.request("999")
    with pytest.raises(KinemaError, match="could not be downloaded"):
        next(pipeline.generate_all([fine]))
