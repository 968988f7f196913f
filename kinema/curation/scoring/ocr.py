"""Text on screen, by RapidOCR: its package carries the models, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kinema.config.errors import KinemaError
from kinema.curation.config import FramesConfig, OcrConfig
from kinema.curation.frames import Picture
from kinema.curation.scoring.clip_scores import read_all
from kinema.curation.scoring.model_files import fingerprint
from kinema.curation.scoring.strips import STRIP, frame_settings, in_order, time_limit_s
from kinema.curation.stage import Part, Places, Result, Row, Work

CODE = 1
"""Raised when the same files and settings give other scores."""
LETTERS = 2
"""Letters and digits that a line has at least: leaves, windows and fur are taken for single ones,
and hardly ever for two."""


@dataclass(frozen=True)
class OcrStage:
    """Columns `ocr_boxes` (lines of text, maximum over frames), `ocr_area` (share of the picture
    that they cover, maximum over frames), `ocr_text` (different lines of all frames, ` | ` between
    them; empty: none)."""

    config: OcrConfig
    frames: FramesConfig

    @property
    def name(self) -> str:
        return "ocr"

    @cached_property
    def parts(self) -> Sequence[Part]:
        """
        Raises:
            KinemaError: RapidOCR is not installed, or without models.
        """
        columns = {"ocr_boxes": pa.int32(), "ocr_area": pa.float64(), "ocr_text": pa.string()}
        made_by = {
            "code": CODE,
            "models": fingerprint(_models()),
            "max_side": self.config.max_side,
            "min_confidence": self.config.min_confidence,
            "letters": LETTERS,
            "frames": frame_settings(self.frames),
        }
        return (Part("ocr", columns, made_by, STRIP),)

    @property
    def batch(self) -> int:
        return self.config.batch

    @property
    def gpu(self) -> bool:
        return False

    @property
    def threads(self) -> int:
        return 1

    def time_limit_s(self, row: Row) -> float:
        return time_limit_s(row)

    def open(self, places: Places) -> Work:
        """See `Stage.open`."""
        reader = TextReader(self.config)
        parts = self.parts

        def work(rows: Sequence[Row]) -> list[Result]:
            pictures, bad = read_all(rows, places)
            found: dict[int, Result] = {
                i: {"ocr": _columns([reader.lines(p) for p in frames], frames)}
                for i, frames in pictures.items()
            }
            return in_order(rows, found, bad, parts)

        return work


@dataclass(frozen=True)
class Line:
    """A line of text on a picture."""

    text: str
    confidence: float
    """0..1."""
    corners: np.ndarray[Any, np.dtype[np.float32]]
    """`[4, 2]`: x and y in pixels, around it."""


class TextReader:
    """RapidOCR with one thread, without its classifier of upside-down lines."""

    def __init__(self, config: OcrConfig) -> None:
        """
        Raises:
            KinemaError: RapidOCR is not installed, or without models.
        """
        detector, recogniser = _models()
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise _missing(error.name or "rapidocr") from None
        self._config = config
        # Places of the models given: otherwise it looks for downloads. By `max` the picture is
        # reduced for the detector; its own setting enlarges pictures, which takes three times as
        # long and finds the same text.
        self._engine: Any = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.use_cls": False,
                "Global.text_score": config.min_confidence,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                "Det.model_path": str(detector),
                "Det.limit_type": "max",
                "Det.limit_side_len": config.max_side,
                "Rec.model_path": str(recogniser),
            }
        )
        blank = np.zeros((64, 256, 3), np.uint8)
        self._engine(blank, use_det=False, use_rec=True)  # loads the recogniser now
        self._engine(blank, use_det=True, use_rec=True)

    def lines(self, picture: Picture) -> list[Line]:
        """Lines of at least `LETTERS` letters and digits and `min_confidence`, from the top.

        Args:
            picture: RGB `[H, W, 3]`.
        """
        found = self._engine(np.ascontiguousarray(picture[:, :, ::-1]))
        if getattr(found, "txts", None) is None or found.boxes is None:
            return []
        return [
            Line(text.strip(), float(score), np.asarray(corners, np.float32))
            for text, score, corners in zip(found.txts, found.scores, found.boxes, strict=True)
            if sum(c.isalnum() for c in text) >= LETTERS
        ]


def _columns(lines: Sequence[Sequence[Line]], frames: Sequence[Picture]) -> dict[str, Any]:
    texts = {line.text.casefold(): line.text for of_frame in reversed(lines) for line in of_frame}
    order = dict.fromkeys(line.text.casefold() for of_frame in lines for line in of_frame)
    areas = [_covered(one, frame.shape[:2]) for one, frame in zip(lines, frames, strict=True)]
    return {
        "ocr_boxes": max(map(len, lines), default=0),
        "ocr_area": round(max(areas, default=0.0), 6),
        "ocr_text": " | ".join(texts[key] for key in order),
    }


def _covered(lines: Sequence[Line], size: Sequence[int]) -> float:
    """Share of a picture of `size` (height, width) inside any of the lines' boxes."""
    import cv2

    mask = np.zeros(tuple(size), np.uint8)
    for line in lines:
        cv2.fillPoly(mask, [np.round(line.corners).astype(np.int32)], (1,))
    return float(mask.mean())


def _models() -> tuple[Path, Path]:
    """The detector and the recogniser in RapidOCR's package.

    Raises:
        KinemaError: it is not installed, or without them.
    """
    found = find_spec("rapidocr")
    if found is None or found.origin is None:
        raise _missing("rapidocr")
    if find_spec("onnxruntime") is None:
        raise _missing("onnxruntime")
    folder = Path(found.origin).parent / "models"
    paths = [sorted(folder.glob(f"*{kind}*.onnx")) for kind in ("det", "rec")]
    if not all(paths):
        raise KinemaError(
            "this RapidOCR came without its models",
            where=str(folder),
            hint="pip install --force-reinstall 'rapidocr>=3.4'",
        )
    return paths[0][0], paths[1][0]


def _missing(package: str) -> KinemaError:
    return KinemaError(
        f"text on screen (ocr) needs {package}, which is not installed",
        hint="pip install 'kinema[curate]', or leave it out with ocr=null",
    )
