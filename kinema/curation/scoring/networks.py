"""Networks of transformers that look at frames: their image and text sides, classifiers.

Imports torch: stages import it when they open.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from kinema.config.errors import KinemaError
from kinema.curation.frames import Picture
from kinema.curation.scoring.loading import import_transformers, load_network, readable
from kinema.curation.scoring.model_files import ModelFiles

CHUNK = 32
"""Images that go through a network at once on a GPU; the last ones are filled up with zeros, so
that the same kernels run for every image and its result does not depend on its neighbours."""
THREADS = 8
"""How many prepare images for a GPU at once: one takes about 4 ms for each, mostly for resizing."""
PAIRED = {"clip": "CLIPModel", "siglip": "SiglipModel"}
"""`model_type` -> the class of transformers that has an image and a text side in one space."""


def device_for_scores() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_for_scores(device: torch.device) -> torch.dtype:
    """float32 on a CPU. float16 on a GPU: CLIP was published in it, and it keeps three more bits
    of a score than bfloat16."""
    return torch.float16 if device.type == "cuda" else torch.float32


class ImageNetwork:
    """What image encoders and classifiers have in common: preprocessing and batches."""

    def __init__(self, files: ModelFiles, device: torch.device) -> None:
        self.files = files
        self.device = device
        self.dtype = dtype_for_scores(device)
        self.chunk = None if device.type == "cpu" else CHUNK
        # The one on Pillow and NumPy: the other one needs torchvision.
        kind = str(files.image_settings.get("image_processor_type"))
        with readable(files, "the image preprocessing"):
            if kind.endswith("FeatureExtractor"):  # a name of years ago, unknown to transformers 5
                name = kind.removesuffix("FeatureExtractor") + "ImageProcessorPil"
                self._processor: Any = getattr(import_transformers(name), name).from_pretrained(
                    files.folder, local_files_only=True
                )
            else:
                name = "AutoImageProcessor"
                self._processor = getattr(import_transformers(name), name).from_pretrained(
                    files.folder, local_files_only=True, backend="pil"
                )

    def pixels(self, pictures: Sequence[Picture]) -> Tensor:
        """float32 `[N, 3, h, w]`, as the model's own preprocessing gives them."""
        found: Tensor = self._processor(
            images=list(pictures), input_data_format="channels_last", return_tensors="pt"
        )["pixel_values"]
        return found.float()

    def _by_group(
        self, groups: Sequence[Sequence[Picture]], run: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """`run` on the pixels of all pictures: float32 `[N, ...]` on the CPU for each group.

        On a CPU a group at a time, on a GPU in chunks of equal size: either way what a group gives
        does not depend on the groups beside it.
        """
        if self.chunk is None:
            return [run(self.pixels(group)).float() for group in groups]
        flat = [picture for group in groups for picture in group]
        found = []
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            # Pillow and NumPy let other threads run, and nothing waits for the GPU before the end:
            # it works on a chunk while the next one is prepared.
            one_by_one = pool.map(lambda picture: self.pixels([picture]), flat)
            for start in range(0, len(flat), self.chunk):
                pixels = torch.cat(list(islice(one_by_one, self.chunk)))
                filled = pixels.new_zeros(self.chunk, *pixels.shape[1:])
                filled[: len(pixels)] = pixels
                found.append(run(filled.to(self.device, self.dtype))[: len(flat) - start])
        counts = [len(group) for group in groups]
        return list(torch.cat(found).float().cpu().split(counts)) if flat else []


class PairedEncoder(ImageNetwork):
    """CLIP or SigLIP: pictures and texts as vectors of one space, of norm 1."""

    def __init__(self, files: ModelFiles, device: torch.device, *, text: bool) -> None:
        """
        Args:
            text: load the text side as well.

        Raises:
            KinemaError: another kind of model, files that cannot be read, missing packages.
        """
        kind = files.config.get("model_type")
        if kind not in PAIRED:
            raise KinemaError(
                f"describes a {kind!r} model; of the models that pair images with text, "
                f"{' and '.join(PAIRED)} are known",
                where=str(files.folder / "config.json"),
                hint="openai/clip-vit-large-patch14, or google/siglip-so400m-patch14-384",
            )
        super().__init__(files, device)
        self.kind = str(kind)
        self._network = load_network(files, PAIRED[self.kind])
        if text:
            transformers = import_transformers("AutoTokenizer")
            with readable(files, "the tokenizer"):
                self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                    files.folder, local_files_only=True
                )
        else:
            self._network.text_model = None
        self._places = int(self._network.config.text_config.max_position_embeddings)
        self._network.to(device=device, dtype=self.dtype)

    @property
    def width(self) -> int:
        """Channels of a vector."""
        config = self._network.config
        wide = config.projection_dim if self.kind == "clip" else config.vision_config.hidden_size
        return int(wide)

    @torch.no_grad()
    def images(self, groups: Sequence[Sequence[Picture]]) -> list[Tensor]:
        """float32 `[N, D]` for each group of N pictures, of norm 1."""

        def run(pixels: Tensor) -> Tensor:
            return _normalised(self._network.get_image_features(pixels).pooler_output)

        return self._by_group(groups, run)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """float32 `[B, D]` of norm 1; what is longer than the model's tokens is cut off."""
        found = [self._text(text) for text in texts]
        return torch.stack(found) if found else torch.zeros(0, self.width)

    def _text(self, text: str) -> Tensor:
        tokens = self._tokenizer(
            text,
            padding="max_length",
            truncation=True,
            max_length=self._places,
            return_tensors="pt",
            verbose=False,
        )
        # SigLIP was trained without a mask: the filling is part of what it read.
        names = ("input_ids", "attention_mask") if self.kind == "clip" else ("input_ids",)
        inputs = {name: tokens[name].to(self.device) for name in names}
        found = _normalised(self._network.get_text_features(**inputs).pooler_output)
        return found[0].cpu()


class Classifier(ImageNetwork):
    """An image classifier: the probability of one of its classes."""

    def __init__(self, files: ModelFiles, device: torch.device, *, label: str, key: str) -> None:
        """
        Args:
            key: the setting that holds `label`, for messages: `nsfw.label`.

        Raises:
            KinemaError: no such label, files that cannot be read, missing packages.
        """
        super().__init__(files, device)
        self._network = load_network(files, "AutoModelForImageClassification")
        config = self._network.config
        names = {int(i): str(name) for i, name in config.id2label.items()}
        classes = [i for i, name in sorted(names.items()) if name == label]
        if not classes:
            raise KinemaError(
                f"the classifier has no label {label!r}", where=key, hint=_labels(names, label)
            )
        self._class = classes[0]
        # One class alone, and classes beside each other, are yes or no each.
        self._each = len(names) == 1 or config.problem_type == "multi_label_classification"
        self._network.to(device=device, dtype=self.dtype)

    @torch.no_grad()
    def probabilities(self, groups: Sequence[Sequence[Picture]]) -> list[Tensor]:
        """float32 `[N]` in 0..1 for each group of N pictures."""

        def run(pixels: Tensor) -> Tensor:
            logits = self._network(pixels).logits.float()
            return (logits.sigmoid() if self._each else logits.softmax(-1))[:, self._class]

        return self._by_group(groups, run)


def _normalised(vectors: Tensor) -> Tensor:
    vectors = vectors.float()
    return vectors / vectors.norm(dim=-1, keepdim=True)


def _labels(names: dict[int, str], label: str) -> str:
    folded = {name.casefold(): name for name in names.values()}
    near = get_close_matches(label.casefold(), folded, n=1, cutoff=0.5)
    listed = ", ".join(list(names.values())[:12]) + (", ..." if len(names) > 12 else "")
    return f"{folded[near[0]]!r}; it has: {listed}" if near else f"one of: {listed}"
