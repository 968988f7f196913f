"""Classifiers' columns on tiny models: the values of plain transformers code."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kinema.config.errors import KinemaError
from kinema.curation.config import ClassifierConfig, FramesConfig
from kinema.curation.scoring.classify import ClassifierStage
from kinema.curation.stage import Bad, Places, Row
from tests.unit.curation.scoring.tiny_models import SIZE, strip_pictures, write_classifier

FRAMES = FramesConfig()


@torch.no_grad()
def logits(model: Any, places: Places, row: Row) -> torch.Tensor:
    """`[N, C]`; ViT's preprocessing: a square of `SIZE`, bilinear, to -1..1."""
    pixels = [
        np.asarray(p.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) / 127.5 - 1
        for p in strip_pictures(places, row)
    ]
    batch = torch.from_numpy(np.stack(pixels).astype(np.float32)).permute(0, 3, 1, 2)
    found: torch.Tensor = model(batch).logits
    return found


def test_the_largest_probability_of_the_frames(
    models: Any, places: Places, rows: list[Row]
) -> None:
    folder, model = models["classifier"]
    stage = ClassifierStage("nsfw", ClassifierConfig(model=folder, label="NSFW"), FRAMES)
    work = pickle.loads(pickle.dumps(stage)).open(places)
    (Path(places.frames) / "c1.jpg").unlink()
    results = work(rows)
    assert [work([row])[0] for row in rows] == results
    assert isinstance(results[1]["nsfw"], Bad)
    for row, result in zip(rows, results, strict=True):
        if row is rows[1]:
            continue
        want = logits(model, places, row).softmax(1)[:, 1].max().item()
        assert not isinstance(result["nsfw"], Bad)
        assert result["nsfw"]["nsfw"] == pytest.approx(want, abs=1e-5)
    assert stage.parts[0].columns.keys() == {"nsfw"}
    other = ClassifierStage("nsfw", ClassifierConfig(model=folder, label="drawing"), FRAMES)
    assert other.parts[0].key != stage.parts[0].key


def test_classes_that_do_not_exclude_each_other(
    places: Places, rows: list[Row], tmp_path: Path
) -> None:
    model = write_classifier(
        tmp_path / "many", ["logo", "watermark"], problem_type="multi_label_classification"
    )
    config = ClassifierConfig(model=str(tmp_path / "many"), label="watermark")
    (result,) = ClassifierStage("watermark", config, FRAMES).open(places)(rows[:1])
    want = logits(model, places, rows[0]).sigmoid()[:, 1].max().item()
    assert not isinstance(result["watermark"], Bad)
    assert result["watermark"]["watermark"] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"image_processor_type": "ViTFeatureExtractor"},
        {"feature_extractor_type": "ViTFeatureExtractor"},
        {"image_processor_type": "ViTImageProcessorFast"},
    ],
)
def test_preprocessing_as_older_models_spell_it(
    places: Places, rows: list[Row], tmp_path: Path, kind: dict[str, str]
) -> None:
    model = write_classifier(tmp_path / "old", ["normal", "nsfw"])
    settings = {"do_resize": True, "size": SIZE, "resample": 2, "do_normalize": True}
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "old/preprocessor_config.json").write_text(json.dumps(settings | kind))
    config = ClassifierConfig(model=str(tmp_path / "old"), label="nsfw")
    (result,) = ClassifierStage("nsfw", config, FRAMES).open(places)(rows[:1])
    want = logits(model, places, rows[0]).softmax(1)[:, 1].max().item()
    assert not isinstance(result["nsfw"], Bad)
    assert result["nsfw"]["nsfw"] == pytest.approx(want, abs=1e-5)


def test_a_wrong_label_is_answered_with_the_right_ones(models: Any, places: Places) -> None:
    def refused(label: str) -> str:
        config = ClassifierConfig(model=models["classifier"][0], label=label)
        with pytest.raises(KinemaError) as caught:
            ClassifierStage("nsfw", config, FRAMES).open(places)
        return str(caught.value)

    message = refused("nsfw")
    assert "nsfw.label: the classifier has no label 'nsfw'" in message
    assert "try: 'NSFW'; it has: normal, NSFW, drawing" in message
    assert "try: one of: normal, NSFW, drawing" in refused("zzz")


def test_without_transformers(models: Any, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    config = ClassifierConfig(model=models["classifier"][0], label="NSFW")
    with pytest.raises(KinemaError, match=r"pip install 'kinema\[pretrained\]'"):
        ClassifierStage("nsfw", config, FRAMES).open(places)


def test_stages_are_described_without_torch(models: Any) -> None:
    """Parts, keys and all: only `open` loads models."""
    code = f"""
import sys
from kinema.curation.config import *
from kinema.curation.scoring.classify import ClassifierStage
from kinema.curation.scoring.clip_scores import MatchStage, clip_stages
from kinema.curation.scoring.ocr import OcrStage
f, clip = FramesConfig(), {models["clip"][0]!r}
stages = [
    *clip_stages(None, EmbedConfig(model=clip), f), MatchStage(MatchConfig(model=clip), f),
    ClassifierStage("nsfw", ClassifierConfig(model={models["classifier"][0]!r}, label="a"), f),
    OcrStage(OcrConfig(), f),
]
assert len({{p.key for s in stages for p in s.parts}}) == 4
assert not {{"torch", "transformers", "cv2", "rapidocr", "onnxruntime"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
