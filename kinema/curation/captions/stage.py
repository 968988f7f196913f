"""The stage that writes captions, by an endpoint or by a model here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kinema.checkpoint.places import HubFiles
from kinema.config.errors import KinemaError
from kinema.curation.captions import clean
from kinema.curation.captions.answers import Caption, Use, as_columns, columns_of
from kinema.curation.captions.cost import keeps
from kinema.curation.captions.prompts import columns, template_of
from kinema.curation.config import CaptionConfig, FramesConfig
from kinema.curation.cut import BORDERS
from kinema.curation.scoring.model_files import ModelFiles, fingerprint
from kinema.curation.scoring.strips import Picture, frame_settings, read_frames
from kinema.curation.stage import Bad, Found, Part, Places, Result, Row, Work
from kinema.endpoint.chat import LONGEST_WAIT_S

CODE = 1
"""Raised when the same answers give other captions; cleaning has a number of its own."""
EXAMPLE = HubFiles(
    "Qwen/Qwen2.5-VL-7B-Instruct",
    (
        "model.safetensors.index.json",
        "config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ),
    ("chat_template.json", "chat_template.jinja", "generation_config.json"),
)
BESIDE = ("chat_template.jinja", "chat_template.json", "generation_config.json")
"""Files that captions of a model here depend on beside those that every model has."""
LOCAL_TIME_LIMIT_S = 600.0
"""For one clip by a model here; a large one on a slow machine takes minutes."""
ENDPOINT_REASONS = (
    "no_answer", "not_asked", "empty", "html", "refused", "repeats", "too_long", "too_short",
    "cut_off", "not_json",
)  # fmt: skip
"""Reasons that may be the endpoint's; if they are, they are passing."""


@dataclass(frozen=True)
class CaptionStage:
    """`text` (and `text_short`, where asked for), by what, and what it used."""

    config: CaptionConfig
    frames: FramesConfig

    @property
    def name(self) -> str:
        return "caption"

    @cached_property
    def parts(self) -> Sequence[Part]:
        """
        Raises:
            KinemaError: a model here that is not there or not complete, or cannot be downloaded.
        """
        config = self.config
        template = template_of(config.prompt)
        made_by: dict[str, Any] = {
            "code": [CODE, clean.VERSION],
            "prompt": template.text,
            "frames": [min(config.frames, self.frames.count), frame_settings(self.frames)],
            "frames_as": config.frames_as,
            "max": [config.max_tokens, config.max_words],
            "temperature": config.temperature,
            "existing": config.existing,
            "short": config.short,
        }
        if config.endpoint is None:
            files = self._files()
            beside = [n for n in BESIDE if (files.folder / n).is_file()]
            made_by["files"] = fingerprint(files.folder / n for n in {*files.names, *beside})
        else:
            # Not the address: the same model may answer at another one tomorrow.
            made_by |= {"model": config.model, "detail": config.detail, "request": config.request}
        # Where borders are cut off the picture is another one; scaled it is the same, and asking
        # costs money.
        depends = {*columns(template.text), *BORDERS, "start_frame", "end_frame"}
        if config.existing == "keep":
            depends.add("text")
        if config.frames_as == "video":
            depends.add("duration")
        return (Part("caption", columns_of(template, config), made_by, tuple(sorted(depends))),)

    @property
    def batch(self) -> int:
        return self.config.batch if self.config.endpoint is None else self.config.parallel

    @property
    def gpu(self) -> bool:
        return self.config.endpoint is None

    @property
    def threads(self) -> int:
        """Two batches, so that the requests of one fill the gaps at the end of the other."""
        return 1 if self.config.endpoint is None else 2

    @property
    def max_workers(self) -> int | None:
        """Of the whole run: pace and budget of an endpoint are those of one process."""
        return None if self.config.endpoint is None else 1

    def time_limit_s(self, row: Row) -> float:
        config = self.config
        if config.endpoint is None:
            return LOCAL_TIME_LIMIT_S
        requests = 3  # an answer, another in place of a bad one, a short version
        pace = 60.0 * config.parallel / (config.requests_per_minute or 60.0 * config.parallel)
        tries = (config.retries + 1) * (config.timeout_s + LONGEST_WAIT_S + pace)
        return requests * tries

    def _files(self) -> ModelFiles:
        return ModelFiles.find(
            self.config.model,
            what="the vision-language model",
            key="caption.model",
            example=EXAMPLE,
            tokenizer=True,
        )

    def open(self, places: Places) -> Work:
        """See `Stage.open`."""
        config, frames = self.config, self.frames
        ask: Any
        if config.endpoint is not None:
            from kinema.curation.captions.asking import EndpointCaptions

            ask = EndpointCaptions(config)
        else:
            from kinema.curation.captions.vision import LocalCaptions

            ask = LocalCaptions(config, self._files())
        given = columns_of(template_of(config.prompt), config)

        def read(row: Row) -> list[Picture] | Bad:
            pictures = read_frames(row, places)
            if isinstance(pictures, Bad):
                return pictures
            return choose(pictures, min(config.frames, frames.count))

        def work(rows: Sequence[Row]) -> list[Result]:
            wanted = [row for row in rows if not keeps(row, config)]
            answers = iter(ask(wanted, read))
            found: list[Result] = []
            for row in rows:
                one: Found
                if keeps(row, config):
                    kept = str(row["text"])
                    short = clean.first_sentence(kept) if "text_short" in given else None
                    one = as_columns(Caption(kept, short), given, None, Use())
                else:
                    one = next(answers)
                found.append({"caption": one})
            return found

        return work


def choose(pictures: Sequence[Picture], count: int) -> list[Picture]:
    """So many of the frames, spread evenly; all where there are fewer."""
    if len(pictures) <= count:
        return list(pictures)
    return [pictures[(2 * i + 1) * len(pictures) // (2 * count)] for i in range(count)]


def shortfall(captioned: int, bad: Iterable[Bad]) -> KinemaError | None:
    """What to end the run with where the endpoint left clips without a caption; None where it did
    not. Captions that are done are kept.

    Args:
        captioned: rows that have a caption.
        bad: of the others.
    """
    missing = [one for one in bad if one.passing and one.reason in ENDPOINT_REASONS]
    if not missing:
        return None
    total = captioned + len(missing)
    # Why asking stopped says more than what became of the clips before.
    why = next((b.message for b in missing if b.reason == "not_asked"), missing[-1].message)
    return KinemaError(
        f"{captioned:,} of {total:,} captioned: {why}",
        where="caption",
        hint="mend that; the same command goes on with the rest",
    )
