"""`kinema curate` with models: tiny ones of the real kinds, and OCR with its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pa_parquet
import pytest

from kinema.media.write import write_video
from tests.unit.curation.captions.tiny_models import write_llava
from tests.unit.curation.scoring.tiny_models import write_classifier, write_clip_model, write_head

KINEMA = (sys.executable, "-c", "from kinema.cli.main import main; main()")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every stage, and its folder."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    write_clip_model(folder / "clip")
    write_head(folder / "head.safetensors", [12, 8, 1])
    write_classifier(folder / "safe", ["fine", "not fine"])
    write_llava(folder / "llava")
    random = np.random.default_rng(0)
    for number in range(3):
        ground = random.integers(0, 255, (10, 16, 3), np.uint8).repeat(16, 0).repeat(16, 1)
        frames = np.repeat(ground[None], 30, 0)
        for place in range(30):
            frames[place, 40:80, 4 * place : 4 * place + 60] = 255
        write_video(folder / "raw" / f"{number}.mp4", frames, 12)
    run(folder)
    return folder


def run(folder: Path, *more: str) -> dict[str, Any]:
    models = [
        f"aesthetic={{clip: {folder}/clip, head: {folder}/head.safetensors}}",
        f"embed.model={folder}/clip",
        f"match.model={folder}/clip",
        f"nsfw={{model: {folder}/safe, label: not fine}}",
        f"caption={{model: {folder}/llava, prompt: Describe it., max_tokens: 6}}",
        "ocr={}",
        "dedup={concepts: 2, similarity: null}",
        "filter.rules=[]",
    ]
    command = [*KINEMA, "curate", folder / "raw", "-o", folder / "set", *models, *more]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return {"said": done.stdout + done.stderr} | json.loads((folder / "set/run.json").read_text())


def test_every_score_is_a_column(out: Path) -> None:
    table: Any = pa_parquet.read_table(out / "set/manifest.parquet")
    rows = table.to_pylist()
    assert len(rows) == 3
    for row in rows:
        assert np.isfinite(row["aesthetic"])
        assert 0 <= row["nsfw"] <= 1
        assert row["ocr_boxes"] == 0
        assert row["concept"] in (0, 1)
        assert row["concept_rank"] >= 1
    # Random models say nonsense, which is left out with its reason or kept as a caption.
    for row in rows:
        assert row["text"] or row["dropped_by"].startswith("caption") or not row["dropped_by"]
    assert len({row["aesthetic"] for row in rows}) == 3
    assert not [name for name in table.column_names if name.startswith("_")]


def test_nothing_is_worked_out_twice(out: Path) -> None:
    before = pa_parquet.read_table(out / "set/manifest.parquet")
    stages = {s["name"]: s["computed"] for s in run(out, "--workers", "1")["stages"]}
    assert {n for n, count in stages.items() if count} <= {"caption"}
    assert {"aesthetic+embed", "nsfw", "ocr", "cut", "match"} <= set(stages)
    after = pa_parquet.read_table(out / "set/manifest.parquet")
    assert after.equals(before)


def test_another_version_of_a_model_is_asked_again(out: Path) -> None:
    before = pa_parquet.read_table(out / "set/manifest.parquet").column("aesthetic")
    write_head(out / "head.safetensors", [12, 8, 1], seed=1)
    stages = {s["name"]: s["computed"] for s in run(out)["stages"]}
    assert stages["aesthetic+embed"] == 3
    assert stages["cut"] == stages["ocr"] == stages["nsfw"] == 0
    after = pa_parquet.read_table(out / "set/manifest.parquet").column("aesthetic")
    assert after.to_pylist() != before.to_pylist()
