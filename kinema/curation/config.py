"""Settings of curation: what `kinema/recipes/curate/*.yaml` hold.

A stage that is null does not run. Scores are columns, not decisions: nothing here but `scenes`,
`cut` and `dedup` decides about clips; rules are in `filter`, and are applied last.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from kinema.config.settings import settings
from kinema.curation.captions.prompts import placeholders, template_of
from kinema.endpoint.chat import check_address


@settings
class ScenesConfig:
    """Where a video is cut into clips."""

    detector: Literal["content", "adaptive", "both", "none"] = "adaptive"
    """PySceneDetect's content detector, its adaptive one (camera motion does not mislead it), what
    either finds, or none: the whole video is one scene."""
    content_threshold: float = 27.0
    adaptive_threshold: float = 3.0
    adaptive_min_content: float = 15.0
    """Below this content score a frame is no cut, however quiet its neighbours are."""
    hue_weight: float = 0.5
    """Weight of the difference in hue beside saturation's and brightness's 1; PySceneDetect's own
    is 1, by which a key frame in a pale picture passes for a cut."""
    dissolves: bool = True
    """Cut at dissolves as well; their frames belong to no clip."""
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
    crf: int = 17
    preset: str = "veryfast"
    """x264's. Of a run's time most goes into writing clips; `medium` takes two and a half times as
    long for files of the same size that are 0.2 to 1.5 dB nearer to the source."""
    max_side: int | None = None
    """Pixels of the shorter side at most; larger clips are scaled down."""
    letterbox: Literal["keep", "crop"] = "crop"
    """What becomes of black borders that `quality` found."""
    whole: Literal["keep", "encode"] = "encode"
    """What becomes of a file that is one clip from beginning to end: written anew as well, or used
    where it is (clips of a data set that somebody cut before)."""


@settings
class FramesConfig:
    """Frames of a clip that models look at, kept as one JPEG strip per clip."""

    count: int = 3
    """Spread evenly: the middles of as many equal parts."""
    max_side: int = 768
    """Pixels of the longer side."""
    quality: int = 92


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")


@settings
class AestheticConfig:
    """LAION's aesthetic predictor (about 1..10) on CLIP image embeddings, mean over frames."""

    clip: str = "openai/clip-vit-large-patch14"
    """Folder or hub name of a CLIP model of transformers."""
    head: str = "camenduru/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth"
    """Weights of the predictor: a file or a place on the hub."""
    batch: int = 16

    def __post_init__(self) -> None:
        _check_batch(self.batch)


@settings
class MatchConfig:
    """How well the caption fits the frames: CLIP's or SigLIP's cosine × 100, mean over frames."""

    model: str = "openai/clip-vit-large-patch14"
    batch: int = 16

    def __post_init__(self) -> None:
        _check_batch(self.batch)


@settings
class EmbedConfig:
    """An embedding of each clip for semantic duplicates and concepts: mean over frames, norm 1."""

    model: str = "openai/clip-vit-large-patch14"
    batch: int = 16

    def __post_init__(self) -> None:
        _check_batch(self.batch)


@settings
class ClassifierConfig:
    """An image classifier of transformers whose probability becomes a column, maximum over frames
    (`nsfw`, `watermark`)."""

    model: str
    """Folder or hub name."""
    label: str
    """The class whose probability is kept, as the model's `id2label` spells it."""
    batch: int = 16

    def __post_init__(self) -> None:
        _check_batch(self.batch)


@settings
class OcrConfig:
    """Text on screen, by RapidOCR, which carries its models."""

    max_side: int = 736
    """Pixels of the longer side, to which larger frames are reduced for finding text."""
    min_confidence: float = 0.5
    """Lines that are read less surely do not count."""
    batch: int = 4

    def __post_init__(self) -> None:
        _check_batch(self.batch)
        if self.max_side < 64:
            raise ValueError(f"max_side is {self.max_side}; text needs 64 pixels or more")
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence is {self.min_confidence}; it goes from 0 to 1")


@settings
class CaptionConfig:
    """What writes captions: a vision-language model here, or an OpenAI-compatible endpoint."""

    model: str
    """Folder or hub name of a LLaVA- or Qwen-VL-like model of transformers; the name of the model
    at the endpoint where one is given."""
    endpoint: str | None = None
    """`http://localhost:8000/v1`"""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key; where it is not set, none is sent."""
    prompt: str = "detailed"
    """A ready template (`detailed`, `short`, `camera`, `improve`, `structured`) or a text of its
    own, in which `{duration}`, `{camera_motion}`, ... stand for what is known of the clip."""
    frames: int = 3
    """Frames shown; at most `frames.count`."""
    frames_as: Literal["images", "video"] = "images"
    """`video` (Qwen2-VL and Qwen2.5-VL here only): two frames share their tokens, and the model is
    told how far apart they are."""
    detail: Literal["low", "high", "auto"] | None = None
    """How closely the endpoint looks at images; null leaves it to the endpoint."""
    max_tokens: int = 300
    """Of an answer; what is cut off goes back to its last full sentence."""
    max_words: int = 200
    """Longer captions end with the last sentence within; three times as many are nonsense."""
    temperature: float | None = 0.0
    """0 takes the likeliest word each time; null (endpoint only): sends none."""
    request: dict[str, Any] = field(default_factory=dict)
    """Further keys of the endpoint's request, such as `{max_completion_tokens: 900, max_tokens:
    null}`; null takes a key out."""
    batch: int = 4
    """Clips at once through a model here."""
    parallel: int = 8
    """Requests at once."""
    requests_per_minute: float | None = None
    retries: int = 4
    """How often a request is repeated that failed for a reason that may pass."""
    backoff_s: float = 1.0
    """Seconds before the first repetition; each further one waits twice as long."""
    timeout_s: float = 120.0
    """For one answer."""
    give_up_after: int = 10
    """Clips in a row for which the endpoint fails after all retries: no more are asked for then."""
    price_per_million_input: float | None = None
    """Price of a million input tokens, in any currency: what it will cost is shown before."""
    price_per_million_output: float | None = None
    currency: str = "USD"
    image_tokens: int | None = None
    """Tokens that a frame counts as, for the estimate; null: OpenAI's rule of tiles."""
    max_cost: float | None = None
    """Stop asking before a run spends more than this."""
    existing: Literal["keep", "replace"] = "keep"
    """What becomes of captions that clips came with."""
    short: Literal["first_sentence", "asked"] | None = None
    """Also a short caption, in a column `text_short`: the first sentence of the long one, or the
    model's own shortening of it. `structured` always gives one."""
    score_text: bool = False
    """Append scores as Open-Sora 1.2 does (`aesthetic score: 5.5. motion score: 8.0. ...`)."""

    def __post_init__(self) -> None:
        template = template_of(self.prompt)
        if "text" in placeholders(template.text) and self.existing == "keep":
            raise ValueError(
                "prompt shows the caption that a clip came with ({text}), and existing=keep asks "
                "only for clips without one; existing=replace"
            )
        if fixed := {"model", "messages", "stream", "n"} & self.request.keys():
            raise ValueError(f"request may not set {sorted(fixed)[0]!r}")
        if not self.model:
            raise ValueError("model is empty; name a folder, or a model of the hub or endpoint")
        if self.endpoint is not None:
            check_address(self.endpoint)
        for name in ("frames", "max_tokens", "batch", "parallel", "give_up_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("timeout_s", "requests_per_minute", "image_tokens", "max_cost"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in (
            "retries", "backoff_s", "temperature", "price_per_million_input",
            "price_per_million_output",
        ):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.endpoint is not None and self.frames_as == "video":
            raise ValueError("frames_as=video is for models here; an endpoint is shown images")
        if self.endpoint is None and self.temperature:
            raise ValueError(
                f"temperature is {self.temperature}; a model here takes the likeliest word each "
                "time: 0, or an endpoint"
            )
        if self.max_words < 5:
            raise ValueError(f"max_words is {self.max_words}; a caption has 5 or more")
        prices = (self.price_per_million_input, self.price_per_million_output)
        if (prices[0] is None) != (prices[1] is None):
            raise ValueError(
                "one price is missing: price_per_million_input and _output go together"
            )
        if self.max_cost is not None and prices[0] is None:
            raise ValueError("max_cost needs price_per_million_input and price_per_million_output")


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

    def __post_init__(self) -> None:
        dedup = self.dedup
        if dedup is not None and self.embed is None:
            for name in ("concepts", "concept_cap"):
                if getattr(dedup, name) is not None:
                    raise ValueError(f"dedup.{name} needs embeddings: embed={{}}")
