"""Scores by models that pair images with text: aesthetics, embeddings, match with the caption."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from kinema.config.errors import KinemaError
from kinema.curation.config import AestheticConfig, EmbedConfig, FramesConfig, MatchConfig
from kinema.curation.frames import Picture
from kinema.curation.scoring.model_files import (
    AESTHETIC_HEAD,
    CLIP_L14,
    ModelFiles,
    find_file,
    fingerprint,
)
from kinema.curation.scoring.strips import (
    STRIP,
    asked,
    frame_settings,
    in_order,
    read_frames,
    time_limit_s,
)
from kinema.curation.stage import Bad, Found, Part, Places, Result, Row, Work

CODE = 1
"""Raised when the same files and settings give other scores."""
READERS = 4
"""Strips that are read at once."""


@dataclass(frozen=True)
class ClipStage:
    """`aesthetic` and `_embedding` of clips from one pass through one CLIP's image side.

    `aesthetic`: LAION's predictor on the embedding of each frame, mean over the frames.
    `_embedding`: the mean of the frames' embeddings (each of norm 1), of norm 1 again.
    """

    frames: FramesConfig
    aesthetic: AestheticConfig | None = None
    embed: EmbedConfig | None = None
    """Both: of the same model (`clip_stages` sees to it)."""

    def __post_init__(self) -> None:
        given = [c for c in (self.aesthetic, self.embed) if c is not None]
        if len({_model(c) for c in given}) != 1:
            raise ValueError("aesthetic, embed, or both with the same model")

    @property
    def name(self) -> str:
        return "+".join(p for p in ("aesthetic", "embed") if getattr(self, p) is not None)

    @cached_property
    def parts(self) -> Sequence[Part]:
        """
        Raises:
            KinemaError: the model is not there or not complete, or it cannot be downloaded.
        """
        made_by = {"code": CODE, "model": self._files().fingerprint()}
        made_by |= {"frames": frame_settings(self.frames)}
        parts = []
        if self.aesthetic is not None:
            head = {"head": fingerprint([_head(self.aesthetic)])}
            parts.append(Part("aesthetic", {"aesthetic": pa.float64()}, made_by | head, STRIP))
        if self.embed is not None:
            parts.append(Part("embed", {"_embedding": pa.list_(pa.float32())}, made_by, STRIP))
        return tuple(parts)

    @property
    def batch(self) -> int:
        return max(c.batch for c in (self.aesthetic, self.embed) if c is not None)

    @property
    def gpu(self) -> bool:
        return True

    @property
    def threads(self) -> int:
        return 1

    def time_limit_s(self, row: Row) -> float:
        return time_limit_s(row)

    def _files(self) -> ModelFiles:
        if self.aesthetic is not None:
            return _clip(self.aesthetic.clip, "aesthetic.clip", tokenizer=False)
        assert self.embed is not None
        return _clip(self.embed.model, "embed.model", tokenizer=False)

    def open(self, places: Places) -> Work:
        """See `Stage.open`."""
        from kinema.curation.scoring.aesthetic_head import AestheticHead
        from kinema.curation.scoring.networks import PairedEncoder, device_for_scores

        files = self._files()
        check_same(files, self.parts[0])
        head = None if self.aesthetic is None else AestheticHead(_head(self.aesthetic))
        encoder = PairedEncoder(files, device_for_scores(), text=False)
        if head is not None and head.width != encoder.width:
            raise KinemaError(
                f"the predictor takes embeddings of {head.width} channels, this CLIP gives "
                f"{encoder.width}",
                where=str(head.file),
                hint="LAION's predictors belong to CLIP ViT-L/14 "
                "(aesthetic.clip=openai/clip-vit-large-patch14)",
            )
        parts = self.parts

        def columns(vectors: Any, part: str) -> Found:
            if not bool(vectors.isfinite().all()):
                return NOT_FINITE
            if part == "aesthetic":
                assert head is not None
                return {"aesthetic": round(head(vectors).double().mean().item(), 4)}
            mean = vectors.double().mean(0)
            return {"_embedding": (mean / mean.norm()).float().tolist()}

        def work(rows: Sequence[Row]) -> list[Result]:
            pictures, bad = read_all(rows, places)
            vectors = encoder.images(list(pictures.values()))
            found: dict[int, Result] = {
                i: {part: columns(v, part) for part in asked(rows[i], parts)}
                for i, v in zip(pictures, vectors, strict=True)
            }
            return in_order(rows, found, bad, parts)

        return work


@dataclass(frozen=True)
class MatchStage:
    """`match`: 100 times the cosine between the caption and each frame, mean over the frames.

    The same for SigLIP: its own sigmoid has a trained scale and offset, which differ from model to
    model. Null where there is no caption.
    """

    config: MatchConfig
    frames: FramesConfig

    @property
    def name(self) -> str:
        return "match"

    @cached_property
    def parts(self) -> Sequence[Part]:
        """
        Raises:
            KinemaError: the model is not there or not complete, or it cannot be downloaded.
        """
        made_by = {
            "code": CODE,
            "model": self._files().fingerprint(),
            "frames": frame_settings(self.frames),
        }
        return (Part("match", {"match": pa.float64()}, made_by, ("text", *STRIP)),)

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
        return _clip(self.config.model, "match.model", tokenizer=True)

    def open(self, places: Places) -> Work:
        """See `Stage.open`."""
        from kinema.curation.scoring.networks import PairedEncoder, device_for_scores

        files = self._files()
        check_same(files, self.parts[0])
        encoder = PairedEncoder(files, device_for_scores(), text=True)
        parts = self.parts

        def work(rows: Sequence[Row]) -> list[Result]:
            texts = {i: str(row.get("text") or "").strip() for i, row in enumerate(rows)}
            silent = [i for i, text in texts.items() if not text]
            pictures, bad = read_all(rows, places, leave_out=silent)
            images = encoder.images(list(pictures.values()))
            words = encoder.texts([texts[i] for i in pictures])
            found: dict[int, Result] = {i: {"match": {"match": None}} for i in silent}
            for i, frames, text in zip(pictures, images, words, strict=True):
                score = 100.0 * (frames.double() @ text.double()).mean().item()
                # Not a number: what is neither below nor above anything.
                found[i] = {"match": NOT_FINITE if score != score else {"match": round(score, 4)}}
            return in_order(rows, found, bad, parts)

        return work


NOT_FINITE = Bad("not_finite", "the model gave a value that is not a number")


def clip_stages(
    aesthetic: AestheticConfig | None, embed: EmbedConfig | None, frames: FramesConfig
) -> list[ClipStage]:
    """The stages for these settings: one where both use the same model, which is then loaded and
    asked once. Results of the parts are the same either way."""
    if aesthetic is not None and embed is not None and _model(aesthetic) == _model(embed):
        return [ClipStage(frames, aesthetic, embed)]
    alone = [] if aesthetic is None else [ClipStage(frames, aesthetic=aesthetic)]
    return alone if embed is None else [*alone, ClipStage(frames, embed=embed)]


def read_all(
    rows: Sequence[Row], places: Places, leave_out: Sequence[int] = ()
) -> tuple[dict[int, list[Picture]], dict[int, Bad]]:
    """Frames of the rows that have them, and why others have none, by their place in the batch."""
    pictures: dict[int, list[Picture]] = {}
    bad: dict[int, Bad] = {}
    wanted = [i for i in range(len(rows)) if i not in leave_out]
    # A store takes its time for each.
    with ThreadPoolExecutor(READERS) as pool:
        strips = list(pool.map(lambda i: read_frames(rows[i], places), wanted))
    for i, found in zip(wanted, strips, strict=True):
        if isinstance(found, Bad):
            bad[i] = found
        else:
            pictures[i] = found
    return pictures, bad


def check_same(files: ModelFiles, part: Part) -> None:
    """Results are kept under the name of the model that the run began with.

    Raises:
        KinemaError: the files here are others (on another machine, or since then).
    """
    if files.fingerprint() != part.made_by["model"]:
        raise KinemaError(
            "these are other files than those that the run was started with",
            where=str(files.folder),
            hint="use the same model on all machines, and start again if it was changed",
        )


def _model(config: AestheticConfig | EmbedConfig) -> str:
    return config.clip if isinstance(config, AestheticConfig) else config.model


def _clip(place: str, key: str, *, tokenizer: bool) -> ModelFiles:
    return ModelFiles.find(
        place, what="the CLIP model", key=key, example=CLIP_L14, tokenizer=tokenizer
    )


def _head(config: AestheticConfig) -> Any:
    return find_file(
        config.head, what="the aesthetic predictor", key="aesthetic.head", example=AESTHETIC_HEAD
    )
