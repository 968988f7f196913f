"""The autoencoders of all generations against the originals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kinema.config.settings import from_dict
from kinema.models.config import ImageVAEConfig, VAE2DConfig, VideoVAEConfig
from kinema.models.image_vae import ImageVAE
from kinema.models.vae import SpatialVAE, VideoVAE
from tests.parity.case import Case, adapter

FIXED_2D = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
"""Settings of diffusers' class that ours does not have, and the only value it supports."""
BLOCKS_2D = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
IGNORED_2D = (
    "sample_size",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "force_upcast",
)
"""Settings that the class stores for its users; they change nothing in it."""
OURS = ("micro_frame_size", "micro_batch_size", "shift", "scale", "spatial_scaling")


def config_2d(given: dict[str, Any]) -> dict[str, Any]:
    # Names that begin with "_" say which class and version wrote the settings.
    plain = {k: v for k, v in given.items() if k not in IGNORED_2D and not k.startswith("_")}
    for key, name in BLOCKS_2D.items():
        blocks = plain.pop(key, [name])
        assert set(blocks) == {name}, f"{key} with others than {name} are not supported"
    for key, value in FIXED_2D.items():
        assert plain.pop(key, value) == value, f"{key} other than {value} is not supported"
    return plain


def video_vae_config(given: dict[str, Any]) -> VideoVAEConfig:
    plain = {k: given[k] for k in OURS if k in given}
    plain["vae_2d"] = config_2d(given["vae_2d"])
    temporal = dict(given["vae_temporal"])
    channels = temporal.pop("in_out_channels", None)
    assert channels in (None, given["vae_2d"]["latent_channels"])
    return from_dict(VideoVAEConfig, plain | {"vae_temporal": temporal})


def per_video(noise: Tensor, batch: int) -> Tensor:
    """`[(B T), C, h, w]`, as the original draws it, to our `[B, C, T, h, w]`."""
    return noise.unflatten(0, (batch, -1)).transpose(1, 2)


@adapter(r"v1\.2 opensora\.models\.vae\.vae\.VideoAutoencoderPipeline", kind="safetensors")
def video_vae(case: Case) -> None:
    vae = VideoVAE(video_vae_config(case.config)).eval()
    weights = case.group("weight")
    for name, factor in case.config.get("multiply_weights_before_running", {}).items():
        weights[name] = weights[name] * factor
    vae.load_state_dict(weights, strict=True)
    video = case.input("video")
    noise = tuple(
        case.input(f"noise_{part}") if case.has(f"in.noise_{part}") else None
        for part in ("spatial", "temporal")
    )
    noise = (None if noise[0] is None else per_video(noise[0], len(video)), noise[1])
    with torch.no_grad():
        if case.config.get("cal_loss"):
            training_forward(case, vae, video, noise)
            return
        z = case.input("z") if case.has("in.z") else vae.encode(video)
        size = vae.config.latent_size(*video.shape[2:])
        assert z.shape[2:] == size
        outputs = {
            "out.z_mean": lambda: vae.encode(video),
            "out.z_sample": lambda: vae.encode(video, noise=noise),
            "out.x_z_mean": lambda: vae.spatial_vae.encode(video),
            "out.video": lambda: vae.decode(z, video.shape[2]),
        }
        case.check_each(outputs)


def training_forward(
    case: Case, vae: VideoVAE, video: Tensor, noise: tuple[Tensor | None, Tensor | None]
) -> None:
    got = vae(video, noise=noise)
    case.check_each(
        {
            "out.x_rec": lambda: got.video,
            "out.x_z_rec": lambda: got.spatial_latents_rec,
            "out.z": lambda: got.z,
            "out.x_z": lambda: got.spatial_latents,
            "out.mean": lambda: got.posterior.mean,
            "out.logvar": lambda: got.posterior.logvar,
            "out.kl": lambda: got.posterior.kl(),
        }
    )


@adapter(r"\bVideoAutoencoderKL$", kind="safetensors")
def spatial_vae(case: Case) -> None:
    """The original's one class is two of ours: part of the video autoencoder, and on its own."""
    config = from_dict(VAE2DConfig, config_2d(case.config["vae_2d"]))
    micro_batch_size = case.config.get("micro_batch_size")
    part = SpatialVAE(
        config,
        scaling=VideoVAEConfig().spatial_scaling,  # whatever the 2D settings say
        micro_batch_size=micro_batch_size,
    )
    alone = ImageVAE(ImageVAEConfig(vae_2d=config, micro_batch_size=micro_batch_size))
    weights = case.group("weight")
    prefix = "spatial_vae."
    if any(k.startswith(prefix) for k in weights):  # a file that is shared with the video VAE's
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    part.module.load_state_dict(
        {k.removeprefix("module."): v for k, v in weights.items()}, strict=True
    )
    alone.load_state_dict(part.module.state_dict(), strict=True)
    video = case.input("video")
    noise = case.input("noise_spatial") if case.has("in.noise_spatial") else None
    noise = None if noise is None else per_video(noise, len(video))
    with torch.no_grad():
        case.check_each(
            {
                "out.z_mean": lambda: part.encode(video),
                "out.z_sample": lambda: part.encode(video, noise),
                "out.video": lambda: part.decode(case.input("z")),
            }
        )
        case.check_each(
            {
                "out.z_mean": lambda: alone.encode(video),
                "out.z_sample": lambda: alone.encode(video, noise=noise),
                "out.video": lambda: alone.decode(case.input("z"), case.input("z").shape[2]),
            }
        )


@adapter(r"v1\.2 VideoAutoencoderPipeline\.get_latent_size$", kind="json")
def latent_size(case: Case) -> None:
    rows = case.table()
    assert rows
    for row in rows:
        config = VideoVAEConfig(micro_frame_size=row["micro_frame_size"])
        # The original passes an unknown size through as None; ours are always known.
        known = config.latent_size(*(64 if n is None else n for n in row["input"]))
        got = [None if n is None else size for n, size in zip(row["input"], known, strict=True)]
        assert got == row["latent"], row


@adapter(r"v1\.2 OpenSoraVAE_V1_2\(\)$", kind="json")
def released_names(case: Case) -> None:
    with torch.device("meta"):
        vae = VideoVAE(video_vae_config(case.config))
    table = case.table()
    want = {name: (tuple(shape), dtype) for name, (shape, dtype, _) in table["keys"].items()}
    got = {
        name: (tuple(t.shape), str(t.dtype).removeprefix("torch."))
        for name, t in vae.state_dict().items()
    }
    assert got == want
    buffers = {name for name, (_, _, kind) in table["keys"].items() if kind == "buffer"}
    assert {name for name, _ in vae.named_buffers()} == buffers
    assert sum(p.numel() for p in vae.parameters()) == table["num_parameters"]
