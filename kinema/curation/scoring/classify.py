"""Columns by any image classifier of transformers: `nsfw`, `watermark`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import pyarrow as pa

from kinema.curation.config import ClassifierConfig, FramesConfig
from kinema.curation.scoring.clip_scores import NOT_FINITE, check_same, read_all
from kinema.curation.scoring.model_files import NSFW_EXAMPLE, ModelFiles
from kinema.curation.scoring.strips import STRIP, frame_settings, in_order, time_limit_s
from kinema.curation.stage import Part, Places, Result, Row, Work

CODE = 1
"""Raised when the same files and settings give other scores."""


@dataclass(frozen=True)
class ClassifierStage:
    """The probability of one class, the largest of all frames, as a column of the stage's name.

    Softmax over the classes; a model of one class, or of classes that do not exclude each other
    (`multi_label_classification`), gives the class's own sigmoid.
    """

    name: Literal["nsfw", "watermark"]
    config: ClassifierConfig
    frames: FramesConfig

    @cached_property
    def parts(self) -> Sequence[Part]:
        """
        Raises:
            KinemaError: the model is not there or not complete, or it cannot be downloaded.
        """
        made_by = {
            "code": CODE,
            "model": self._files().fingerprint(),
            "label": self.config.label,
            "frames": frame_settings(self.frames),
        }
        return (Part(self.name, {self.name: pa.float64()}, made_by, STRIP),)

    @property
    def batch(self) -> int:
        return self.config.batch

    @property
    def gpu(self) -> bool:
        return True

    @property
    def threads(self) -> int:
        return 1

    def time_limit_s(self, row: Row) -> float:
        return time_limit_s(row)

    def _files(self) -> ModelFiles:
        return ModelFiles.find(
            self.config.model,
            what="the image classifier",
            key=f"{self.name}.model",
            example=NSFW_EXAMPLE,
            tokenizer=False,
        )

    def open(self, places: Places) -> Work:
        """See `Stage.open`."""
        from kinema.curation.scoring.networks import Classifier, device_for_scores

        files = self._files()
        check_same(files, self.parts[0])
        classifier = Classifier(
            files, device_for_scores(), label=self.config.label, key=f"{self.name}.label"
        )
        parts, name = self.parts, self.name

        def work(rows: Sequence[Row]) -> list[Result]:
            pictures, bad = read_all(rows, places)
            values = classifier.probabilities(list(pictures.values()))
            found: dict[int, Result] = {}
            for i, v in zip(pictures, values, strict=True):
                fine = bool(v.isfinite().all())
                found[i] = {name: {name: round(v.max().item(), 6)} if fine else NOT_FINITE}
            return in_order(rows, found, bad, parts)

        return work
