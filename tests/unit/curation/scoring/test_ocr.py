"""Text on screen, read by RapidOCR's own models: drawn lines, and titles of a real film."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from kinema.config.errors import KinemaError
from kinema.curation.config import FramesConfig, OcrConfig
from kinema.curation.scoring.ocr import OcrStage, TextReader
from kinema.curation.stage import Bad, Places, Row, Work
from tests.unit.curation.scoring.tiny_models import drawn, write_strip

STAGE = OcrStage(OcrConfig(), FramesConfig())
TITLES = Path(__file__).parents[3] / "golden/curation/bbb_titles.jpg"


@pytest.fixture(scope="module")
def ocr_places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    places = Places.below(str(tmp_path_factory.mktemp("ocr")))
    Path(places.frames).mkdir()
    return places


@pytest.fixture(scope="module")
def work(ocr_places: Places) -> Work:
    return STAGE.open(ocr_places)


def card(*lines: str, size: tuple[int, int] = (640, 360)) -> np.ndarray[Any, Any]:
    """White lines, 40 pixels high, on dark blue."""
    picture = Image.new("RGB", size, (20, 20, 60))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(40)
    for i, line in enumerate(lines):
        draw.text((60, 60 + 90 * i), line, fill="white", font=font)
    return np.asarray(picture)


def found(work: Work, row: Row) -> dict[str, Any]:
    (result,) = work([row])
    assert not isinstance(result["ocr"], Bad)
    return dict(result["ocr"])


def test_lines_are_read_and_measured(work: Work, ocr_places: Places) -> None:
    plain = np.full((360, 640, 3), 90, np.uint8)
    frames = [plain, card("NEVER GIVE UP"), card("Never give up", "Chapter 42")]
    got = found(work, write_strip(ocr_places, "lines", frames))
    assert got["ocr_boxes"] == 2
    assert got["ocr_text"] == "NEVER GIVE UP | Chapter 42"
    # About 275 x 40 and 210 x 40 pixels of 640 x 360, and the room that the detector leaves.
    assert 0.07 < got["ocr_area"] < 0.14


def test_no_text_and_single_letters_are_none(work: Work, ocr_places: Places) -> None:
    frames = [card("X"), *drawn(0, 1, (360, 640))]
    got = found(work, write_strip(ocr_places, "none", frames))
    assert got == {"ocr_boxes": 0, "ocr_area": 0.0, "ocr_text": ""}


def test_titles_of_a_real_film(work: Work, ocr_places: Places) -> None:
    shutil.copy(TITLES, Path(ocr_places.frames) / "bbb.jpg")
    row = {"id": "bbb", "state": "", "frames": "frames/bbb.jpg", "frames_count": 3}
    lines = found(work, row)["ocr_text"].split(" | ")
    assert lines[:2] == ["THE PEACH OPEN MOVIE PROJECT", "PRESENTS"]
    # The third frame's is drawn, with a butterfly on it: part of it is read.
    assert lines[2].startswith("BU")


def test_results_do_not_depend_on_the_batch_and_bad_strips_cost_their_row(
    work: Work, ocr_places: Places
) -> None:
    rows = [
        write_strip(ocr_places, "a", [card("first line")]),
        {"id": "gone", "state": "", "frames": "gone.jpg", "frames_count": 3},
        write_strip(ocr_places, "tiny", drawn(1, 2, (6, 4))),
        write_strip(ocr_places, "wide", [card("wide", size=(900, 20))]),
    ]
    together = work(rows)
    assert [work([row])[0] for row in rows] == together
    assert [isinstance(r["ocr"], Bad) for r in together] == [False, True, False, False]
    first = together[0]["ocr"]
    assert not isinstance(first, Bad)
    assert first["ocr_text"] == "first line"


def test_settings_and_models_name_the_results() -> None:
    other = OcrStage(OcrConfig(min_confidence=0.9), FramesConfig())
    assert STAGE.parts[0].key != other.parts[0].key
    assert STAGE.parts[0].key == OcrStage(OcrConfig(batch=9), FramesConfig()).parts[0].key
    assert not STAGE.gpu


def test_confidence_decides(ocr_places: Places) -> None:
    row = write_strip(ocr_places, "sure", [card("certainly")])
    strict = OcrStage(OcrConfig(min_confidence=1.0), FramesConfig()).open(ocr_places)
    assert found(strict, row)["ocr_boxes"] == 0


@pytest.mark.parametrize(("max_side", "seen"), [(320, (192, 320)), (736, (352, 640))])
def test_what_the_detector_sees(
    monkeypatch: pytest.MonkeyPatch, max_side: int, seen: tuple[int, int]
) -> None:
    """Reduced to `max_side`, never enlarged (in steps of 32); colours in OpenCV's order."""
    from rapidocr.ch_ppocr_det import TextDetector

    reader = TextReader(OcrConfig(max_side=max_side))
    inputs: list[Any] = []
    session = reader._engine.text_det.session

    def watched(pixels: Any) -> Any:
        inputs.append(pixels)
        return session(pixels)

    assert isinstance(reader._engine.text_det, TextDetector)
    monkeypatch.setattr(reader._engine.text_det, "session", watched)
    reader.lines(np.full((360, 640, 3), (255, 0, 0), np.uint8))
    assert inputs[0].shape == (1, 3, *seen)
    # Red comes last; -1 is nothing of a colour, 1 all.
    np.testing.assert_allclose(inputs[0].mean((0, 2, 3)), (-1, -1, 1), atol=1e-5)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(KinemaError, match=r"pip install 'kinema\[curate\]'"):
        OcrStage(OcrConfig(), FramesConfig()).open(Places.below("x"))
