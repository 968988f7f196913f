"""Encoding of videos that several ranks share: each takes some clips, or chunks of them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kinema.models.autoencoder import Autoencoder, VideoPart
from kinema.parallel.sequence import SequenceGroups


@torch.no_grad()
def encode_shared(
    vae: Autoencoder, video: Tensor, generator: torch.Generator, groups: SequenceGroups
) -> Tensor:
    """Normalised latents, drawn from the posterior; every sharing rank gets all of them.

    Args:
        video: `[B, 3, T, H, W]` in [-1, 1], all of it and the same on every sharing rank.
        generator: of the posterior's noise, on the video's device, in the same state on every
            sharing rank.
        groups: the present degree counts.

    Returns:
        float32 `[B, C, t, h, w]`, what a rank alone would get.

    Raises:
        KinemaError: the frames are smaller than one latent position.
    """
    if groups.degree == 1:
        return vae.encode(video, noise=generator).float()
    shares = deal(vae, len(video), video.shape[2], groups.degree)
    mine = vae.encode_parts(video, shares[groups.rank], noise=generator)
    size = vae.config.latent_size(*video.shape[2:])
    latents = video.new_empty(len(video), vae.config.latent_channels, *size, dtype=torch.float32)
    # In buffers of one length, so that one gathering does for all.
    longest = max(sum(latents[p.clips, :, p.latent_frames].numel() for p in s) for s in shares)
    sent = latents.new_zeros(longest)
    if mine:
        flat = torch.cat([part.float().flatten() for part in mine])
        sent[: len(flat)] = flat
    for share, received in zip(shares, groups.stack(sent), strict=True):
        for part in share:
            target = latents[part.clips, :, part.latent_frames]
            target.copy_(received[: target.numel()].view(target.shape))
            received = received[target.numel() :]
    return latents


def deal(vae: Autoencoder, clips: int, frames: int, ranks: int) -> list[list[VideoPart]]:
    """Who encodes what: each rank a run of chunks, as many as the others or one fewer.

    Args:
        clips: B.
        frames: T.
    """
    chunks = list(vae.chunks(frames))
    total = clips * len(chunks)
    bounds = [rank * total // ranks for rank in range(ranks + 1)]
    return [_parts(chunks, *ends) for ends in pairwise(bounds)]


def _parts(chunks: list[tuple[slice, slice]], start: int, stop: int) -> list[VideoPart]:
    """Chunks `start` to `stop` of all clips' chunks, in few parts: whole clips are one."""
    parts = []
    while start < stop:
        clip, first = divmod(start, len(chunks))
        count = min(len(chunks) - first, stop - start)
        clips = max((stop - start) // len(chunks), 1) if first == 0 else 1
        frames, latent_frames = zip(*chunks[first : first + count], strict=True)
        parts.append(VideoPart(slice(clip, clip + clips), _hull(frames), _hull(latent_frames)))
        start += clips * count
    return parts


def _hull(slices: tuple[slice, ...]) -> slice:
    return slice(slices[0].start, slices[-1].stop)
