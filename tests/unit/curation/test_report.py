"""The report of a run: its figures are those that a plain count gives, and it is safe to open."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from kinema.config.errors import KinemaError
from kinema.curation import report_numbers as numbers
from kinema.curation.frames import write_strip
from kinema.curation.report import Count, RunSummary, StageSummary, Tokens, write_report
from kinema.curation.report_pictures import Pictures
from kinema.data.tables import write_table

HARM = '<img src=x onerror="alert(1)"></title></code>&amp;<script>alert(2)</script>'
RULES = ("aesthetic >= 4.5", "0.5 > ocr_area", 'duplicate_of == ""')


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    random = np.random.default_rng(5)
    found = []
    for k in range(300):
        row: dict[str, Any] = {
            "id": f"{k:032x}",
            "path": f"clips/{k:02x}/{k}.mp4",
            "text": f"a red fox runs past tree {k}" if k % 4 else f"the video shows {k} cats",
            "num_frames": 48, "height": 64, "width": 64, "fps": 24.0, "duration": 2.0,
            "aesthetic": None if k % 50 == 0 else float(random.normal(5, 0.8)),
            "ocr_area": 0.0 if k % 3 else float(random.random()),
            "duplicate_of": f"{k - 1:032x}" if k % 60 == 7 else "",
            "hash_distance": 2.0 if k % 60 == 7 else None,
            "frames": f"frames/{k:02x}.jpg", "frames_count": 3,
            "dropped_by": "",
        }  # fmt: skip
        if k % 100 == 99:
            row["dropped_by"] = "cut: corrupt"
        elif row["aesthetic"] is None or row["aesthetic"] < 4.5:
            row["dropped_by"] = f"not cut: {RULES[0]}" if k % 2 else f"filter: {RULES[0]}"
        elif row["ocr_area"] >= 0.5:
            row["dropped_by"] = f"filter: {RULES[1]}"
        elif row["duplicate_of"]:
            row["dropped_by"] = f"filter: {RULES[2]}"
        found.append(row)
    return found


@pytest.fixture(params=["parquet", "csv"])
def clips(
    rows: list[dict[str, Any]], tmp_path: Path, request: pytest.FixtureRequest
) -> numbers.ClipTable:
    path = tmp_path / f"manifest.{request.param}"
    write_table(pa.Table.from_pylist(rows), path)
    return numbers.ClipTable.read(path)


def test_the_funnel_counts_each_clip_for_what_took_it(
    clips: numbers.ClipTable, rows: list[dict[str, Any]]
) -> None:
    steps = numbers.funnel(clips, [Count("files given", 9), Count("clips", 300, 0.5)], RULES)
    assert [step.name for step in steps] == ["files given", "clips", "cut: corrupt", *RULES]
    kept = [row for row in rows if not row["dropped_by"]]
    assert steps[-1].rows == len(kept)
    assert steps[-1].hours == pytest.approx(len(kept) * 2 / 3600)
    by_first = [row for row in rows if row["dropped_by"].endswith(RULES[0])]
    assert {row["dropped_by"][:4] for row in by_first} == {"not ", "filt"}
    assert [step.dropped for step in steps[2:4]] == [3, len(by_first)]
    assert steps[3].rows == 300 - 3 - len(by_first)


def test_a_rule_that_drops_nothing_is_shown(clips: numbers.ClipTable) -> None:
    last = numbers.funnel(clips, (), (*RULES, "width >= 2"))[-1]
    assert (last.name, last.dropped, last.rule) == ("width >= 2", 0, True)


def test_histograms_count_kept_and_dropped(
    clips: numbers.ClipTable, rows: list[dict[str, Any]]
) -> None:
    found = numbers.histogram(clips, "aesthetic", RULES)
    known = [row for row in rows if row["aesthetic"] is not None]
    assert found.kept.sum() == sum(not row["dropped_by"] for row in known)
    assert found.dropped.sum() == sum(bool(row["dropped_by"]) for row in known)
    assert found.missing == len(rows) - len(known)
    assert found.quantiles[1] == pytest.approx(np.median([row["aesthetic"] for row in known]))
    assert found.thresholds == ((">=", 4.5),)
    assert numbers.scores(clips)[:2] == ["aesthetic", "ocr_area"]


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("flow >= 0.5 and flow < 20", ((">=", 0.5), ("<", 20.0))),
        ("1e-3 <= flow", ((">=", 1e-3),)),
        ("0.5 <= flow <= 20", (("<=", 20.0), (">=", 0.5))),
        ("flow > -2", ((">", -2.0),)),
        ("overflow > 2 or flow2 > 2 or abs(flow) > 2", ()),
        ("words(text) > 5", ()),
    ],
)
def test_thresholds_of_rules(rule: str, wanted: tuple[tuple[str, float], ...]) -> None:
    assert numbers.thresholds("flow", [rule]) == wanted


def test_bands_hold_every_clip_once_and_samples_of_their_own(clips: numbers.ClipTable) -> None:
    values = clips.numbers["aesthetic"]
    bands = numbers.bands(clips, "aesthetic", seed=3)
    assert len(bands) == 5
    assert sum(band.rows for band in bands) == np.isfinite(values).sum()
    for band in bands:
        assert len(set(band.sample)) == 5
        assert all(band.low <= values[row] <= band.high for row in band.sample)
    assert numbers.bands(clips, "aesthetic", seed=3) == bands
    assert numbers.bands(clips, "aesthetic", seed=4) != bands
    many_zeros = numbers.bands(clips, "ocr_area")
    assert sum(band.rows for band in many_zeros) == 300
    assert len(many_zeros) < 5


def test_words_are_of_kept_captions(
    clips: numbers.ClipTable, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [row["text"] for row in rows if not row["dropped_by"]]
    found = numbers.words(clips)
    assert found is not None
    assert found.captions == found.sampled == sum(found.lengths) == len(kept)
    assert dict(found.frequent)["fox"] == sum("fox" in text for text in kept)
    assert dict(found.beginnings)["a red fox"] == sum("fox" in text for text in kept)
    assert "a" not in dict(found.frequent)
    monkeypatch.setattr(numbers, "SAMPLED_CAPTIONS", 50)
    sampled = numbers.words(clips)
    assert sampled is not None
    assert (sampled.sampled, sampled.captions) == (50, len(kept))


def test_groups_of_duplicates(clips: numbers.ClipTable) -> None:
    total, kept, groups = numbers.groups(clips, "duplicate_of")
    assert (total, kept) == (5, 5)
    for key, members in groups:
        assert members == [int(key, 16) + 1]
    assert numbers.rows_of_ids(clips, [groups[0][0], "gone"]) == {
        groups[0][0]: int(groups[0][0], 16)
    }
    assert numbers.groups(clips, "similar_to") == (0, 0, [])


class Checker(HTMLParser):
    """Raises for what is not closed, and keeps tags, addresses and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(rows: list[dict[str, Any]], tmp_path: Path) -> Path:
    out = tmp_path / "out"
    (out / "frames").mkdir(parents=True)
    for k in range(0, 200, 2):
        shades = [np.full((90, 160, 3), shade, np.uint8) for shade in (0, k, 255)]
        write_strip(out / f"frames/{k:02x}.jpg", shades, 90)
    rows[0]["dropped_by"] = f"filter: {HARM}"
    rows[1]["text"] = rows[2]["path"] = HARM
    write_table(pa.Table.from_pylist(rows), out / "manifest.parquet")
    lines = [{"path": f"{HARM}{k}.mp4", "reason": "corrupt", "message": HARM} for k in range(250)]
    (out / "refused.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    RunSummary(
        started="2026-11-21T18:30:00+00:00",
        wall_s=12.5,
        inputs=[HARM],
        recipe={"filter": {"rules": [HARM]}},
        recipe_name=HARM,
        versions={"kinema": HARM},
        counts=[Count(HARM, 550), Count("clips", 300, 0.1)],
        rules=[*RULES, HARM],
        stages=[
            StageSummary("look", 40, 2, 1, 30.0, 20.0, 1.5, "sources", 2, reasons={HARM: 1}),
            StageSummary(HARM, gpu=True),
        ],
        tokens=[Tokens(HARM, 1234567, 999, 300, 2, 1.5, HARM)],
        machine=HARM,
    ).write(out)
    return out


def test_the_page_is_whole_safe_and_alone(run: Path) -> None:
    place = write_report(run)
    content = Path(place).read_text()
    checker = Checker()
    checker.feed(content)
    assert checker.open == []
    assert "script" not in checker.tags
    assert checker.addresses
    assert all(address.startswith("data:image/jpeg;base64,") for address in checker.addresses)
    assert "onerror=" in checker.text, "what was given is shown, as text"
    for shown in ("1,234,567", "and 50 more in refused.jsonl", "180 h"):
        assert shown in checker.text, shown
    assert len(content) < 5_000_000
    assert write_report(run, seed=0) == place
    assert Path(place).read_text() == content, "the same run gives the same page"
    picture = Image.open(io.BytesIO(base64.b64decode(checker.addresses[0].split(",")[1])))
    assert picture.size == (160, 90)


def test_a_manifest_of_few_columns_has_a_page_too(tmp_path: Path) -> None:
    write_table(pa.table({"path": ["a.mp4"], "height": [2]}), tmp_path / "m.csv")
    summary = RunSummary(started="some time", wall_s=0.0, finished=False)
    place = write_report(tmp_path, summary=summary, manifest=tmp_path / "m.csv", refused=[])
    checker = Checker()
    checker.feed(Path(place).read_text())
    assert checker.open == []
    assert "interrupted" in checker.text


def test_a_summary_is_read_as_it_was_written(tmp_path: Path) -> None:
    summary = RunSummary(
        started="x",
        wall_s=1.5,
        inputs=("a", "b"),
        rules=RULES,
        stages=(StageSummary("cut", 3, reasons={"corrupt": 2}),),
        counts=(Count("clips", 5, 0.25), Count("scenes", 7)),
        tokens=(Tokens("m", 5, 6),),
        recipe={"seed": 0},
    )
    summary.write(tmp_path)
    assert RunSummary.read(str(tmp_path) + "/") == summary
    later = json.loads(summary.to_json()) | {"new": 1}
    assert RunSummary.from_json(json.dumps(later)) == summary
    for text in ("", "[]", "{}", '{"started": "x"}', '{"started": 1, "wall_s": 2, "stages": [3]}'):
        with pytest.raises(KinemaError, match="not a run's summary"):
            RunSummary.from_json(text)
    with pytest.raises(KinemaError, match="not the folder of a curation run"):
        write_report(tmp_path / "other")


def test_pictures_stay_in_the_folder_and_within_the_budget(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "frames").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (3, 90, 160, 3), np.uint8)
    for name in ("out/frames/a.jpg", "out/frames/b.jpg", "outside.jpg"):
        write_strip(tmp_path / name, list(noise), 90)
    pictures = Pictures(str(out))
    assert pictures.of({"frames": "frames/a.jpg", "frames_count": 3}) is not None
    for name in ("../outside.jpg", str(tmp_path / "outside.jpg"), "frames/none.jpg", "", None):
        assert pictures.of({"frames": name, "frames_count": 3}) is None
    assert pictures.of({"frames": "frames/b.jpg", "frames_count": 7}) is None
    one = pictures.of({"frames": "frames/a.jpg", "frames_count": 3})
    assert one is not None
    few = Pictures(str(out), budget=len(one) + 100)
    assert few.of({"frames": "frames/a.jpg", "frames_count": 3}) == one
    assert few.of({"frames": "frames/b.jpg", "frames_count": 3}) is None


def test_a_run_in_a_store(run: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for name in ("manifest.parquet", "run.json", "refused.jsonl", "frames/02.jpg"):
        store.pipe_file(f"/report-run/{name}", (run / name).read_bytes())
    place = write_report("memory://report-run")
    assert place == "memory://report-run/report.html"
    assert store.cat_file("/report-run/report.html").startswith(b"<!doctype html>")
