"""A start from which a small autoencoder learns in minutes instead of hours.

With PyTorch's own initialisation, colour has to find its way through some thirty layers and four
normalisations; for the first hundreds of steps a small autoencoder only learns how bright a clip
is. Here it starts as nearly linear: latents are the mean colour of their block of pixels (and
frames), the decoder paints every block in its colour, and all that training has to add is detail.

How: three channels carry red, green and blue through every layer that is not inside a residual
branch (those end in zeros), three more carry the same with the sign reversed, and two hold a
constant. SiLU(x) - SiLU(-x) = x undoes the activations; the constants keep the normalisations
from dividing a clip's contrast away. All other weights are random and small.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kinema.config.errors import KinemaError
from kinema.models.config import VAEConfig, VideoVAEConfig
from kinema.models.image_vae import ImageVAE
from kinema.models.vae import VideoVAE
from kinema.models.vae_2d import Downsample, Upsample
from kinema.models.vae_temporal import CausalConv3d

COLOURS = 3
CARRIED = 2 * COLOURS + 2
"""Channels that pass through: colours, colours reversed, two constants."""
CONSTANT = 1.5
"""The two constants are plus and minus this."""
COLOUR_POWER = 0.4
"""Mean square of a colour value in [-1, 1] over ordinary clips."""
RANDOM_SHARE = 0.2
"""Size of the random weights beside those that carry, as a fraction of their usual size."""
SMOOTHING = (0.2, 0.6, 0.2)
"""Across a doubled picture: softens the steps between its blocks."""
LOGVAR = -6.0
"""Log-variance of the posteriors at the start: nearly no noise."""


def start_as_block_means(vae: VideoVAE | ImageVAE) -> None:
    """Set all weights so that latents are mean colours and the decoder paints them back.

    Random weights are drawn from PyTorch's global generator.

    Raises:
        KinemaError: a configuration in which the carried channels do not fit into one group.
    """
    _check(vae.config)
    spatial = vae if isinstance(vae, ImageVAE) else vae.spatial_vae.module
    down = [m.conv for m in vae.modules() if isinstance(m, Downsample)]
    up = [m.conv for m in vae.modules() if isinstance(m, Upsample)]
    first: list[nn.Module] = [spatial.encoder.conv_in, spatial.decoder.conv_in]
    constant = list(first)
    last: list[nn.Module] = [spatial.encoder.conv_out, spatial.decoder.conv_out]
    moments: list[nn.Conv2d | nn.Conv3d] = [spatial.quant_conv]
    latent: list[nn.Module] = [spatial.quant_conv, spatial.post_quant_conv]
    doubling: list[nn.Module] = []
    if isinstance(vae, VideoVAE):
        temporal = vae.temporal_vae
        strided = [c.conv for c in temporal.encoder.conv_blocks if isinstance(c, CausalConv3d)]
        doubling = [c.conv for c in temporal.decoder.conv_blocks if isinstance(c, CausalConv3d)]
        first += [temporal.encoder.conv_in.conv, temporal.decoder.conv1.conv]
        # The temporal encoder's first layer has no bias: its constants enter at the last stride.
        constant += [strided[-1], temporal.decoder.conv1.conv]
        last += [temporal.encoder.conv2.conv, temporal.decoder.conv_out.conv]
        moments += [temporal.quant_conv.conv]
        latent += [temporal.quant_conv.conv, temporal.post_quant_conv.conv]
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, nn.Linear):
                _residual(module, ends="to_out" in name)
            elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
                if _in_branch(name):
                    _residual(module, ends=".conv2" in name)
                    continue
                out, into = module.weight.shape[:2]
                if module in first:
                    carry = _split(out, into)
                elif module in last:
                    carry = _join(out, into)
                elif module in latent:
                    carry = torch.eye(out, into)
                else:
                    carry = _pass(out // 2 if module in doubling else out, into)
                    if module in doubling:  # two frames from each: rows 2c and 2c + 1
                        carry = carry.repeat_interleave(2, dim=0)
                _fill(
                    module, carry, taps=_taps(module, halves=module in down, softens=module in up)
                )
        for conv in constant:
            _bias(conv)[2 * COLOURS] = CONSTANT
            _bias(conv)[2 * COLOURS + 1] = -CONSTANT
        for conv in moments:
            half = conv.weight.shape[0] // 2
            conv.weight[half:] = 0
            _bias(conv)[half:] = LOGVAR


def _check(config: VAEConfig) -> None:
    space = config.vae_2d
    widths = [c // space.norm_num_groups for c in space.block_out_channels]
    channels = [config.latent_channels, space.latent_channels]
    if isinstance(config, VideoVAEConfig):
        time = config.vae_temporal
        widths += [time.filters * m // time.num_groups for m in time.channel_multipliers]
        channels.append(time.latent_embed_dim)
        if not any(time.temporal_downsample):
            raise KinemaError("needs a step that halves the frames", where="vae.vae_temporal")
    if min(widths) < CARRIED:
        raise KinemaError(
            f"the narrowest norm has {min(widths)} channels in a group; starting as block means "
            f"needs {CARRIED}",
            where="vae",
            hint="fewer groups (norm_num_groups, num_groups) or more channels",
        )
    if min(channels) < COLOURS:
        raise KinemaError(f"needs at least {COLOURS} latent channels", where="vae")


def _in_branch(name: str) -> bool:
    """Whether a convolution stands inside a residual branch (a shortcut does not)."""
    in_block = "resnets." in name or "res_blocks." in name
    return in_block and (".conv1" in name or ".conv2" in name)


def _bias(conv: nn.Module) -> Tensor:
    assert isinstance(conv, (nn.Conv2d, nn.Conv3d))
    assert conv.bias is not None
    return conv.bias


def _residual(layer: nn.Linear | nn.Conv2d | nn.Conv3d, *, ends: bool) -> None:
    """Random inside a branch, zero at its end, so that it starts as nothing."""
    if ends:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _split(out: int, into: int) -> Tensor:
    """Colours, and colours reversed."""
    carry = torch.zeros(out, into)
    for colour in range(COLOURS):
        carry[colour, colour], carry[COLOURS + colour, colour] = 1.0, -1.0
    return carry


def _join(out: int, into: int) -> Tensor:
    """Back from both signs to one, times what the norm before divided by."""
    spread = ((2 * COLOURS * COLOUR_POWER + 2 * CONSTANT**2) / into) ** 0.5
    carry = torch.zeros(out, into)
    for colour in range(COLOURS):
        carry[colour, colour], carry[colour, COLOURS + colour] = spread, -spread
    return carry


def _pass(out: int, into: int) -> Tensor:
    carry = torch.zeros(out, into)
    carry[:CARRIED, :CARRIED] = torch.eye(CARRIED)
    return carry


def _taps(conv: nn.Conv2d | nn.Conv3d, *, halves: bool, softens: bool) -> Tensor:
    """How much of a carried channel each tap of the kernel takes: 1 altogether."""
    taps = torch.zeros(conv.weight.shape[2:])
    if halves:
        taps[:2, :2] = 0.25
    elif softens:
        taps += torch.outer(torch.tensor(SMOOTHING), torch.tensor(SMOOTHING))
    else:
        middle = taps.shape[-1] // 2
        taps[..., middle, middle] = 1.0
        if isinstance(conv, nn.Conv3d):
            taps[:-1] = 0.0  # causal: the last tap is the present
    return taps


def _fill(conv: nn.Conv2d | nn.Conv3d, carry: Tensor, *, taps: Tensor) -> None:
    """Small random weights, but what carries goes through unmixed."""
    weight = conv.weight
    nn.init.normal_(weight, std=RANDOM_SHARE * weight[0].numel() ** -0.5)
    weight[carry.abs().sum(1) > 0] = 0
    weight += carry.view(*carry.shape, *[1] * taps.ndim) * taps
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
