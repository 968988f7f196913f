"""The released checkpoints of the 1.x generations: what each is, was trained on, and where it is.

Facts only, readable without torch. Sources: the published recipes (sampling defaults, sizes of
training), the reports and README files of the authors (which lengths were trained, which want
several GPUs), and the download tables of the original code (file names). Nothing could be
downloaded here: `docs/released.md` says for each checkpoint what was run and what was not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from kinema.checkpoint.places import HubFiles, Wanted
from kinema.config.errors import KinemaError
from kinema.diffusion.config import IDDPMConfig, RectifiedFlowConfig
from kinema.generation.config import PipelineConfig, TextComponent, TrainedSize, VAEComponent
from kinema.models.config import (
    ClassTextConfig,
    DiTConfig,
    ImageVAEConfig,
    LatteConfig,
    PixArtConfig,
    STDiT2Config,
    STDiT3Config,
    STDiTConfig,
    T5TextConfig,
    VideoVAEConfig,
)

SIZES = {
    "144p": (256, 144),
    "240p": (424, 240),
    "256": (256, 256),
    "360p": (640, 360),
    "480p": (848, 480),
    "512": (512, 512),
    "720p": (1280, 720),
    "1024": (1024, 1024),
    "1080p": (1920, 1080),
    "2048": (2048, 2048),
}
"""(width, height) of named resolutions, 16:9 or square, whole in the autoencoders' stride of 8."""

GENERATIONS = {
    "1.0": "Open-Sora 1.0: STDiT, 16 frames",
    "1.1": "Open-Sora 1.1: STDiT2, any size, references",
    "1.2": "Open-Sora 1.2: STDiT3, rectified flow, video autoencoder",
    "2.0": "Open-Sora 2.0: not in this version",
    "DiT": "DiT: images of ImageNet's classes",
    "Latte": "Latte: clips of UCF-101's classes",
    "PixArt": "PixArt-alpha and -Sigma: images, the start of Open-Sora's own training",
}
"""Generations and families. 2.0 has its place here and no checkpoint yet."""


@dataclass(frozen=True)
class Lengths:
    """Numbers of frames at one named resolution (every aspect ratio of it)."""

    resolution: str
    frames: tuple[int, ...]
    """1 is an image."""


@dataclass(frozen=True)
class Released:
    """One published checkpoint."""

    name: str
    """As it is given to `--model`."""
    generation: str
    """Key of `GENERATIONS`."""
    title: str
    config: PipelineConfig
    """All that is needed to generate; `buckets` has the trained shapes in 16:9 or square."""
    model: HubFiles
    vae: HubFiles
    text: HubFiles | None
    """None: nothing to load (classes)."""
    trained: tuple[Lengths, ...]
    extrapolates: tuple[Lengths, ...] = ()
    """Works according to the authors, but was not trained."""
    several_gpus: tuple[Lengths, ...] = ()
    """Needs more than one GPU of 80 GB in the original, by the authors' word."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReleasedFiles:
    """Where the weights of a released checkpoint are on this machine."""

    model: Path
    vae: Path
    text: Path | None
    """Folder of the text encoder and its tokenizer; None if there is nothing to load."""


def _buckets(default: tuple[str, int], trained: tuple[Lengths, ...]) -> tuple[TrainedSize, ...]:
    """Every trained shape, the default one first."""
    pairs = [(row.resolution, n) for row in trained for n in row.frames]
    assert default in pairs, f"the default {default} was not trained"
    pairs.sort(key=lambda pair: pair != default)
    return tuple(
        TrainedSize(width=SIZES[name][0], height=SIZES[name][1], num_frames=n) for name, n in pairs
    )


_IN_TABLE = "named in the download table of the original code"
_IN_README = "named in the authors' README"

_SD_VAE = HubFiles(
    "stabilityai/sd-vae-ft-ema",
    ("diffusion_pytorch_model.safetensors",),
    verified="named in the original recipes; the file in many public scripts",
)
_SDXL_VAE = HubFiles(
    "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
    ("vae/diffusion_pytorch_model.safetensors",),
    verified="repository and folder named in the original recipes; the file's name is diffusers' "
    "usual one",
)
T5_XXL = HubFiles(
    "DeepFloyd/t5-v1_1-xxl",
    ("config.json", "pytorch_model.bin.index.json", "spiece.model"),
    optional=("tokenizer_config.json", "special_tokens_map.json"),
    verified="named in the original recipes and the authors' README",
)

_STDIT_VAE = VAEComponent(config=ImageVAEConfig())


def _t5(max_tokens: int) -> TextComponent:
    return TextComponent(config=T5TextConfig(max_tokens=max_tokens))


def _opensora_1_0(name: str, file: str, side: int, title: str) -> Released:
    trained = (Lengths(str(side), (16,)),)
    return Released(
        name=name,
        generation="1.0",
        title=title,
        config=PipelineConfig(
            model=STDiTConfig(
                input_size=(16, side // 8, side // 8), space_scale=0.5 if side == 256 else 1.0
            ),
            vae=_STDIT_VAE,
            text=_t5(120),
            diffusion=IDDPMConfig(num_sampling_steps=100, cfg_scale=7.0, cfg_channel=3),
            buckets=_buckets((str(side), 16), trained),
            fps=8.0,
            # Clips of 16 frames, every third of the source; the model is told no frame rate.
            condition_frame_length=4,
        ),
        model=HubFiles("hpcai-tech/Open-Sora", (file,), verified=_IN_TABLE),
        vae=_SD_VAE,
        text=T5_XXL,
        trained=trained,
        notes=("`opensora-1.0-64` is the published 64-frame setting",) if side == 512 else (),
    )


def _opensora_1_0_64(weights: Released) -> Released:
    """The recipe of inference for 64x512x512: the 16-frame weights, positions in time closer."""
    model = weights.config.model
    assert isinstance(model, STDiTConfig)
    config = replace(
        weights.config,
        model=replace(model, input_size=(64, *model.input_size[1:]), time_scale=2 / 3),
        buckets=(TrainedSize(width=512, height=512, num_frames=64),),  # the setting's own size
        fps=12.0,
    )
    return replace(
        weights,
        name="opensora-1.0-64",
        title="Open-Sora 1.0, the published setting for 64x512x512",
        config=config,
        trained=(),
        extrapolates=(Lengths("512", (64,)),),
        notes=(
            "the weights are those of opensora-1.0, trained on 16 frames; weights trained in this "
            "setting were not published",
        ),
    )


_OPENSORA_1_0 = _opensora_1_0(
    "opensora-1.0",
    "OpenSora-v1-HQ-16x512x512.pth",
    512,
    "Open-Sora 1.0, 16x512x512, high quality",
)


_STAGE2_1_1 = (
    Lengths("144p", (1, 16, 32, 64, 128)),
    Lengths("256", (1, 16, 32, 64, 128)),
    Lengths("240p", (1, 16, 32, 64, 128)),
    Lengths("512", (1, 16, 32, 64)),
    Lengths("480p", (1, 16)),
    Lengths("720p", (1, 16)),
    Lengths("1024", (1,)),
    Lengths("1080p", (1,)),
)
_STAGE3_1_1 = (
    Lengths("144p", (1, 16, 32, 64, 128)),
    Lengths("256", (1, 16, 32, 64, 128)),
    Lengths("240p", (1, 16, 32, 64, 128)),
    Lengths("360p", (1, 16, 32, 64, 128)),
    Lengths("512", (1, 16, 32, 64, 128)),
    Lengths("480p", (1, 16, 32, 64)),
    Lengths("720p", (1, 16, 32)),
    Lengths("1024", (1,)),
)


def _opensora_1_1(
    name: str, stage: int, title: str, trained: tuple[Lengths, ...], beyond: tuple[Lengths, ...]
) -> Released:
    return Released(
        name=name,
        generation="1.1",
        title=title,
        config=PipelineConfig(
            model=STDiT2Config(),
            vae=_STDIT_VAE,
            text=_t5(200),
            diffusion=IDDPMConfig(
                num_sampling_steps=100, cfg_scale=7.0, cfg_channel=3, tables="float32"
            ),
            buckets=_buckets(("240p", 16), trained),
            any_aspect_ratio=True,
            fps=24.0,
            frame_interval=3,
            condition_frame_length=4,
        ),
        model=HubFiles(
            f"hpcai-tech/OpenSora-STDiT-v2-stage{stage}",
            ("model.safetensors",),
            verified=f"repository {_IN_README}; the file in public scripts",
        ),
        vae=_SD_VAE,
        text=T5_XXL,
        trained=trained,
        extrapolates=beyond,
        notes=(
            "the authors name known problems: long clips may fail, high resolutions come out noisy",
        ),
    )


_TRAINED_1_2 = (
    Lengths("240p", (1, 51, 102, 204, 408)),
    Lengths("144p", (1, 51, 102, 204, 408)),
    Lengths("256", (1, 51, 102, 204, 408)),
    Lengths("360p", (1, 51, 102, 204, 408)),
    Lengths("512", (1, 51, 102, 204, 408)),
    Lengths("480p", (1, 51, 102, 204)),
    Lengths("720p", (1, 51, 102)),
    Lengths("1024", (1, 51, 102)),
    Lengths("1080p", (1,)),
    Lengths("2048", (1,)),
)
_BEYOND_1_2 = (Lengths("480p", (408,)), Lengths("720p", (204, 408)))

_OPENSORA_1_2 = Released(
    name="opensora-1.2",
    generation="1.2",
    title="Open-Sora 1.2, stage 3: STDiT3, 1.2B",
    config=PipelineConfig(
        model=STDiT3Config(),
        vae=VAEComponent(config=VideoVAEConfig()),
        text=_t5(300),
        diffusion=RectifiedFlowConfig(
            use_timestep_transform=True, num_sampling_steps=30, cfg_scale=7.0
        ),
        buckets=_buckets(("240p", 51), _TRAINED_1_2),
        any_aspect_ratio=True,
        fps=24.0,
        align=5,
        condition_frame_length=5,
        aes=6.5,
    ),
    model=HubFiles(
        "hpcai-tech/OpenSora-STDiT-v3",
        ("model.safetensors",),
        verified=f"repository {_IN_README}; the file in public scripts",
    ),
    vae=HubFiles(
        "hpcai-tech/OpenSora-VAE-v1.2",
        ("model.safetensors",),
        verified=f"repository {_IN_README}; the file in public scripts",
    ),
    text=T5_XXL,
    trained=_TRAINED_1_2,
    extrapolates=_BEYOND_1_2,
    several_gpus=_BEYOND_1_2,
    notes=("2 s are 51 frames, 4 s 102, 8 s 204, 16 s 408, at 24 frames per second",),
)


def _dit(side: int) -> Released:
    trained = (Lengths(str(side), (1,)),)
    return Released(
        name=f"dit-xl2-{side}",
        generation="DiT",
        title=f"DiT-XL/2, ImageNet at {side}x{side}",
        config=PipelineConfig(
            model=DiTConfig(
                condition="label_1000",
                input_size=(1, side // 8, side // 8),
                no_temporal_pos_emb=True,
            ),
            vae=_STDIT_VAE,
            text=TextComponent(config=ClassTextConfig(num_classes=1000)),
            diffusion=IDDPMConfig(sampler="dpm-solver", num_sampling_steps=20, cfg_scale=4.0),
            buckets=_buckets((str(side), 1), trained),
            fps=1.0,
        ),
        model=HubFiles(
            f"facebook/DiT-XL-2-{side}",
            ("transformer/diffusion_pytorch_model.bin",),
            verified="repository named in public scripts, the file is diffusers' usual name",
            elsewhere=f"https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-{side}x{side}.pt",
        ),
        vae=_SD_VAE,
        text=None,
        trained=trained,
        notes=("the prompt is a class number, 0 to 999",),
    )


_UCF = (Lengths("256", (16,)),)
_LATTE = Released(
    name="latte-xl2-ucf101",
    generation="Latte",
    title="Latte-XL/2, UCF-101 at 16x256x256",
    config=PipelineConfig(
        model=LatteConfig(condition="label_101", input_size=(16, 32, 32)),
        vae=_STDIT_VAE,
        text=TextComponent(config=ClassTextConfig(num_classes=101)),
        diffusion=IDDPMConfig(sampler="dpm-solver", num_sampling_steps=20, cfg_scale=4.0),
        buckets=_buckets(("256", 16), _UCF),
        fps=8.0,
    ),
    model=HubFiles("maxin-cn/Latte", ("ucf101.pt",), verified=_IN_TABLE),
    vae=_SD_VAE,
    text=None,
    trained=_UCF,
    notes=("the prompt is a class number, 0 to 100",),
)


def _pixart_alpha(name: str, side: int, file: str, title: str) -> Released:
    trained = (Lengths(str(side), (1,)),)
    return Released(
        name=name,
        generation="PixArt",
        title=title,
        config=PipelineConfig(
            model=PixArtConfig(
                model_max_length=120,
                input_size=(1, side // 8, side // 8),
                space_scale=2.0 if side == 1024 else 1.0,
                size_conditions=side == 1024,
            ),
            vae=_STDIT_VAE,
            text=_t5(120),
            diffusion=IDDPMConfig(sampler="dpm-solver", num_sampling_steps=20, cfg_scale=7.0),
            buckets=_buckets((str(side), 1), trained),
            any_aspect_ratio="-MS" in file,
            fps=1.0,
        ),
        model=HubFiles("PixArt-alpha/PixArt-alpha", (file,), verified=_IN_TABLE),
        vae=_SD_VAE,
        text=T5_XXL,
        trained=trained,
    )


def _pixart_sigma(name: str, side: int, file: str, title: str) -> Released:
    trained = (Lengths(str(side), (1,)),)
    return Released(
        name=name,
        generation="PixArt",
        title=title,
        config=PipelineConfig(
            model=PixArtConfig(
                model_max_length=300,
                input_size=(1, side // 8, side // 8),
                # 0.5 at 256 pixels, 1 at 512, 2 at 1024, 4 at 2048 (`pe_interpolation`).
                space_scale=side / 512,
            ),
            # PixArt-Sigma was trained on SDXL's latents with SDXL's own factor, unlike what
            # Open-Sora does with the same autoencoder.
            vae=VAEComponent(config=ImageVAEConfig(scaling_factor=0.13025)),
            text=_t5(300),
            diffusion=IDDPMConfig(sampler="dpm-solver", num_sampling_steps=20, cfg_scale=4.5),
            buckets=_buckets((str(side), 1), trained),
            any_aspect_ratio="-MS" in file,
            fps=1.0,
        ),
        model=HubFiles("PixArt-alpha/PixArt-Sigma", (file,), verified=_IN_TABLE),
        vae=_SDXL_VAE,
        text=T5_XXL,
        trained=trained,
        notes=("steps and guidance are PixArt's own; Open-Sora publishes none for these weights",),
    )


RELEASED: tuple[Released, ...] = (
    _OPENSORA_1_2,
    _opensora_1_1(
        "opensora-1.1",
        3,
        "Open-Sora 1.1, stage 3: STDiT2, 144p to 720p",
        _STAGE3_1_1,
        (Lengths("480p", (128,)), Lengths("720p", (64, 96))),
    ),
    _opensora_1_1(
        "opensora-1.1-stage2",
        2,
        "Open-Sora 1.1, stage 2: STDiT2, mainly 144p and 240p",
        _STAGE2_1_1,
        (Lengths("512", (128,)), Lengths("480p", (32,)), Lengths("720p", (32,))),
    ),
    _OPENSORA_1_0,
    _opensora_1_0_64(_OPENSORA_1_0),
    _opensora_1_0(
        "opensora-1.0-hq-256",
        "OpenSora-v1-HQ-16x256x256.pth",
        256,
        "Open-Sora 1.0, 16x256x256, high quality",
    ),
    _opensora_1_0(
        "opensora-1.0-256", "OpenSora-v1-16x256x256.pth", 256, "Open-Sora 1.0, 16x256x256"
    ),
    _dit(256),
    _dit(512),
    _LATTE,
    _pixart_alpha("pixart-alpha-256", 256, "PixArt-XL-2-256x256.pth", "PixArt-alpha XL/2, 256x256"),
    _pixart_alpha("pixart-alpha-512", 512, "PixArt-XL-2-512x512.pth", "PixArt-alpha XL/2, 512x512"),
    _pixart_alpha(
        "pixart-alpha-1024",
        1024,
        "PixArt-XL-2-1024-MS.pth",
        "PixArt-alpha XL/2, about 1024x1024 in many aspect ratios",
    ),
    _pixart_sigma(
        "pixart-sigma-256", 256, "PixArt-Sigma-XL-2-256x256.pth", "PixArt-Sigma XL/2, 256x256"
    ),
    _pixart_sigma(
        "pixart-sigma-512",
        512,
        "PixArt-Sigma-XL-2-512-MS.pth",
        "PixArt-Sigma XL/2, about 512x512 in many aspect ratios",
    ),
    _pixart_sigma(
        "pixart-sigma-1024",
        1024,
        "PixArt-Sigma-XL-2-1024-MS.pth",
        "PixArt-Sigma XL/2, about 1024x1024 in many aspect ratios",
    ),
    _pixart_sigma(
        "pixart-sigma-2k",
        2048,
        "PixArt-Sigma-XL-2-2K-MS.pth",
        "PixArt-Sigma XL/2, about 2048x2048 in many aspect ratios",
    ),
)
"""All of them; the first of a generation is the one to take without a reason for another."""


def find_released(name: str) -> Released:
    """A released checkpoint by its name.

    Raises:
        KinemaError: no such name; names the nearest, and says so of generations to come.
    """
    by_name = {r.name: r for r in RELEASED}
    if name in by_name:
        return by_name[name]
    if name.startswith("opensora-2"):
        raise KinemaError(
            f"{name}: Open-Sora 2.0 is not in this version",
            where="--model",
            hint="opensora-1.2 is the newest; `kinema models` lists all",
        )
    near = get_close_matches(name.lower(), by_name, n=1, cutoff=0.5)
    raise KinemaError(
        f"{name!r} is no released checkpoint",
        where="--model",
        hint=f"did you mean {near[0]}? `kinema models` lists all"
        if near
        else "`kinema models` lists all",
    )


def locate(
    released: Released,
    *,
    ckpt: str | Path | None = None,
    vae: str | Path | None = None,
    text: str | Path | None = None,
    offline: bool = False,
) -> ReleasedFiles:
    """Where the weights are: given by hand, in the hub's cache, or downloaded into it now.

    Args:
        ckpt: the transformer's weights: a file, a folder, `owner/repository` or
            `owner/repository/file` of the hub (with `@revision`); None: as published.
        vae: the autoencoder's, likewise.
        text: folder of the text encoder and its tokenizer, or a repository.
        offline: take nothing from the network, and say at once all that is missing.

    Raises:
        KinemaError: not there, or it cannot be downloaded.
    """
    from kinema.checkpoint.hub import resolve

    found = resolve(wanted(released, ckpt=ckpt, vae=vae, text=text), offline=offline)
    return ReleasedFiles(found["model"], found["vae"], found.get("text"))


def wanted(
    released: Released,
    *,
    ckpt: str | Path | None = None,
    vae: str | Path | None = None,
    text: str | Path | None = None,
) -> dict[str, Wanted]:
    """What `locate` looks for, by its role: model, vae, text."""
    roles = {
        "model": Wanted(
            "the transformer", "--ckpt-path", released.model, ckpt, within="transformer"
        ),
        "vae": Wanted("the autoencoder", "--vae", released.vae, vae, within="vae"),
    }
    if released.text is not None:
        roles["text"] = Wanted("the text encoder", "--text", released.text, text, folder=True)
    return roles
