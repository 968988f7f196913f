"""Aesthetic scores, embeddings and match on tiny models: the values of plain transformers code."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kinema.config.errors import KinemaError
from kinema.curation.config import AestheticConfig, EmbedConfig, FramesConfig, MatchConfig
from kinema.curation.scoring.clip_scores import ClipStage, MatchStage, clip_stages
from kinema.curation.scoring.model_files import CLIP_L14, ModelFiles
from kinema.curation.stage import Bad, Places, Row, result_key
from tests.unit.checkpoint.loopback_hub import Hub
from tests.unit.curation.scoring.tiny_models import (
    SIZE,
    strip_pictures,
    write_clip_model,
    write_head,
)

FRAMES = FramesConfig()
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    file = tmp_path_factory.mktemp("head") / "sac+logos+ava1.pth"
    return str(file), write_head(file, (12, 10, 8, 6, 4, 1))


def by_hand(picture: Image.Image) -> torch.Tensor:
    """CLIP's preprocessing: shorter side to `SIZE`, middle cut out, normalised. `[3, h, w]`."""
    scale = SIZE / min(picture.size)
    # The longer side is cut off, not rounded.
    wide, high = (SIZE if s == min(picture.size) else int(s * scale) for s in picture.size)
    small = picture.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - SIZE) // 2, (high - SIZE) // 2
    square = small.crop((left, top, left + SIZE, top + SIZE))
    values = (np.asarray(square) / 255.0 - CLIP_MEAN) / CLIP_STD
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)


@torch.no_grad()
def embeddings(model: Any, places: Places, row: Row) -> torch.Tensor:
    pixels = torch.stack([by_hand(p) for p in strip_pictures(places, row)])
    vectors = model.visual_projection(model.vision_model(pixels).pooler_output)
    return vectors / vectors.norm(dim=1, keepdim=True)


def test_aesthetic_and_embedding_are_those_of_plain_code(
    models: Any, head: tuple[str, Any], places: Places, rows: list[Row]
) -> None:
    folder, model = models["clip"]
    stage = ClipStage(
        FRAMES, AestheticConfig(clip=folder, head=head[0]), EmbedConfig(model=folder, batch=4)
    )
    assert (stage.name, [p.name for p in stage.parts]) == (
        "aesthetic+embed", ["aesthetic", "embed"],
    )  # fmt: skip
    results = pickle.loads(pickle.dumps(stage)).open(places)(rows)
    scores = []
    for row, result in zip(rows, results, strict=True):
        want = embeddings(model, places, row)
        with torch.no_grad():
            score = head[1](want).mean().item()
        got = result["aesthetic"]
        assert not isinstance(got, Bad)
        assert got["aesthetic"] == pytest.approx(score, abs=1e-4)
        mean = want.mean(0) / want.mean(0).norm()
        assert not isinstance(result["embed"], Bad)
        np.testing.assert_allclose(result["embed"]["_embedding"], mean, atol=1e-5)
        scores.append(got["aesthetic"])
    assert len(set(scores)) == len(rows)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_match_is_the_cosine_of_caption_and_frames(
    models: Any, places: Places, rows: list[Row], kind: str
) -> None:
    import transformers

    folder, model = models[kind]
    stage = MatchStage(MatchConfig(model=folder), FRAMES)
    one = {"id": "a", "state": "", "text": "x", "height": 40}
    keys = {
        result_key(row, stage.parts[0])
        for row in (one, one | {"text": "y"}, one | {"border_top": 8, "height": 32})
    }
    assert len(keys) == 3
    results = stage.open(places)(rows)
    assert results[3] == {"match": {"match": None}}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    for row, result in zip(rows, results, strict=True):
        if row["text"] is None:
            continue
        tokens = tokenizer(
            [row["text"]],
            padding="max_length",
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        pixels = processor(images=strip_pictures(places, row), return_tensors="pt")
        with torch.no_grad():
            found = model(input_ids=tokens["input_ids"], pixel_values=pixels["pixel_values"])
            # The model's own comparison without its scale (and SigLIP's offset).
            cosine = found.logits_per_text
            cosine = cosine - model.logit_bias if kind == "siglip" else cosine
            want = 100 * (cosine / model.logit_scale.exp()).mean().item()
        assert not isinstance(result["match"], Bad)
        assert result["match"]["match"] == pytest.approx(want, abs=2e-3)


def test_another_caption_gives_another_score_and_what_is_cut_off_none(
    models: Any, places: Places, rows: list[Row]
) -> None:
    work = MatchStage(MatchConfig(model=models["clip"][0]), FRAMES).open(places)
    captions = ["abc", "abd", "abc" * 20, "abc" * 20 + "d", "  "]
    got = [work([rows[0] | {"text": text}])[0]["match"] for text in captions]
    values = [found["match"] for found in got if not isinstance(found, Bad)]
    assert values[0] != values[1]
    assert values[2] == values[3]
    assert values[4] is None


def test_results_do_not_depend_on_the_batch(
    models: Any, head: tuple[str, Any], places: Places, rows: list[Row]
) -> None:
    folder = models["clip"][0]
    both = ClipStage(FRAMES, AestheticConfig(clip=folder, head=head[0]), EmbedConfig(model=folder))
    match = MatchStage(MatchConfig(model=folder), FRAMES)
    for stage in (both, match):
        work = stage.open(places)
        together = work(rows)
        assert [work([row])[0] for row in rows] == together
        assert work(rows[::-1]) == together[::-1]
        assert work([]) == []


def test_chunks_as_on_a_gpu(models: Any, places: Places, rows: list[Row]) -> None:
    """The last chunk is filled up, and every frame comes back to its clip."""
    from kinema.curation.scoring.networks import PairedEncoder

    files = ModelFiles.find(
        models["clip"][0], what="CLIP", key="x", example=CLIP_L14, tokenizer=False
    )
    encoder = PairedEncoder(files, torch.device("cpu"), text=False)
    groups = [[np.asarray(p) for p in strip_pictures(places, row)] for row in rows]
    want = encoder.images(groups)
    assert [len(v) for v in want] == [3, 3, 1, 4, 3]
    shapes = []
    forward = encoder._network.get_image_features

    def watched(pixels: torch.Tensor) -> Any:
        shapes.append(tuple(pixels.shape))
        return forward(pixels)

    encoder._network.get_image_features = watched
    encoder.chunk = 4
    for got, right in zip(encoder.images(groups), want, strict=True):
        torch.testing.assert_close(got, right, atol=1e-6, rtol=1e-5)
    assert shapes == [(4, 3, SIZE, SIZE)] * 4
    assert encoder.images([]) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_precision_on_a_gpu_is_near_the_cpu(
    models: Any, head: tuple[str, Any], places: Places, rows: list[Row]
) -> None:
    folder = models["clip"][0]
    stage = ClipStage(FRAMES, AestheticConfig(clip=folder, head=head[0]), EmbedConfig(model=folder))
    work = stage.open(places)
    together = work(rows)
    assert [work([row])[0] for row in rows] == together
    for row, result in zip(rows, together, strict=True):
        vectors = embeddings(models["clip"][1], places, row)
        assert not isinstance(result["embed"], Bad)
        cosine = (vectors.mean(0) / vectors.mean(0).norm()) @ torch.tensor(
            result["embed"]["_embedding"]
        )
        assert cosine > 0.999


def test_only_what_is_asked_for_is_answered(
    models: Any, head: tuple[str, Any], places: Places, rows: list[Row]
) -> None:
    folder = models["clip"][0]
    aesthetic, embed = AestheticConfig(clip=folder, head=head[0]), EmbedConfig(model=folder)
    (both,) = clip_stages(aesthetic, embed, FRAMES)
    found = both.open(places)([rows[0] | {"todo": ["embed"]}, rows[1] | {"todo": ["aesthetic"]}])
    assert [set(r) for r in found] == [{"embed"}, {"aesthetic"}]
    # Kept under the same key whether or not the other part is asked for.
    alone = [*clip_stages(aesthetic, None, FRAMES), *clip_stages(None, embed, FRAMES)]
    assert [s.parts[0].key for s in alone] == [p.key for p in both.parts]
    assert [s.name for s in alone] == ["aesthetic", "embed"]
    assert clip_stages(None, None, FRAMES) == []
    apart = clip_stages(aesthetic, EmbedConfig(model=models["siglip"][0]), FRAMES)
    assert [s.name for s in apart] == ["aesthetic", "embed"]
    with pytest.raises(ValueError, match="same model"):
        ClipStage(FRAMES, aesthetic, EmbedConfig(model="other"))


def test_preprocessing_as_the_published_clip_spells_it(
    models: Any, places: Places, rows: list[Row], tmp_path: Path
) -> None:
    """`preprocessor_config.json` of openai/clip-vit-large-patch14 names no image processor."""
    folder = tmp_path / "clip"
    shutil.copytree(models["clip"][0], folder)
    settings = {
        "crop_size": SIZE, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD, "resample": 3, "size": SIZE,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (result,) = ClipStage(FRAMES, embed=EmbedConfig(model=str(folder))).open(places)(rows[1:2])
    want = embeddings(models["clip"][1], places, rows[1]).mean(0)
    assert not isinstance(result["embed"], Bad)
    np.testing.assert_allclose(result["embed"]["_embedding"], want / want.norm(), atol=1e-5)


def test_embeddings_of_siglip(models: Any, places: Places, rows: list[Row]) -> None:
    folder, model = models["siglip"]
    (stage,) = clip_stages(None, EmbedConfig(model=folder), FRAMES)
    (result,) = stage.open(places)(rows[:1])
    assert not isinstance(result["embed"], Bad)
    pixels = [
        (np.asarray(p.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) / 127.5 - 1)
        for p in strip_pictures(places, rows[0])
    ]
    batch = torch.from_numpy(np.stack(pixels).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.no_grad():
        vectors = model.vision_model(batch).pooler_output
    mean = (vectors / vectors.norm(dim=1, keepdim=True)).mean(0)
    np.testing.assert_allclose(result["embed"]["_embedding"], mean / mean.norm(), atol=1e-5)


def test_a_bad_strip_costs_its_own_row(models: Any, places: Places, rows: list[Row]) -> None:
    good = clip_stages(None, EmbedConfig(model=models["clip"][0]), FRAMES)[0].open(places)
    (Path(places.frames) / "c1.jpg").write_bytes(b"\xff\xd8 no picture")
    (Path(places.frames) / "c2.jpg").unlink()
    rows[3]["frames"] = None
    found = good(rows)
    assert [isinstance(r["embed"], Bad) for r in found] == [False, True, True, True, False]
    bad = [r["embed"] for r in found if isinstance(r["embed"], Bad)]
    assert [b.reason for b in bad] == ["bad_strip", "bad_strip", "no_frames"]
    assert bad[0].message.startswith("frames/c1.jpg: ")
    assert bad[1].message.startswith("frames/c2.jpg: ")
    # A strip that is written anew is looked at again.
    assert all(b.passing for b in bad)


def test_a_model_is_known_by_its_content(models: Any, tmp_path: Path) -> None:
    folder = Path(models["clip"][0])
    shutil.copytree(folder, tmp_path / "copy")
    write_clip_model(tmp_path / "other", seed=1)

    def key(model: Path, frames: FramesConfig = FRAMES) -> str:
        return clip_stages(None, EmbedConfig(model=str(model)), frames)[0].parts[0].key

    assert key(folder) == key(tmp_path / "copy")
    assert len({key(folder), key(tmp_path / "other"), key(folder, FramesConfig(count=2))}) == 3
    stage = MatchStage(MatchConfig(model=str(tmp_path / "copy")), FRAMES)
    before = stage.parts[0].key
    # Other words for the same weights.
    (tmp_path / "copy/merges.txt").write_text("#version: 0.2\na b\n")
    stage = MatchStage(MatchConfig(model=str(tmp_path / "copy")), FRAMES)
    assert stage.parts[0].key != before
    assert key(folder) == key(tmp_path / "copy")
    shutil.copy(tmp_path / "other/model.safetensors", tmp_path / "copy")
    with pytest.raises(KinemaError, match="other files than those that the run was started with"):
        stage.open(Places.below(str(tmp_path)))


def test_incomplete_models_are_named(
    models: Any, head: tuple[str, Any], places: Places, tmp_path: Path
) -> None:
    def refused(model: Path | str) -> str:
        with pytest.raises(KinemaError) as caught:
            MatchStage(MatchConfig(model=str(model)), FRAMES).open(places)
        return str(caught.value)

    copy = tmp_path / "clip"
    shutil.copytree(models["clip"][0], copy)
    state = load_file(copy / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    assert "1 missing" in refused(copy)
    (copy / "model.safetensors").write_bytes(b"12345678")
    assert f"{copy}: the weights cannot be read" in refused(copy)
    (copy / "model.safetensors").unlink()
    assert "the CLIP model is not complete; missing: model.safetensors or" in refused(copy)
    (copy / "preprocessor_config.json").unlink()
    (copy / "merges.txt").unlink()
    message = refused(copy)
    assert "missing: preprocessor_config.json, tokenizer.json or vocab.json" in message
    assert "no such file or folder (the CLIP model)" in refused(tmp_path / "nothing")
    assert "describes a 'vit' model" in refused(_with_tokenizer(models, tmp_path / "vit"))


def test_values_that_are_no_numbers_are_no_scores(
    models: Any, head: tuple[str, Any], places: Places, rows: list[Row], tmp_path: Path
) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(models["clip"][0], folder)
    state = load_file(folder / "model.safetensors")
    state["visual_projection.weight"][0, 0] = torch.inf
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    place = str(folder)
    both = ClipStage(FRAMES, AestheticConfig(clip=place, head=head[0]), EmbedConfig(model=place))
    for stage in (both, MatchStage(MatchConfig(model=place), FRAMES)):
        (result,) = stage.open(places)(rows[:1])
        for found in result.values():
            assert isinstance(found, Bad)
            assert found.reason == "not_finite"


def test_pytorch_files_are_read_as_tensors_only(
    models: Any, places: Places, rows: list[Row], tmp_path: Path
) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(models["clip"][0], folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    shards = {"one.bin": names[::2], "two.bin": names[1::2]}
    for shard, some in shards.items():
        torch.save({name: state[name] for name in some}, folder / shard)
    where = {name: shard for shard, some in shards.items() for name in some}
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )

    def found(place: str) -> Any:
        return ClipStage(FRAMES, embed=EmbedConfig(model=place)).open(places)(rows[:2])

    assert found(str(folder)) == found(models["clip"][0])
    torch.save({"weight": Path}, folder / "two.bin")
    with pytest.raises(KinemaError, match="the weights cannot be read"):
        found(str(folder))
    (folder / "two.bin").unlink()
    with pytest.raises(KinemaError, match=r"missing: two\.bin"):
        found(str(folder))


def _with_tokenizer(models: Any, folder: Path) -> Path:
    shutil.copytree(models["classifier"][0], folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(Path(models["clip"][0]) / name, folder)
    return folder


def test_hub_names_offline(
    models: Any, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name of the hub is looked up in its cache; what is not there is named, not asked for."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = AestheticConfig()
    with pytest.raises(KinemaError, match="offline, and 5 files are missing") as caught:
        assert ClipStage(FRAMES, config).parts
    assert "openai/clip-vit-large-patch14: model.safetensors" in str(caught.value)

    cached = tmp_path / "models--openai--clip-vit-large-patch14"
    shutil.copytree(models["clip"][0], cached / "snapshots/0123")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0123")
    with pytest.raises(KinemaError, match="the aesthetic predictor") as caught:
        assert ClipStage(FRAMES, config).parts
    assert "improved-aesthetic-predictor: sac+logos+ava1-l14-linearMSE.pth" in str(caught.value)
    cached = tmp_path / "models--camenduru--improved-aesthetic-predictor"
    (cached / "snapshots/4567").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("4567")
    write_head(cached / "snapshots/4567/sac+logos+ava1-l14-linearMSE.pth", (12, 4, 1))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    # All is here: nothing is asked of the hub, which this machine does not reach.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    ClipStage(FRAMES, config).open(places)


def test_downloads_bring_what_images_need(
    models: Any, places: Places, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository under its own name: weights, settings and tokenizer, from a hub on loopback."""
    hub = Hub()
    files = {p.name: p.read_bytes() for p in Path(models["clip"][0]).iterdir()}
    hub.files = {"makers/small-clip": files | {"README.md": b"hello"}}
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    named = MatchStage(MatchConfig(model="makers/small-clip"), FRAMES)
    local = MatchStage(MatchConfig(model=models["clip"][0]), FRAMES)
    with hub.serving():
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        # The same files, so the same results.
        assert named.parts[0].key == local.parts[0].key
        asked = len(hub.requests)
        found = named.open(places)(rows)
        assert len(hub.requests) == asked
    assert found == local.open(places)(rows)


def test_the_predictor_has_to_fit(
    models: Any, places: Places, rows: list[Row], tmp_path: Path
) -> None:
    def refused(file: Path) -> str:
        stage = ClipStage(FRAMES, AestheticConfig(clip=models["clip"][0], head=str(file)))
        with pytest.raises(KinemaError) as caught:
            stage.open(places)
        return str(caught.value)

    file = tmp_path / "head.pth"
    write_head(file, (768, 4, 1))
    assert "takes embeddings of 768 channels, this CLIP gives 12" in refused(file)
    torch.save({"weight": torch.zeros(2, 12), "bias": torch.zeros(2)}, file)
    assert "its linear layers (2x12) do not lead to one value" in refused(file)
    torch.save({"other": torch.zeros(2)}, file)
    assert "is not an aesthetic predictor: it holds 'other'" in refused(file)
    torch.save({"weight": Path}, file)
    assert "holds more than tensors" in refused(file)
    file.write_bytes(b"PK\x03\x04 no more")
    assert "is damaged" in refused(file)


def test_the_older_predictor_and_safetensors(
    models: Any, places: Places, rows: list[Row], tmp_path: Path
) -> None:
    folder, model = models["clip"]
    want = embeddings(model, places, rows[0])
    weight, bias = torch.randn(1, 12), torch.randn(1)
    torch.save({"weight": weight, "bias": bias}, tmp_path / "linear.pth")
    network = write_head(tmp_path / "head.safetensors", (12, 4, 1))
    for file, score in (
        ("linear.pth", (want @ weight[0]).mean() + bias[0]),
        ("head.safetensors", network(want).mean()),
    ):
        stage = ClipStage(FRAMES, AestheticConfig(clip=folder, head=str(tmp_path / file)))
        (found,) = stage.open(places)(rows[:1])
        assert not isinstance(found["aesthetic"], Bad)
        assert found["aesthetic"]["aesthetic"] == pytest.approx(score.item(), abs=1e-4)
