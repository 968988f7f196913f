"""Tiny T5 and CLIP text encoders with random weights, in folders as model hubs have them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

CORPUS = [
    "a red circle moving left over a green field",
    "the quick brown fox jumps over the lazy dog, café",
    "one two three four five six seven eight nine ten.",
    "moving square, growing triangle; up down right 0123456789",
]


def write_t5(
    folder: Path, *, dim: int = 16, weights: str = "safetensors", tokenizer: str = "json", seed=0
) -> Any:
    """A T5 v1.1 encoder; returns transformers' own model of it.

    Args:
        weights: safetensors, sharded, bin, bin-sharded, or old-bin (before PyTorch 1.6).
        tokenizer: json or spiece.
    """
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    folder.mkdir(parents=True)
    train_sentencepiece(folder)
    if tokenizer == "json":
        T5Tokenizer.from_pretrained(folder).save_pretrained(folder)
        (folder / "spiece.model").unlink()
    settings = T5Config(
        vocab_size=200,
        d_model=dim,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = T5EncoderModel(settings).eval()
        for parameter in model.parameters():  # also those that start as ones
            torch.nn.init.normal_(parameter, std=0.3)
    model.config.save_pretrained(folder)
    state = {k: v for k, v in model.state_dict().items() if k != "encoder.embed_tokens.weight"}
    write_weights(folder, state, weights)
    return model


def train_sentencepiece(folder: Path) -> None:
    import sentencepiece

    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(CORPUS * 10))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "spiece"),
        vocab_size=90,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    corpus.unlink()
    (folder / "spiece.vocab").unlink()


def write_weights(folder: Path, state: dict[str, torch.Tensor], kind: str) -> None:
    from safetensors.torch import save_file

    state = {k: v.contiguous() for k, v in state.items()}
    name = "model.safetensors" if "bin" not in kind else "pytorch_model.bin"

    def save(part: dict[str, torch.Tensor], file: Path) -> None:
        if "bin" not in kind:
            save_file(part, file)
        else:
            torch.save(part, file, _use_new_zipfile_serialization=kind != "old-bin")

    if "sharded" not in kind:
        save(state, folder / name)
        return
    names = sorted(state)
    stem, suffix = os.path.splitext(name)
    table = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"{stem}-0000{i}-of-00002{suffix}"
        save({k: state[k] for k in part}, folder / shard)
        table |= dict.fromkeys(part, shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def write_clip(folder: Path, *, dim: int = 16, whole: bool = False, end: int = 2) -> Any:
    """A CLIP text encoder (or a whole CLIP); returns transformers' own text model.

    Args:
        end: `eos_token_id` of config.json; published CLIPs say 2, which is not the token's.
    """
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig

    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    names = letters + [f"{c}</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({n: i for i, n in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": dim, "intermediate_size": 32, "num_hidden_layers": 2}
    text = CLIPTextConfig(
        **sizes,
        vocab_size=len(names),
        num_attention_heads=2,
        eos_token_id=end,
        bos_token_id=0,
        pad_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if whole:
            vision = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4)
            model: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision))
        else:
            model = CLIPTextModel(text)
    model.save_pretrained(folder)
    return (model.text_model if whole else model).eval()
