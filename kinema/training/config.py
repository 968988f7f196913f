"""The whole training recipe: what is trained, on which shapes, how, and what is written."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kinema.config.settings import settings
from kinema.data.config import DataConfig
from kinema.diffusion.config import FrameMaskConfig, ProcessConfig, process_mismatch
from kinema.models.config import (
    ClassTextConfig,
    CLIPTextConfig,
    STDiT3Config,
    T5TextConfig,
    TextConfig,
    TransformerConfig,
    VAEConfig,
    VideoVAEConfig,
    mismatch,
)
from kinema.parallel.config import ParallelConfig
from kinema.telemetry.config import TrackingConfig

RANDOM_WEIGHTS = "random"
"""Value of `vae_weights` that asks for an untrained autoencoder (tests only)."""


@settings
class WarmupSchedule:
    """Linear warm-up to `optim.lr`, then constant (Open-Sora 1.2's `LinearWarmupLR`)."""

    type: Literal["warmup"] = "warmup"
    warmup_steps: int = 0
    """Step i (from 0) below this runs at `lr * (i + 1) / (warmup_steps + 1)`; 0 is none."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be at least 0")


@settings
class OneCycleSchedule:
    """Up from `min_lr` to `max_lr`, down to `optim.lr`, then constant: the bump that the speed
    run gives a model when it moves to a new resolution."""

    type: Literal["one-cycle"]
    min_lr: float
    max_lr: float
    warmup_steps: int
    cooldown_steps: int
    anneal: Literal["cosine", "linear"] = "cosine"
    """Shape of both slopes."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.max_lr:
            raise ValueError(f"min_lr {self.min_lr} and max_lr {self.max_lr}: 0 <= min <= max")
        if self.warmup_steps < 1 or self.cooldown_steps < 1:
            raise ValueError("warmup_steps and cooldown_steps must be at least 1")


Schedule = Annotated[WarmupSchedule | OneCycleSchedule, Field(discriminator="type")]


@settings
class OptimConfig:
    """AdamW on the parameters that are not frozen."""

    lr: float = 1e-4
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float | None = 1.0
    """Largest allowed norm of all gradients together; null is no clipping."""
    schedule: Schedule = WarmupSchedule()

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}; it must be above 0")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas are {self.betas}; each must be at least 0 and below 1")
        if self.eps <= 0 or self.weight_decay < 0:
            raise ValueError("eps must be above 0 and weight_decay at least 0")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ValueError(f"grad_clip is {self.grad_clip}; above 0, or null for no clipping")


@settings
class TextToVideoTask:
    """Diffusion on latents, with frame masks and caption dropout."""

    type: Literal["text-to-video"]
    masks: FrameMaskConfig = FrameMaskConfig()
    """How often which frames stay clean; dropout of captions is `model.class_dropout_prob`."""
    remember_latents: bool = False
    """Decode and encode each crop of a clip once and keep its latents (the posterior's mean) in
    memory. For data of some hundred short clips; otherwise each step encodes anew and draws from
    the posterior."""


@settings
class VAETask:
    """Reconstruction of the autoencoder: L1 + KL."""

    type: Literal["vae"]
    kl_weight: float = 1e-6
    """Weight of the KL term, which is the mean over the elements of the latent."""
    start: Literal["random", "block-means"] = "random"
    """Weights before the first step. "block-means" starts small autoencoders as nearly linear, so
    that minutes of training suffice: `kinema.models.vae_init`."""

    def __post_init__(self) -> None:
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight is {self.kl_weight}; it must be at least 0")


Task = Annotated[TextToVideoTask | VAETask, Field(discriminator="type")]


@settings
class PreviewConfig:
    """Videos made from the averaged weights while training, on the first rank."""

    every: int
    """Steps between previews."""
    prompts: tuple[str, ...]
    size: tuple[int, int] | None = None
    """Width and height in pixels; null takes the shape most frequent in the data."""
    num_frames: int | None = None
    num_sampling_steps: int | None = None
    """Null takes `diffusion.num_sampling_steps`; so with `cfg_scale`."""
    cfg_scale: float | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        if self.every < 1 or not self.prompts:
            raise ValueError("needs every >= 1 and at least one prompt")


@settings
class ValidationConfig:
    """The loss on clips held out from training, on noise and timesteps that never change."""

    path: str
    """Manifest of the held-out clips."""
    every: int
    """Steps between validations; one is made at the end as well."""
    clips_per_bucket: int = 16
    """The first so many clips of each resolution and length."""
    timesteps: int = 10
    """How many timesteps each clip is noised to, at equal distances from noise to data."""
    text_cache: str | None = None
    """Precomputed embeddings of its captions, where the text encoder is not at hand; null takes
    the recipe's `text_cache`, or the text encoder where there is none."""

    def __post_init__(self) -> None:
        for key in ("every", "clips_per_bucket", "timesteps"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")


@settings
class GuardConfig:
    """Updates that would spoil the weights are left out; after some, the run goes back."""

    window: int = 100
    """Updates whose loss and gradient norm say what is usual; so many are made before any can be
    left out."""
    factor: float = 5.0
    """An update is left out when its loss or its gradient norm, before clipping, is more than so
    many times the median of the window."""
    skips: int = 3
    """Left out one after another, the run goes back to its newest whole checkpoint and passes over
    the micro-batches at fault."""
    rollbacks: int = 3
    """Times that a run goes back before it gives up."""

    def __post_init__(self) -> None:
        for key in ("window", "skips", "rollbacks"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        if self.factor <= 1:
            raise ValueError(f"factor is {self.factor}; it must be above 1")


@settings
class WatchdogConfig:
    """Ends a run that stands still, and says which process it waited for."""

    timeout_s: float = 75.0
    """Without progress for so long (or five times what the work at hand should take, where that is
    longer), a process counts as stalled."""
    first_step_s: float = 1800.0
    """The same until the first step is done: kernels are chosen and compiled in it."""
    slow_factor: float = 1.2
    """A rank whose own work takes more than so many times the median of all is named in the log."""

    def __post_init__(self) -> None:
        if self.timeout_s <= 0 or self.first_step_s < self.timeout_s:
            raise ValueError("needs 0 < timeout_s <= first_step_s")
        if self.slow_factor <= 1:
            raise ValueError(f"slow_factor is {self.slow_factor}; it must be above 1")


@settings
class TrainRecipe:
    """Everything a run is made of, except which manifest it reads and where weights come from."""

    name: str
    """Name of the model in the run folder `outputs/NNN-NAME`."""
    task: Task
    vae: VAEConfig
    """The autoencoder: frozen for text-to-video, trained by the vae task."""
    vae_weights: str | None = None
    """The frozen autoencoder's weights: a checkpoint of `kinema train-vae`, its run folder, or a
    weights file. `random` asks for untrained ones (tests only)."""
    model: TransformerConfig | None = None
    text: TextConfig | None = None
    text_weights: str | None = None
    """Folder of a pretrained text encoder and its tokenizer, where the encoder has weights.
    Needed unless there is a `text_cache`, and for previews in any case."""
    text_cache: str | None = None
    """Precomputed text embeddings to read instead of running the text encoder."""
    latent_cache: str | None = None
    """Precomputed latents (`kinema latents encode`) to read instead of videos."""
    diffusion: ProcessConfig | None = None
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()

    optim: OptimConfig = OptimConfig()
    ema_decay: float | None = 0.9999
    """Of the average of the weights, per step; null keeps none."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the networks; weights, their average and the optimizer stay float32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that are recomputed in the backward pass: none; all but the results of attention
    and matrix products that cost most (selective); or everything inside blocks (full: the least
    memory for a third more work)."""
    recompute_every: int = 1
    """Only every so-manyth block recomputes; 1 is all of them."""
    compile: bool = False
    """Compile the blocks with `torch.compile`: faster steps after minutes of waiting at the first
    of each shape."""
    freeze: tuple[str, ...] = ()
    """Modules or parameters that are not trained, by name; `*` stands for one part of a dotted
    name (`blocks.*.cross_attn`)."""
    accumulation: int = 1
    """Micro-batches per rank and step; each weighs the same."""

    epochs: int = 1
    """Passes over the data; the run ends at `epochs` or `max_steps`, whichever comes first."""
    max_steps: int | None = None
    seed: int = 42
    outputs: str = "outputs"
    """Folder that run folders are made in."""
    log_every: int = 10
    ckpt_every: int = 1000
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int | None = None
    """How many of the newest checkpoints stay; null keeps all."""
    async_save: bool = True
    """Write checkpoints beside training: steps wait only while tensors are copied."""
    warm_up: Literal["auto", "yes", "no"] = "auto"
    """Run every bucket's largest micro-batch once before step one, the largest first, so that what
    does not fit fails at once; auto is yes on GPUs."""
    guard: GuardConfig | None = None
    watchdog: WatchdogConfig | None = WatchdogConfig()
    validation: ValidationConfig | None = None
    preview: PreviewConfig | None = None
    tracking: TrackingConfig = TrackingConfig()
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables that `kinema cluster launch` sets for this recipe."""

    def __post_init__(self) -> None:
        diffusing = {"model": self.model, "text": self.text, "diffusion": self.diffusion}
        if isinstance(self.task, VAETask):
            given = [k for k, v in diffusing.items() if v is not None]
            others = (
                *("text_weights", "text_cache", "latent_cache", "vae_weights", "preview"),
                *("validation", "ema_decay"),
            )
            given += [k for k in others if getattr(self, k) is not None]
            if given:
                names = ", ".join(given)
                raise ValueError(f"the vae task has no use for: {names} (leave out, or null)")
            if not isinstance(self.vae, VideoVAEConfig):
                raise ValueError(
                    "the vae task trains video autoencoders: vae type opensora-vae-1.2"
                )
            if self.parallel != ParallelConfig():
                raise ValueError("the vae task trains on whole copies: leave `parallel` out")
        else:
            missing = [k for k, v in diffusing.items() if v is None]
            if missing:
                raise ValueError(f"the text-to-video task needs: {', '.join(missing)}")
            self._check_components(self.task)
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; at least 0 and below 1, or null")
        if self.recompute == "none" and self.recompute_every != 1:
            raise ValueError("recompute_every has no effect with recompute: none; leave it out")
        for key in ("accumulation", "epochs", "log_every", "ckpt_every", "recompute_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        for key in ("max_steps", "keep_checkpoints"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} is {value}; at least 1, or null for no limit")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to 2^63 - 1")
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"name is {self.name!r}; it becomes part of a folder's name")

    def _check_components(self, task: TextToVideoTask) -> None:
        """Whether model, autoencoder, text encoder and diffusion fit each other."""
        if self.latent_cache is not None and task.remember_latents:
            raise ValueError("task.remember_latents has no effect with a latent_cache")
        assert self.model is not None
        assert self.text is not None
        assert self.diffusion is not None
        if isinstance(self.model, STDiT3Config) and self.model.skip_y_embedder:
            raise ValueError("model.skip_y_embedder needs projected text, which training has not")
        if self.model.in_channels != self.vae.latent_channels:
            raise ValueError(
                f"model.in_channels is {self.model.in_channels}, "
                f"but the autoencoder's latents have {self.vae.latent_channels} channels"
            )
        if task.masks.ratios()["identity"] < 1 and not self.model.uses_frame_mask:
            raise ValueError(
                f"task.masks keeps frames clean, which model type `{self.model.type}` with patches "
                f"of {self.model.patch_size[0]} frames cannot be told of: leave masks out"
            )
        problem = mismatch(self.model, self.text) or process_mismatch(
            self.diffusion, channels=self.model.in_channels, pred_sigma=self.model.pred_sigma
        )
        if problem:
            raise ValueError(problem)
        self._check_text(self.text)

    def _check_text(self, text: TextConfig) -> None:
        if isinstance(text, (T5TextConfig, CLIPTextConfig)):
            if self.preview is not None and self.text_weights is None:
                raise ValueError(
                    f"preview needs the text encoder itself: text_weights, of type `{text.type}`"
                )
        elif self.text_weights is not None:
            raise ValueError(f"text type `{text.type}` has no weights: leave text_weights out")
        if self.text_cache is not None and isinstance(text, (CLIPTextConfig, ClassTextConfig)):
            raise ValueError(f"text type `{text.type}` needs no text_cache: leave it out")
