"""Tiny CLIP, SigLIP, classifiers and predictors with random weights, in folders as the hub has
them; clips' strips of frames."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kinema.curation.stage import Places, Row
from tests.unit.models.text_folders import train_sentencepiece

SIZE = 24
"""Pixels of the side that the tiny networks see."""


def write_clip_model(folder: Path, *, seed: int = 0) -> Any:
    """A CLIP whose vectors have 12 channels; returns transformers' own model of it."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    names = letters + [f"{c}</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({n: i for i, n in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    ).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text = CLIPTextConfig(
        **sizes, vocab_size=len(names), num_attention_heads=2, max_position_embeddings=20,
        eos_token_id=2, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    vision = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=SIZE, patch_size=8)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    return _saved(lambda: CLIPModel(config), folder, seed)


def write_siglip_model(folder: Path, *, seed: int = 0) -> Any:
    """A SigLIP whose vectors have 16 channels; returns transformers' own model of it."""
    from transformers import SiglipConfig, SiglipModel, SiglipTokenizer
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    folder.mkdir(parents=True)
    train_sentencepiece(folder)
    SiglipTokenizer(str(folder / "spiece.model"), model_max_length=16).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text = {**sizes, "vocab_size": 200, "num_attention_heads": 2, "max_position_embeddings": 16}
    vision = {**sizes, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8}
    config = SiglipConfig(text_config=text, vision_config=vision)
    return _saved(lambda: SiglipModel(config), folder, seed)


def write_classifier(folder: Path, labels: Sequence[str], **settings: Any) -> Any:
    """A ViT with a class per label; returns transformers' own model of it."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder.mkdir(parents=True)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=SIZE, patch_size=8, id2label=dict(enumerate(labels)), **settings,
    )  # fmt: skip
    return _saved(lambda: ViTForImageClassification(config), folder, 0)


def write_head(file: Path, sizes: Sequence[int], *, seed: int = 0) -> torch.nn.Sequential:
    """A predictor as the published one is written down, of other widths; returns it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[torch.nn.Module] = []
        for i, (before, after) in enumerate(pairwise(sizes)):
            layers.append(torch.nn.Linear(before, after))
            if i < len(sizes) - 3:
                layers.append(torch.nn.Dropout(0.2))
        network = torch.nn.Sequential(*layers)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
    state = {f"layers.{name}": value for name, value in network.state_dict().items()}
    if file.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, file)
    else:
        torch.save(state, file)
    return network.eval()


def write_strip(places: Places, name: str, frames: Sequence[np.ndarray[Any, Any]]) -> Row:
    """A clip's row with a strip of these frames (uint8 RGB `[H, W, 3]`)."""
    path = Path(places.frames) / f"{name}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(list(frames))).save(path, quality=95)
    return {"id": name, "state": "", "frames": f"frames/{path.name}", "frames_count": len(frames)}


def strip_pictures(places: Places, row: Row) -> list[Image.Image]:
    """Its frames, read by Pillow alone."""
    whole = Image.open(f"{places.out}/{row['frames']}").convert("RGB")
    height = whole.height // row["frames_count"]
    return [
        whole.crop((0, i * height, whole.width, (i + 1) * height))
        for i in range(row["frames_count"])
    ]


def drawn(seed: int, count: int = 3, size: tuple[int, int] = (40, 64)) -> list[Any]:
    """Frames of smooth random colours, uint8 `[H, W, 3]`."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8))
        found.append(np.asarray(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC)))
    return found


def _saved(build: Any, folder: Path, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().eval()
        for name, parameter in model.named_parameters():  # also those that start as ones or zeros
            # Strong at the pixels: otherwise all pictures look alike to random weights.
            torch.nn.init.normal_(parameter, std=1.0 if "patch_embed" in name else 0.25)
    model.save_pretrained(folder)
    return model
