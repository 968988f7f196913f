"""Captions from a vision-language model on this machine, through transformers.

Imports torch: the stage imports it when it opens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kinema.config.errors import KinemaError
from kinema.curation.captions.answers import (
    Answer,
    Use,
    as_columns,
    columns_of,
    read_answer,
    read_short,
)
from kinema.curation.captions.clean import Unusable
from kinema.curation.captions.patches import LONGEST_RATIO, PatchSettings, patches
from kinema.curation.captions.prompts import SHORTEN, ask_for, template_of
from kinema.curation.config import CaptionConfig
from kinema.curation.scoring.loading import import_transformers, load_network, readable
from kinema.curation.scoring.model_files import ModelFiles
from kinema.curation.scoring.strips import Picture
from kinema.curation.stage import Bad, Found, Row

EXAMPLES = "Qwen/Qwen2.5-VL-7B-Instruct, or llava-hf/llava-1.5-7b-hf"


@dataclass(frozen=True)
class Shown:
    """Pictures as the network takes them."""

    values: dict[str, Tensor]
    """Joined along the first dimension over the clips of a batch."""
    tokens: tuple[int, ...]
    """Tokens of each picture, or of the video."""


@dataclass(frozen=True)
class Question:
    """About one clip, or about a text alone."""

    text: str
    pictures: Sequence[Picture] = ()
    seconds: float = 1.0
    """From one picture to the next."""


class Eyes(Protocol):
    """How a family of models is shown pictures."""

    @property
    def placeholder(self) -> str:
        """What stands for a token of a picture, or of the video, in the text."""
        ...

    @property
    def content(self) -> str:
        """What chat templates call it: `image` or `video`."""
        ...

    @property
    def plain_chat(self) -> str:
        """A chat template, where the model's folder has none."""
        ...

    def show(self, pictures: Sequence[Picture], seconds: float) -> Shown:
        """
        Args:
            seconds: from one frame to the next.
        """
        ...


class LocalCaptions:
    """Asks a model for captions, a batch of clips at a time.

    Greedy: the likeliest token each time, so that the same clip gets the same caption, alone or in
    a batch (but for rounding in bfloat16 on a GPU). float32 on a CPU.
    """

    def __init__(self, config: CaptionConfig, files: ModelFiles) -> None:
        """
        Raises:
            KinemaError: another kind of model, files that cannot be read, missing packages.
        """
        self.config = config
        self.template = template_of(config.prompt)
        self.columns = columns_of(self.template, config)
        self._files = files
        # Where it lies is of no use to who reads a manifest elsewhere.
        folder = Path(config.model).expanduser()
        self._called = folder.resolve().name if folder.exists() else config.model
        kind = files.config.get("model_type")
        if kind not in FAMILIES:
            raise KinemaError(
                f"describes a {kind!r} model; of those that write captions, "
                f"{', '.join(FAMILIES)} are known",
                where=str(files.folder / "config.json"),
                hint=f"{EXAMPLES}; any other model behind an endpoint (caption.endpoint)",
            )
        network_class, eyes = FAMILIES[kind]
        transformers = import_transformers(network_class, "AutoTokenizer")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        with readable(files, "the tokenizer"):
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                files.folder, local_files_only=True
            )
        self._network = load_network(files, network_class, self._dtype).to(self._device)
        self._eyes: Eyes = eyes(self._network, files, self._tokenizer, config.frames_as)
        self._chat = self._chat_template()
        self._picture_id = int(self._tokenizer.convert_tokens_to_ids(self._eyes.placeholder))
        ends = self._network.generation_config.eos_token_id
        ends = [self._tokenizer.eos_token_id] if ends is None else ends
        self._ends = {int(i) for i in (ends if isinstance(ends, list) else [ends]) if i is not None}
        pad = self._tokenizer.pad_token_id
        self._pad = int(min(self._ends) if pad is None and self._ends else pad or 0)

    def __call__(
        self, rows: Sequence[Row], read: Callable[[Row], list[Picture] | Bad]
    ) -> list[Found]:
        """Captions of clips, or why there is none.

        Args:
            read: gives the frames of a row.
        """
        found: list[Found | None] = [None] * len(rows)
        asked: list[tuple[int, Question]] = []
        for i, row in enumerate(rows):
            pictures = read(row)
            if isinstance(pictures, Bad):
                found[i] = pictures
            elif any(max(p.shape[:2]) > LONGEST_RATIO * min(p.shape[:2]) for p in pictures):
                found[i] = Bad("bad_shape", f"frames are more than {LONGEST_RATIO} times as long")
            else:
                text = ask_for(self.template, row, len(pictures))
                seconds = float(row.get("duration") or len(pictures)) / len(pictures)
                asked.append((i, Question(text, pictures, seconds)))
        uses = [Use() for _ in asked]
        answers = self._generate([question for _, question in asked], uses)
        captions = [read_answer(a, self.template, self.config) for a in answers]
        shorts: dict[int, str] = {}
        if self.config.short == "asked" and not self.template.fields:
            long = {k: c.text for k, c in enumerate(captions) if not isinstance(c, Unusable)}
            again = [Question(SHORTEN + text) for text in long.values()]
            said = self._generate(again, [uses[k] for k in long])
            shorts = {k: read_short(a, long[k]) for k, a in zip(long, said, strict=True)}
        for k, (caption, use) in enumerate(zip(captions, uses, strict=True)):
            if isinstance(caption, Unusable):
                found[asked[k][0]] = Bad(caption.reason, caption.message)
                continue
            values = as_columns(caption, self.columns, self._called, use)
            found[asked[k][0]] = values | ({"text_short": shorts[k]} if k in shorts else {})
        return [one for one in found if one is not None]

    @torch.no_grad()
    def _generate(self, asked: Sequence[Question], uses: Sequence[Use]) -> list[Answer]:
        if not asked:
            return []
        shown = [self._eyes.show(q.pictures, q.seconds) if q.pictures else None for q in asked]
        ids = [self._ids(q.text, s.tokens if s else ()) for q, s in zip(asked, shown, strict=True)]
        longest = max(map(len, ids))
        tokens = torch.full((len(ids), longest), self._pad)
        mask = torch.zeros_like(tokens)
        for row, one in enumerate(ids):
            tokens[row, longest - len(one) :] = torch.tensor(one)
            mask[row, longest - len(one) :] = 1
        inputs: dict[str, Tensor] = {"input_ids": tokens, "attention_mask": mask}
        seen = [s.values for s in shown if s]
        for name in seen[0] if seen else ():
            inputs[name] = _joined([values[name] for values in seen])
        for grid, kind in (("image_grid_thw", 1), ("video_grid_thw", 2)):
            if grid in inputs:
                # Without it Qwen's positions are those of plain text, and nothing says so.
                seen_here = (tokens == self._picture_id) & (mask == 1)
                inputs["mm_token_type_ids"] = seen_here.long() * kind
        inputs = {
            name: value.to(self._device, self._dtype if name.startswith("pixel") else None)
            for name, value in inputs.items()
        }
        try:
            made = self._network.generate(
                **inputs,
                max_new_tokens=self.config.max_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                num_beams=1,
                pad_token_id=self._pad,
                eos_token_id=sorted(self._ends) or None,
            )
        except torch.OutOfMemoryError:
            raise KinemaError(
                f"{len(asked)} clips at once do not fit on the GPU beside the model",
                where="caption.batch",
                hint=f"caption.batch={max(1, len(asked) // 2)}, or a smaller frames.max_side",
            ) from None
        answers = []
        for one, use, row in zip(ids, uses, made[:, longest:].tolist(), strict=True):
            end = next((i for i, token in enumerate(row) if token in self._ends), len(row))
            use.add(len(one), end)
            text = self._tokenizer.decode(row[:end], skip_special_tokens=True)
            answers.append(Answer(text, cut_off=end == len(row)))
        return answers

    def _ids(self, question: str, pictures: Sequence[int]) -> list[int]:
        """The tokens of a question after pictures of so many tokens each."""
        placeholder = self._eyes.placeholder
        # What a clip came with must not pass for a picture or for the end of the question.
        marks = set(self._tokenizer.all_special_tokens)
        marks |= {token for token in self._tokenizer.get_added_vocab() if token[0] in "<["}
        for token in sorted(marks, key=len, reverse=True):
            question = question.replace(token, " ")
        shown = [{"type": self._eyes.content}] * len(pictures)
        content = [*shown, {"type": "text", "text": question}]
        with readable(self._files, "the chat template"):
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=self._chat,
                tokenize=False,
                add_generation_prompt=True,
            )
        pieces = text.split(placeholder)
        if len(pieces) != len(pictures) + 1:
            raise KinemaError(
                f"the chat template shows {len(pieces) - 1} of {len(pictures)} frames",
                where=str(self._files.folder),
                hint="copy chat_template.jinja (or .json) again from where the model comes from",
            )
        for i, count in enumerate(pictures):
            pieces[i] += placeholder * count
        text = "".join(pieces)
        start = self._tokenizer.bos_token
        found: list[int] = self._tokenizer(
            text, add_special_tokens=not (start and text.startswith(start)), verbose=False
        )["input_ids"]
        return found

    def _chat_template(self) -> str:
        if isinstance(self._tokenizer.chat_template, str):
            return str(self._tokenizer.chat_template)
        for name in ("chat_template.json", "processor_config.json"):
            file = self._files.folder / name
            with readable(self._files, name):
                found = json.loads(file.read_text()) if file.is_file() else {}
                if isinstance(found.get("chat_template"), str):
                    return str(found["chat_template"])
        return self._eyes.plain_chat


class QwenEyes:
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL: pictures of any size, cut into patches here."""

    plain_chat = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
        "{% if c.type in ('image', 'video') %}<|vision_start|><|{{ c.type }}_pad|><|vision_end|>"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    def __init__(self, network: Any, files: ModelFiles, tokenizer: Any, frames_as: str) -> None:
        kind = files.config["model_type"]
        if frames_as == "video" and kind not in VIDEO:
            raise _no_video(str(kind))
        self.content = "video" if frames_as == "video" else "image"
        self.placeholder = f"<|{self.content}_pad|>"
        self._settings = PatchSettings.read(files.folder, files.config.get("vision_config") or {})
        self._timed = kind == "qwen2_5_vl"

    def show(self, pictures: Sequence[Picture], seconds: float) -> Shown:
        groups = [pictures] if self.content == "video" else [[one] for one in pictures]
        found = [patches(group, self._settings) for group in groups]
        values = torch.cat([torch.from_numpy(v) for v, _ in found])
        grids = torch.tensor([grid for _, grid in found])
        counts = grids.prod(1) // self._settings.merge**2
        tokens = tuple(int(n) for n in counts)
        if self.content == "image":
            return Shown({"pixel_values": values, "image_grid_thw": grids}, tokens)
        video = {"pixel_values_videos": values, "video_grid_thw": grids}
        if self._timed:
            video["second_per_grid_ts"] = torch.tensor([seconds * self._settings.temporal])
        return Shown(video, tokens)


class LlavaEyes:
    """LLaVA and LLaVA-NeXT: pictures scaled (and cut into tiles) as transformers does it."""

    plain_chat = (
        "{% for m in messages %}{% if m.role == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
        "{% for c in m.content %}{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}"
        "{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )

    content = "image"

    def __init__(self, network: Any, files: ModelFiles, tokenizer: Any, frames_as: str) -> None:
        if frames_as == "video":
            raise _no_video(str(files.config["model_type"]))
        self._network = network
        with readable(files, "the image preprocessing"):
            # By name, the one on Pillow and NumPy: the other one needs torchvision.
            self._processor: Any = import_transformers("AutoImageProcessor").AutoImageProcessor
            self._processor = self._processor.from_pretrained(
                files.folder, local_files_only=True, backend="pil"
            )
        self.placeholder = str(tokenizer.convert_ids_to_tokens(int(network.config.image_token_id)))
        self._tokens: dict[tuple[int, int], int] = {}

    def show(self, pictures: Sequence[Picture], seconds: float) -> Shown:
        found = self._processor(
            images=list(pictures), input_data_format="channels_last", return_tensors="pt"
        )
        values = {n: found[n] for n in ("pixel_values", "image_sizes") if n in found}
        return Shown(values, tuple(self._count(p, values, i) for i, p in enumerate(pictures)))

    def _count(self, picture: Picture, values: dict[str, Tensor], i: int) -> int:
        """Tokens of a picture of that size: as many as the network makes of it."""
        size = (picture.shape[0], picture.shape[1])
        if size not in self._tokens:
            network = self._network
            one = {n: v[i : i + 1].to(network.device) for n, v in values.items()}
            one["pixel_values"] = one["pixel_values"].to(network.dtype)
            features = network.get_image_features(**one).pooler_output
            self._tokens[size] = len(features[0])
        return self._tokens[size]


FAMILIES: dict[str, tuple[str, Callable[[Any, ModelFiles, Any, str], Eyes]]] = {
    "llava": ("LlavaForConditionalGeneration", LlavaEyes),
    "llava_next": ("LlavaNextForConditionalGeneration", LlavaEyes),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", QwenEyes),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", QwenEyes),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", QwenEyes),
}
"""`model_type` -> the class of transformers, and how it is shown pictures."""
VIDEO = ("qwen2_vl", "qwen2_5_vl")
"""Those that may be shown frames as a video; Qwen3-VL wants times written between them."""


def _no_video(kind: str) -> KinemaError:
    return KinemaError(
        f"a {kind!r} model is shown images, not a video",
        where="caption.frames_as",
        hint=f"caption.frames_as=images; video is for {' and '.join(VIDEO)}",
    )


def _joined(values: Sequence[Tensor]) -> Tensor:
    """Joined along the first dimension; LLaVA-NeXT's tiles are filled up to the same number."""
    if values[0].ndim == 5:
        most = max(v.shape[1] for v in values)
        filled = [v.new_zeros(v.shape[0], most, *v.shape[2:]) for v in values]
        for into, v in zip(filled, values, strict=True):
            into[:, : v.shape[1]] = v
        values = filled
    return torch.cat(list(values))
