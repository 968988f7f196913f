"""Settings of curation: what `kinema/recipes/curate/*.yaml` hold.

A stage that is null does not run. Scores are columns, not decisions: nothing here but `scenes`,
`cut` and `dedup` decides about clips; rules are in `filter`, and are applied last.
"""

from __future__ import annotations

from typing import Literal

from kinema.config.settings import settings


@settings
class ScenesConfig:
    """Where a video is cut into clips."""

    detector: Literal["content", "adaptive", "both", "none"] = "both"
    """PySceneDetect's content detector, its adaptive one (camera motion does not mislead it), what
    either finds, or none: the whole video is one scene."""
    content_threshold: float = 27.0
    adaptive_threshold: float = 3.0
    adaptive_min_content: float = 15.0
    """Below this content score a frame is no cut, however quiet its neighbours are."""
    fades: bool = True
    """Cut at fades through black (and white) as well; the dark frames belong to no clip."""
    fade_threshold: float = 12.0
    """Mean brightness (0..255) below which a frame is black."""
    min_s: float = 2.0
    """Shorter scenes give no clip."""
    max_s: float = 16.0
    """Longer scenes are split into clips of equal length."""
    trim_s: float = 0.0
    """Seconds left out at both sides of a cut; 0.5 keeps dissolves out."""


@settings
class MotionConfig:
    """How much moves, by the codec's motion vectors and by optical flow on sampled frames."""

    flow_per_s: float = 2.0
    """Pairs of neighbouring frames per second of video whose flow is worked out."""


@settings
class QualityConfig:
    """Sharpness, brightness, borders, repeated frames, blockiness."""

    per_s: float = 4.0
    """Frames per second of video that are looked at closely; repeated frames are counted on all."""


@settings
class HashConfig:
    """Perceptual hashes of frames, for `dedup`."""

    per_s: float = 2.0


@settings
class CutConfig:
    """How clips are written."""

    mode: Literal["encode", "copy"] = "encode"
    """`encode`: H.264 with a key frame every `gop` frames at least, cut exactly. `copy`: packets as
    they are: fast, starts at the key frame at or after the cut, and keeps long GOPs, which makes
    reading a few frames in training slower."""
    gop: int = 30
    crf: int = 18
    preset: str = "medium"
    """x264's."""
    max_side: int | None = None
    """Pixels of the shorter side at most; larger clips are scaled down."""
    letterbox: Literal["keep", "crop"] = "crop"
    """What becomes of black borders that `quality` found."""
    whole: Literal["keep", "encode"] = "keep"
    """What becomes of a file that is one clip from beginning to end: used where it is, or written
    anew."""


@settings
class FramesConfig:
    """Frames of a clip that models look at, kept as one JPEG strip per clip."""

    count: int = 3
    """Spread evenly: the middles of as many equal parts."""
    max_side: int = 768
    """Pixels of the longer side."""
    quality: int = 92


@settings
class AestheticConfig:
    """LAION's aesthetic predictor (about 1..10) on CLIP image embeddings, mean over frames."""

    clip: str = "openai/clip-vit-large-patch14"
    """Folder or hub name of a CLIP model of transformers."""
    head: str = "camenduru/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth"
    """Weights of the predictor: a file or a place on the hub."""
    batch: int = 16


@settings
class MatchConfig:
    """How well the caption fits the frames: CLIP's or SigLIP's cosine × 100, mean over frames."""

    model: str = "openai/clip-vit-large-patch14"
    batch: int = 16


@settings
class EmbedConfig:
    """An embedding of each clip for semantic duplicates and concepts: mean over frames, norm 1."""

    model: str = "openai/clip-vit-large-patch14"
    batch: int = 16


@settings
class ClassifierConfig:
    """An image classifier of transformers whose probability becomes a column, maximum over frames
    (`nsfw`, `watermark`)."""

    model: str
    """Folder or hub name."""
    label: str
    """The class whose probability is kept, as the model's `id2label` spells it."""
    batch: int = 16


@settings
class OcrConfig:
    """Text on screen, by RapidOCR, which carries its models."""

    max_side: int = 736
    min_confidence: float = 0.5
    batch: int = 4


@settings
class CaptionConfig:
    """What writes captions: a vision-language model here, or an OpenAI-compatible endpoint."""

    model: str | None = None
    """Folder or hub name of a LLaVA- or Qwen-VL-like model of transformers; the name of the model
    at the endpoint where one is given."""
    endpoint: str | None = None
    """`http://localhost:8000/v1`"""
    api_key_env: str = "OPENAI_API_KEY"
    prompt: str = "detailed"
    """A ready template (`detailed`, `short`, `camera`, ...) or a text of its own."""
    frames: int = 3
    """Frames shown; at most `frames.count`."""
    max_tokens: int = 300
    batch: int = 4
    parallel: int = 8
    """Requests at once."""
    requests_per_minute: float | None = None
    retries: int = 3
    timeout_s: float = 120.0
    price_per_million_input: float | None = None
    """Price of a million input tokens, in any currency: what it will cost is shown before."""
    price_per_million_output: float | None = None
    currency: str = "USD"
    max_cost: float | None = None
    """Stop asking when this has been spent."""
    existing: Literal["keep", "replace"] = "keep"
    """What becomes of captions that are there."""
    short: bool = False
    """Also a short caption, in a column `text_short`."""
    score_text: bool = False
    """Append scores as Open-Sora 1.2 does (`aesthetic score: 5.5, motion score: 8.0, ...`)."""


@settings
class DedupConfig:
    """Which clips are the same, or nearly so, and which concepts there are."""

    hash_distance: int = 6
    """Bits of 64 that two clips' hashes may differ by (mean over frames) to count as duplicates."""
    similarity: float | None = 0.95
    """Cosine of embeddings from which two clips are semantic duplicates; needs `embed`."""
    concepts: int | None = None
    """Clusters of embeddings; needs `embed`."""
    concept_cap: int | None = None
    """Clips that each concept keeps, the best aesthetic ones first."""
    seed: int = 0


@settings
class FilterConfig:
    """Which clips are kept."""

    preset: str | None = None
    """A published set of thresholds (`kinema data filter --presets` lists them)."""
    rules: tuple[str, ...] = ()
    """Expressions over columns that kept clips fulfil: `aesthetic >= 4.5`, after the preset's."""
    skip_dropped: bool = True
    """Expensive stages leave out clips that a rule drops already. When rules are loosened, what is
    missing is worked out then."""


@settings
class CurateRecipe:
    """All of a curation run."""

    scenes: ScenesConfig | None = ScenesConfig()
    motion: MotionConfig | None = MotionConfig()
    quality: QualityConfig | None = QualityConfig()
    hashes: HashConfig | None = HashConfig()
    cut: CutConfig = CutConfig()
    frames: FramesConfig = FramesConfig()
    aesthetic: AestheticConfig | None = None
    ocr: OcrConfig | None = None
    nsfw: ClassifierConfig | None = None
    watermark: ClassifierConfig | None = None
    embed: EmbedConfig | None = None
    dedup: DedupConfig | None = DedupConfig()
    caption: CaptionConfig | None = None
    match: MatchConfig | None = None
    filter: FilterConfig = FilterConfig()
    time_limit_s: float = 60.0
    """Seconds for one file beside three times its length; past it, its worker is killed."""
    seed: int = 0
