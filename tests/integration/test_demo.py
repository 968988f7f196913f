"""The demo's smoke run from an empty folder to the report, through the command line."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kinema.cli.main import main
from kinema.config.errors import KinemaError
from kinema.demo import stages
from kinema.demo.config import DemoConfig
from kinema.demo.run import run_demo
from kinema.media.probe import probe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    result = run_demo(folder, DemoConfig(quick=True))
    assert result.report == folder / "report.html"
    assert result.passed, "a smoke run makes no demands"
    return folder


class Page(HTMLParser):
    """Collects what a page refers to, its text, and whether its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.videos = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.videos += tag == "video"
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "line", "polyline", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("line", "polyline"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_every_stage_leaves_its_result(finished: Path) -> None:
    record = json.loads((finished / "demo.json").read_text())
    assert list(record["stages"]) == [
        "render", "index", "check", "plan", "train the autoencoder", "train the model",
        "generate", "measure", "reconstruct", "overview",
    ]  # fmt: skip
    results = {name: stage["result"] for name, stage in record["stages"].items()}
    assert results["check"] == {"clips": 36, "bad": []}
    assert results["plan"]["samples"] == 36
    assert results["measure"]["ruler"] == 1.0
    videos = [finished / item["path"] for item in results["generate"]["items"]]
    assert len(videos) == 6
    assert all(probe(v).num_frames == 17 and v.with_suffix(".json").exists() for v in videos)
    assert results["train the model"]["steps"] == 4


def test_the_prompts_were_never_trained_on(finished: Path) -> None:
    with (finished / "captions.csv").open(newline="") as file:
        seen = {(r["colour"], r["shape"], r["motion"]) for r in csv.DictReader(file)}
    record = json.loads((finished / "demo.json").read_text())
    asked = {
        (i["colour"], i["shape"], i["motion"])
        for i in record["stages"]["generate"]["result"]["items"]
    }
    assert len(asked) == 6
    assert not asked & seen


def test_the_report_needs_nothing_else(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    page = Page(text)
    assert not page.open
    assert page.videos == 6 + 8
    assert all(link.startswith("data:") for link in page.links)
    assert not re.search(r"https?://|@import|url\(", text)
    words = "".join(page.words)
    assert "smoke run" in words
    assert "Chance is one in 6" in words


def test_a_finished_demo_is_only_reported_again(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("was done already")

    for stage in ("render", "index", "train_vae", "train_model", "generate"):
        monkeypatch.setattr(stages, stage, never)
    before = (finished / "report.html").read_bytes()
    (finished / "report.html").unlink()
    run_demo(finished, DemoConfig(quick=True))
    assert (finished / "report.html").read_bytes() == before


def test_ctrl_c_stops_it_and_the_same_command_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = stages.train

    def interrupted(*arguments: Any, on_step: Any, **options: Any) -> Any:
        def step(number: int, record: Any) -> None:
            on_step(number, record)
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)

        return usual(*arguments, on_step=step, **options)

    folder = tmp_path / "out"
    monkeypatch.setattr(stages, "train", interrupted)
    with pytest.raises(KinemaError, match="same command again") as caught:
        run_demo(folder, DemoConfig(quick=True))
    assert caught.value.exit_code == 130
    monkeypatch.setattr(stages, "train", usual)
    run_demo(folder, DemoConfig(quick=True))
    for name in sorted(p.name for p in (finished / "videos").iterdir() if p.suffix == ".mp4"):
        assert (folder / "videos" / name).read_bytes() == (finished / "videos" / name).read_bytes()


def test_a_failed_demo_exits_non_zero(
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The same results, taken for those of a whole run: they are not good enough."""
    folder = tmp_path / "failed"
    shutil.copytree(finished, folder)
    record = json.loads((folder / "demo.json").read_text())
    record["settings"]["quick"] = False
    record["stages"]["measure"]["result"]["accuracy"] = 0.75
    (folder / "demo.json").write_text(json.dumps(record))
    monkeypatch.setattr("sys.argv", ["kinema", "demo", "--out", str(folder)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "75%" in capsys.readouterr().err
    assert "it has failed" in (folder / "report.html").read_text()


def test_own_videos_take_the_same_path(finished: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for clip in sorted((finished / "clips").iterdir())[:6]:
        shutil.copy(clip, videos)
        (videos / clip.name).with_suffix(".txt").write_text(f"a clip <b>{clip.stem}</b>")
    (videos / "broken.mp4").write_bytes(b"no video")
    folder = tmp_path / "out"
    result = run_demo(folder, DemoConfig(quick=True, videos=str(videos)))
    assert result.accuracy is None
    assert result.passed
    text = result.report.read_text()
    page = Page(text)
    assert not page.open
    assert "a clip <b>00000</b>" in "".join(page.words), "captions are text, not markup"
    assert "broken.mp4" in text
    assert "blurs" in text
