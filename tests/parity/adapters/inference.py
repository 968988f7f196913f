"""Prompts, mask strategies and references of 1.2's inference script, on our code."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import astuple
from pathlib import PurePosixPath
from typing import Any

import pytest
import torch
from torch import Tensor

from kinema.config.errors import KinemaError
from kinema.generation.config import GenerateRequest
from kinema.generation.engine import clip_shape
from kinema.generation.mask_strategy import (
    condition,
    continue_from,
    nearest_point,
    overlap_frames,
    parse,
)
from kinema.generation.names import published_stem
from kinema.generation.prompts import (
    add_scores,
    join_segments,
    split_json,
    split_segments,
    text_of_segment,
)
from kinema.models.config import VideoVAEConfig
from tests.parity.case import Case, adapter
from tests.parity.exceptions import DEFECTS_NOT_COPIED


@adapter(r"inference_utils\.apply_mask_strategy$")
def apply_mask_strategy(case: Case) -> None:
    config, z = case.config, case.input("z")
    rows, masks = [], []
    for i, strategy in enumerate(config["mask_strategy"]):
        given = condition(
            parse(strategy), _references(case, i), config["loop_i"], z.shape[1:], config["align"]
        )
        if given is None:
            rows.append(z[i])
            masks.append(torch.ones(z.shape[2]))
            continue
        row = torch.where(given.mask[:, None, None] < 1, given.latents, z[i])
        rows.append(_started_anew(case, i, row, given.latents, given.mask))
        masks.append(given.mask)
    case.check("out.z", torch.stack(rows))
    case.check("out.mask", torch.stack(masks))


def _references(case: Case, row: int) -> list[Tensor]:
    found = case.group(f"in.ref.{row}")
    return [found[str(k)] for k in range(len(found))]


def _started_anew(case: Case, row: int, ours: Tensor, latents: Tensor, mask: Tensor) -> Tensor:
    """Our row, but with the references where an edit ratio of 1 makes 1.2 start from them."""
    want = case.tensors["out.z"][row]
    defect = (mask == 1) & (want != ours).any(dim=0).flatten(1).any(dim=1)
    if defect.any():
        assert DEFECTS_NOT_COPIED.allows(case.official, "out.z edit ratio 1")
    return torch.where(defect[:, None, None], latents, ours)


@adapter(r"inference_utils\.append_generated$")
def append_generated(case: Case) -> None:
    config, video = case.config, case.input("video")
    scale, shift = re.findall(r"encode\(v\) = ([\d.]+)v([+-][\d.]+)", config["vae"])[0]
    numbers = []
    for i, strategy in enumerate(config["mask_strategy_in"]):
        # The references it starts with are only recorded among those it ends with.
        before = [case.tensors[f"out.ref.{i}.{k}"] for k in range(config["refs_in"][i] or 0)]
        placements, references = continue_from(
            parse(strategy),
            before,
            float(scale) * video[i] + float(shift),
            config["loop_i"],
            config["condition_frame_length"],
            config["condition_frame_edit"],
        )
        assert placements == parse(config["mask_strategy_out"][i])
        for k, reference in enumerate(references):
            case.check(f"out.ref.{i}.{k}", reference)
        numbers.append(len(references))
    case.check("out.num_refs", torch.tensor(numbers))


@adapter(r"^v1\.2 opensora\.utils\.inference_utils\b", kind="json")
def inference_functions(case: Case) -> None:
    table = case.table()
    assert table
    for name, rows in table.items():
        assert rows, name
        for row in rows:
            _FUNCTIONS[name](*row)


def _same(compute: Callable[[], Any], want: Any) -> None:
    """What our code gives; where the original raises, a message for a person."""
    if isinstance(want, dict) and want.keys() == {"error"}:
        with pytest.raises(KinemaError):
            compute()
    else:
        assert compute() == want


def _parse_mask_strategy(text: str | None, want: Any) -> None:
    _same(lambda: [list(astuple(p)) for p in parse(text)], want)


def _find_nearest_point(value: int, point: int, maximum: int, want: int) -> None:
    assert nearest_point(value, point, maximum) == want


def _dframe_to_frame(latent_frames: int, want: Any) -> None:
    # The original knows neither the autoencoder nor how long a segment is.
    vae = VideoVAEConfig()
    long = (latent_frames + 1) * (vae.micro_frame_size or 1)
    _same(lambda: overlap_frames(latent_frames, long, vae), want)


def _append_score_to_prompts(given: dict[str, Any], want: list[str]) -> None:
    prompts = given.pop("prompts")
    assert [add_scores(p, **given) for p in prompts] == want


def _extract_json_from_prompts(prompt: str, want: Any) -> None:
    def taken_apart() -> list[list[str]]:
        line = split_json(prompt)
        return [[line.text], [";".join(line.references or ())], [line.mask_strategy or ""]]

    _same(taken_apart, want)


def _extract_prompts_loop(prompt: str, segment: int, want: Any) -> None:
    # Spaces around a segment's text mean nothing: 1.2 strips them (split_prompt) before this.
    stripped = [text.strip() for text in want] if isinstance(want, list) else want
    _same(lambda: [text_of_segment(prompt, segment).strip()], stripped)


def _split_prompt(prompt: str, want: Any) -> None:
    _same(lambda: list(split_segments(prompt)), want)


def _merge_prompt(texts: list[str], starts: list[int] | None, want: str) -> None:
    assert join_segments(texts, starts) == want


def _get_save_path_name(given: dict[str, Any], want: str) -> None:
    stem = published_stem(
        number=given.get("sample_idx", 0),
        prompt=given.get("prompt", ""),
        sample_name=given.get("sample_name"),
        prompt_as_path=given.get("prompt_as_path", False),
        num_samples=given.get("num_sample", 1),
        sample=given.get("k", 0),
    )
    assert stem == PurePosixPath(want).name


def _prepare_multi_resolution_info(given: dict[str, Any], want: dict[str, Any]) -> None:
    # Our models take what they want of one description; 1.2 makes one for each kind of model.
    height, width = given["image_size"]
    request = GenerateRequest(
        prompt="a", width=width, height=height, num_frames=given["num_frames"], fps=given["fps"]
    )
    shape = clip_shape([request] * given["batch_size"], torch.device("cpu"))
    ours = {
        "height": shape.height,
        "width": shape.width,
        "num_frames": shape.num_frames,
        "fps": shape.fps,
        "hw": torch.stack([shape.height, shape.width], dim=1),
        "ar": shape.height / shape.width,
    }
    for name, value in want.items():
        assert ours[name].tolist() == torch.tensor(value).view_as(ours[name]).tolist(), name


_FUNCTIONS: dict[str, Callable[..., None]] = {
    "parse_mask_strategy": _parse_mask_strategy,
    "find_nearest_point": _find_nearest_point,
    "dframe_to_frame": _dframe_to_frame,
    "append_score_to_prompts": _append_score_to_prompts,
    "extract_json_from_prompts": _extract_json_from_prompts,
    "extract_prompts_loop": _extract_prompts_loop,
    "split_prompt": _split_prompt,
    "merge_prompt": _merge_prompt,
    "get_save_path_name": _get_save_path_name,
    "prepare_multi_resolution_info": _prepare_multi_resolution_info,
}
