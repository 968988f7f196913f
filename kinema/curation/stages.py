"""Which stages a recipe has, in their order: cheap ones first."""

from __future__ import annotations

from kinema.config.errors import ConfigError
from kinema.curation.clips import PASSED_ON
from kinema.curation.config import CurateRecipe
from kinema.curation.stage import Stage


def source_stages(recipe: CurateRecipe) -> list[Stage]:
    """What looks at raw videos, and says where the clips are."""
    from kinema.curation.look.look import LookStage
    from kinema.curation.look.segment import SegmentStage

    look = LookStage(
        scenes=recipe.scenes,
        motion=recipe.motion,
        quality=recipe.quality,
        hashes=recipe.hashes,
        time_limit=recipe.time_limit_s,
    )
    return [look, SegmentStage.of(recipe)]


def clip_stages(recipe: CurateRecipe) -> list[Stage]:
    """What cuts clips and looks at their frames, up to the duplicates."""
    from kinema.curation.cut import CutStage

    return [CutStage(recipe.cut, recipe.frames, recipe.time_limit_s), *frame_stages(recipe)]


def frame_stages(recipe: CurateRecipe) -> list[Stage]:
    """Models that look at a clip's frames and need no caption."""
    from kinema.curation.scoring import clip_scores
    from kinema.curation.scoring.classify import ClassifierStage
    from kinema.curation.scoring.ocr import OcrStage

    stages: list[Stage] = []
    stages += clip_scores.clip_stages(recipe.aesthetic, recipe.embed, recipe.frames)
    for name in ("nsfw", "watermark"):
        config = getattr(recipe, name)
        if config is not None:
            stages.append(ClassifierStage(name, config, recipe.frames))
    if recipe.ocr is not None:
        stages.append(OcrStage(recipe.ocr, recipe.frames))
    return stages


def caption_stages(recipe: CurateRecipe) -> list[Stage]:
    """What writes captions, and says how well they fit: after everything else, for what is left."""
    from kinema.curation.captions.stage import CaptionStage
    from kinema.curation.scoring.clip_scores import MatchStage

    stages: list[Stage] = []
    if recipe.caption is not None:
        if recipe.caption.frames > recipe.frames.count:
            raise ConfigError(
                f"caption.frames is {recipe.caption.frames}, but only {recipe.frames.count} frames "
                "of a clip are kept",
                where="caption.frames",
                hint=f"frames.count={recipe.caption.frames}",
            )
        stages.append(CaptionStage(recipe.caption, recipe.frames))
    if recipe.match is not None:
        stages.append(MatchStage(recipe.match, recipe.frames))
    return stages


def check_models(recipe: CurateRecipe) -> None:
    """Before hours of work: every model is there.

    Raises:
        KinemaError: one is not, or is not complete.
    """
    for stage in [*frame_stages(recipe), *caption_stages(recipe)]:
        assert stage.parts  # named by the model's files, which are looked for to name them


BASE_COLUMNS = (
    "path", "text", "num_frames", "height", "width", "aspect_ratio", "fps", "resolution",
    "file_size", "duration", "source", "source_name", "source_id", "start_frame", "end_frame",
    "start_s", "end_s", "whole", *(f"source_{name}" for name in PASSED_ON),
)  # fmt: skip
"""What every clip has."""


def column_names(recipe: CurateRecipe) -> set[str]:
    """All columns that clips will have, but for those of `dedup`. Looks at no model's files.

    Raises:
        KinemaError: OpenCV is not installed.
    """
    from kinema.curation import cut
    from kinema.curation.captions.answers import columns_of
    from kinema.curation.captions.prompts import template_of
    from kinema.curation.look.packages import opencv

    opencv()  # before modules that need it: an error that names the package
    from kinema.curation.look import hashes, motion, quality

    names = {*BASE_COLUMNS, *cut.COLUMNS, "frames", "frames_count"}
    for name, module in (("motion", motion), ("quality", quality), ("hashes", hashes)):
        if getattr(recipe, name) is not None:
            names |= set(module.COLUMNS)
    names |= {n for n in ("aesthetic", "nsfw", "watermark", "match") if getattr(recipe, n)}
    if recipe.ocr is not None:
        names |= {"ocr_boxes", "ocr_area", "ocr_text"}
    if recipe.caption is not None:
        names |= set(columns_of(template_of(recipe.caption.prompt), recipe.caption))
    return {name for name in names if not name.startswith("_")}
