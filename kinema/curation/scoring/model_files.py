"""The files of a released model: where they are, what is missing, which ones they are.

Without torch: what names a result is worked out where no model is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.checkpoint.hub import NAME, in_cache, resolve
from kinema.checkpoint.places import HubFiles, Wanted
from kinema.config.errors import KinemaError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of weights in the order of preference; in shards, `NAME.index.json` lists them."""
IMAGE_SETTINGS = ("preprocessor_config.json", "processor_config.json")
"""Where the sizes and constants of the image preprocessing may stand."""
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SAMPLES, SAMPLE_BYTES = 16, 64 << 10

CLIP_L14 = HubFiles(
    "openai/clip-vit-large-patch14",
    (
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ),
)
NSFW_EXAMPLE = HubFiles(
    "Falconsai/nsfw_image_detection",
    ("model.safetensors", "config.json", "preprocessor_config.json"),
)
AESTHETIC_HEAD = HubFiles(
    "camenduru/improved-aesthetic-predictor", ("sac+logos+ava1-l14-linearMSE.pth",)
)


@dataclass(frozen=True)
class ModelFiles:
    """A complete folder of a transformers model."""

    folder: Path
    names: tuple[str, ...]
    """The files in it that results depend on."""

    @classmethod
    def find(
        cls, place: str, *, what: str, key: str, example: HubFiles, tokenizer: bool
    ) -> ModelFiles:
        """Look for a model: a folder, the cache of the hub, the hub.

        Args:
            place: a folder, or `owner/repository`, with `@revision` if wanted.
            what: what messages call it: "the CLIP model".
            key: the setting that names it: `match.model`.
            example: a repository of that kind.
            tokenizer: whether a tokenizer is needed as well.

        Raises:
            KinemaError: not there, not complete (names everything that is missing), or it cannot
                be downloaded.
        """
        folder = _cached(place, tokenizer)
        if folder is None:
            wanted = Wanted(what, key, example, place, folder=True)
            folder = resolve({key: wanted})[key]
        if not folder.is_dir():
            raise KinemaError(
                f"is a file; {what} is a folder",
                where=f"{key}={place}",
                hint=f"name a folder with the files of {example.repo}, or a name of the hub",
            )
        names, missing = _look_over(folder, tokenizer)
        if missing:
            raise KinemaError(
                f"{what} is not complete; missing: {', '.join(missing)}",
                where=str(folder),
                hint=f"copy the whole folder again ({key} takes the files of {example.repo}, "
                "or of another model of the kind)",
            )
        return cls(folder, names)

    @property
    def config(self) -> dict[str, Any]:
        """What `config.json` says."""
        return _json(self.folder / "config.json")

    @property
    def image_settings(self) -> dict[str, Any]:
        """What the image preprocessing is built from."""
        return _json(self.folder / next(n for n in IMAGE_SETTINGS if n in self.names))

    def fingerprint(self) -> str:
        """16 hex digits that tell this model from others, wherever it lies (see `fingerprint`)."""
        return fingerprint(self.folder / name for name in self.names)


def find_file(place: str, *, what: str, key: str, example: HubFiles) -> Path:
    """One file of weights: a path, or a place on the hub.

    Raises:
        KinemaError: not there, or it cannot be downloaded.
    """
    named = None if Path(place).expanduser().exists() else NAME.fullmatch(place)
    if named and named["file"]:
        name = named["file"].removeprefix("/")
        source = HubFiles(named["repo"], (name,), revision=named["revision"])
        if found := in_cache(source)[name]:
            return found
    path = resolve({key: Wanted(what, key, example, place)})[key]
    if not path.is_file():
        raise KinemaError(f"is a folder; {what} is one file", where=f"{key}={place}")
    return path


def fingerprint(files: Iterable[Path]) -> str:
    """16 hex digits that tell files from others, by their names, sizes and 16 samples of 64 KiB of
    each: gigabytes need not be read, and a copy elsewhere is the same."""
    whole = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.name):
        with path.open("rb") as file:
            size = file.seek(0, 2)
            whole.update(f"{path.name} {size}\n".encode())
            last = max(0, size - SAMPLE_BYTES)
            for start in sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)}):
                file.seek(start)
                whole.update(file.read(SAMPLE_BYTES))
    return whole.hexdigest()[:16]


def _cached(place: str, tokenizer: bool) -> Path | None:
    """The folder in the hub's cache, if all that is needed is there: the hub is not asked then."""
    named = None if Path(place).expanduser().exists() else NAME.fullmatch(place)
    if named is None or named["file"]:
        return None
    config = in_cache(HubFiles(named["repo"], ("config.json",), revision=named["revision"]))
    path = config["config.json"]
    return None if path is None or _look_over(path.parent, tokenizer)[1] else path.parent


def _look_over(folder: Path, tokenizer: bool) -> tuple[tuple[str, ...], list[str]]:
    """Names of the files that matter, and of those that are missing."""
    names, missing = [], []
    if (folder / "config.json").is_file():
        names.append("config.json")
    else:
        missing.append("config.json")
    images = [n for n in IMAGE_SETTINGS if (folder / n).is_file()]
    names += images
    if not images:
        missing.append(IMAGE_SETTINGS[0])
    if tokenizer:
        texts = next((t for t in TOKENIZERS if all((folder / n).is_file() for n in t)), None)
        if texts is None:
            missing.append(" or ".join(" with ".join(t) for t in TOKENIZERS))
        else:
            names += [*texts, *(n for n in TOKENIZER_SETTINGS if (folder / n).is_file())]
    weights, absent = _weights(folder)
    return (*names, *weights), missing + absent


def _weights(folder: Path) -> tuple[list[str], list[str]]:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [name], []
        index = folder / f"{name}.index.json"
        if index.is_file():
            table = _json(index).get("weight_map")
            if not isinstance(table, dict) or not table:
                raise KinemaError("lists no weights", where=str(index))
            shards = sorted({str(shard) for shard in table.values()})
            if outside := [s for s in shards if Path(s).name != s]:
                raise KinemaError(f"names a file elsewhere: {outside[0]!r}", where=str(index))
            absent = [s for s in shards if not (folder / s).is_file()]
            return [index.name, *shards], absent
    return [], [f"{WEIGHTS[0]} or {WEIGHTS[1]} (one file, or shards with their .index.json)"]


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise KinemaError(f"is not readable: {error}", where=str(file)) from None
    if not isinstance(content, dict):
        raise KinemaError("is not a JSON object", where=str(file))
    return content
