"""What a pipeline is made of and what a person can ask of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kinema.config.settings import settings
from kinema.diffusion.config import ProcessConfig, process_mismatch
from kinema.models.config import TextConfig, TransformerConfig, VAEConfig, mismatch


@settings
class VAEComponent:
    """The autoencoder a checkpoint was trained with."""

    config: VAEConfig
    weights: str | None = None
    """Path of its weights: absolute, or relative to the checkpoint's folder. None: must be given
    when generating."""


@settings
class TextComponent:
    """The text encoder a checkpoint was trained with."""

    config: TextConfig
    weights: str | None = None
    """Folder of its weights and tokenizer (as `VAEComponent.weights`), where it has any."""


@settings
class TrainedSize:
    """A shape of video the checkpoint saw in training, in pixels and frames (1 = an image)."""

    width: int
    height: int
    num_frames: int


@settings
class PipelineConfig:
    """`components.json` of a checkpoint: enough to generate without the training recipe."""

    model: TransformerConfig
    vae: VAEComponent
    text: TextComponent
    diffusion: ProcessConfig
    buckets: tuple[TrainedSize, ...] = ()
    """Shapes seen in training, most frequent first; the first one is the default size."""
    any_aspect_ratio: bool = False
    """Whether training had every aspect ratio of these areas."""
    fps: float = 24.0
    """Frame rate seen in training, after frame skipping: the default frame rate."""
    frame_interval: Annotated[int, Field(ge=1)] = 1
    """Frames of the source per frame of a clip in training, where the model was told the source's
    rate: it is told `fps` of a request, and the file plays at `fps // frame_interval` (1.1: 3)."""
    align: Annotated[int, Field(ge=1)] | None = None
    """Where references may start and end in a segment: at multiples of this many latent frames
    (1.2: 5, one chunk of its autoencoder); None: anywhere. See `alignment`."""
    condition_frame_length: Annotated[int, Field(ge=1)] | None = None
    """Latent frames that a segment takes over from the one before, by default; None: a chunk of
    the autoencoder (1.2: 5), or 4 where it has none (as 1.1)."""
    aes: float | None = None
    """Aesthetic score that is appended to prompts by default (1.2: 6.5); None: none is."""

    @property
    def frames_taken_over(self) -> int:
        """`condition_frame_length`, or what it is by default."""
        return self.condition_frame_length or self.vae.config.latent_chunk or 4

    def alignment(self, latent_frames: int) -> int | None:
        """`align`, for segments of that many latent frames.

        Where it leaves no start but 0, starts are anywhere: else a clip of a single chunk could
        not end with a reference.
        """
        return self.align if self.align is not None and self.align < latent_frames else None

    def played_fps(self, fps: float) -> float:
        """Frames per second of the file, for the rate that the model is told."""
        return fps if self.frame_interval == 1 else max(1.0, fps // self.frame_interval)

    def __post_init__(self) -> None:
        channels = self.model.in_channels
        problem = mismatch(self.model, self.text.config) or process_mismatch(
            self.diffusion, channels=channels, pred_sigma=self.model.pred_sigma
        )
        if problem:
            raise ValueError(problem)
        if channels != self.vae.config.latent_channels:
            raise ValueError(
                f"model.in_channels is {channels}, but the autoencoder's latents have "
                f"{self.vae.config.latent_channels} channels"
            )


@settings
class GenerateRequest:
    """One video to be made."""

    prompt: str
    width: int
    """Pixels; a multiple of the autoencoder's stride."""
    height: int
    """Pixels; as `width`."""
    num_frames: int
    """Frames of the video, of each segment where there are several; 1 makes an image. A number the
    autoencoder can do exactly."""
    fps: float = 24.0
    """Frame rate told to the model. The file plays at `fps // PipelineConfig.frame_interval`."""
    seed: int = 0
    sample: int = 0
    """Which of several videos for the same prompt and seed this is; each has its own noise."""
    num_sampling_steps: int = 30
    sampler: Literal["iddpm", "dpm-solver"] | None = None
    """How a model trained with IDDPM samples; None: as its settings say (`IDDPMConfig.sampler`)."""
    cfg_scale: float = 7.0
    """Classifier-free guidance; 1 is none (and takes half the time)."""
    negative_prompt: str | None = None
    """What guidance leads away from; None: the model's learned stand-in for no caption."""
    refined_from: str | None = None
    """What a person wrote, where `prompt` is a refinement of that; only kept for the record."""

    aes: float | None = None
    """Aesthetic score, appended to the prompt in the words 1.2 was trained with."""
    flow: float | None = None
    """Motion score, appended likewise."""
    camera_motion: str | None = None
    """Camera motion such as `pan left`, appended likewise."""

    references: tuple[str, ...] = ()
    """Images and videos that frames are taken from, as paths."""
    mask_strategy: str = ""
    """Which frames of which reference go where, in the notation of Open-Sora 1.1 and 1.2:
    `segment,reference,reference start,target start,length,edit ratio` joined by `;`, in latent
    frames; what is left out at the end is 0,0,0,0,1,0."""
    loop: int = 1
    """Segments that are made one after the other, each going on from the last one's end."""
    condition_frame_length: int | None = None
    """Latent frames of a segment that the next one starts from; None: as the model's authors
    did."""
    condition_frame_edit: float = 0.0
    """Edit ratio of those frames: 0 keeps them."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; say what the video should show")
        for name in ("width", "height", "num_frames", "num_sampling_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to 2^63 - 1")
        if self.loop < 1:
            raise ValueError(f"loop is {self.loop}; it must be at least 1")
        if self.condition_frame_length is not None and self.condition_frame_length < 1:
            raise ValueError(
                f"condition_frame_length is {self.condition_frame_length}; it must be at least 1"
            )
        if not 0 <= self.condition_frame_edit <= 1:
            raise ValueError(
                f"condition_frame_edit is {self.condition_frame_edit}; it must be from 0 to 1"
            )
        if self.sample < 0:
            raise ValueError(f"sample is {self.sample}; it must be at least 0")
        if not 0 < self.fps <= 240:
            raise ValueError(f"fps is {self.fps}; it must be above 0 and at most 240")
        if not 0 <= self.cfg_scale <= 100:
            raise ValueError(
                f"cfg_scale is {self.cfg_scale}; it must be from 0 (no prompt) to 100 (1 is no "
                "guidance)"
            )
