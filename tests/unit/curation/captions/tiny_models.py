"""Tiny vision-language models with random weights, in folders as the hub has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WORDS = ("a", "the", "red", "dog", "runs", "cat", "sits", "on", "grass", "under", "sky", "slowly")
QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>"]  # fmt: skip
QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
PATCH, TILE = 8, 24
"""Pixels of a patch, and of the side of the pictures that LLaVA's tiny eyes see."""


def write_tokenizer(folder: Path, special: list[str], **settings: Any) -> Any:
    """A tokenizer of words and bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<s>", "</s>", *special, *alphabet]
    tokenizer = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", *special])
    tokenizer.add_tokens([f" {word}" for word in WORDS])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", **settings
    )
    made.save_pretrained(folder)
    return made


def write_llava(folder: Path, *, next_one: bool = False) -> Any:
    """A LLaVA on CLIP (or a LLaVA-NeXT); returns transformers' own model of it."""
    import transformers
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder, ["<image>"])
    size = {"shortest_edge": TILE}
    crop = {"height": TILE, "width": TILE}
    grid = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
    if next_one:
        LlavaNextImageProcessorPil(
            size=size, crop_size=crop, image_grid_pinpoints=grid
        ).save_pretrained(folder)
    else:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        CLIPImageProcessorPil(size=size, crop_size=crop).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    name = "LlavaNext" if next_one else "Llava"
    config = getattr(transformers, f"{name}Config")(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=TILE, patch_size=PATCH),
        text_config=transformers.LlamaConfig(
            **sizes, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=8192,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **({"image_grid_pinpoints": grid} if next_one else {}),
    )  # fmt: skip
    made = getattr(transformers, f"{name}ForConditionalGeneration")
    return _saved(lambda: made(config), folder)


def write_qwen(folder: Path, kind: str = "Qwen2_5_VL") -> Any:
    """A Qwen2-VL, Qwen2_5_VL or Qwen3VL; returns transformers' own model of it."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder, QWEN_TOKENS, chat_template=QWEN_CHAT)
    ids = tokenizer.convert_tokens_to_ids
    Qwen2VLImageProcessorPil(
        patch_size=PATCH, size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48}
    ).save_pretrained(folder)
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer),
        "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2],
        },
    }  # fmt: skip
    vision = {"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2,
              "num_heads": 2}  # fmt: skip
    if kind == "Qwen2VL":
        vision |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    elif kind == "Qwen2_5_VL":
        vision |= {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32,
                   "window_size": 32, "fullatt_block_indexes": [1]}  # fmt: skip
    else:
        vision |= {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32,
                   "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision,
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    made = getattr(transformers, f"{kind}ForConditionalGeneration")
    return _saved(lambda: made(config), folder)


def _saved(build: Callable[[], Any], folder: Path) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
        for name, parameter in model.named_parameters():  # also those that start as ones or zeros
            # Strong at the pixels: otherwise all pictures look alike to random weights.
            torch.nn.init.normal_(parameter, std=1.0 if "patch_embed" in name else 0.3)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    return model
