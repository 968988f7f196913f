"""A checkpoint folder as it is read: found, checked, loaded.

`state.json` comes last when one is written and holds the size and hash of every other file, by
section. What has no whole `state.json` is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kinema.checkpoint.disk import FileRecord, read_record
from kinema.checkpoint.errors import CheckpointError
from kinema.checkpoint.optimizer import read_optimizer
from kinema.checkpoint.shards import fill_tensors
from kinema.checkpoint.source import TensorSource
from kinema.checkpoint.weights import Initial, LoadReport, load_weights
from kinema.telemetry.progress import Progress

Section = Literal["model", "ema", "optimizer"]
DESCRIPTION = "description"
"""The section of `components.json` and `recipe.yaml`: checked whatever else is asked for."""

STATE_FILE = "state.json"
FORMAT = "kinema-checkpoint-1"
NAME = re.compile(r"(\.replaced-)?epoch(\d+)-global_step(\d+)")
"""Of a checkpoint's folder; the beginning marks one that is being replaced."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder."""

    path: Path
    epoch: int
    step: int
    state: dict[str, Any]
    """As it was given to `save_checkpoint`."""
    components: dict[str, Any]
    versions: dict[str, str]
    """Of the programs that wrote it."""
    files: dict[str, dict[str, FileRecord]]
    """By section, then by path inside the folder."""
    warnings: tuple[str, ...] = ()
    """Newer checkpoints of the run that were passed over, and why."""

    @classmethod
    def open(cls, path: str | Path, *, sections: Sequence[Section] | None = None) -> Checkpoint:
        """A checkpoint by its folder, or the newest whole one of a run folder.

        Args:
            sections: what must be there, with the right sizes; for generation `("model",)` or
                `("ema",)` is enough. None: all that were saved.

        Raises:
            CheckpointError: no such folder, not a checkpoint, or a section is missing or cut off.
        """
        path = Path(path)
        if not path.is_dir():
            what = "is a file, not a checkpoint folder" if path.exists() else "no such folder"
            raise CheckpointError(what, where=str(path))
        if (path / STATE_FILE).is_file() or NAME.fullmatch(path.name):
            checkpoint = cls._read(path)
            checkpoint.verify(sections=sections)
            return checkpoint
        folders = checkpoint_folders(path)
        if not folders:
            raise CheckpointError(
                "is neither a checkpoint (no state.json) nor a run folder with checkpoints",
                where=str(path),
            )
        skipped: list[str] = []
        for folder in folders:
            try:
                checkpoint = cls._read(folder)
                checkpoint.verify(sections=sections)
            except CheckpointError as error:
                skipped.append(f"{folder.name} is passed over: {error.what}")
                continue
            return replace(checkpoint, warnings=tuple(skipped))
        raise CheckpointError(
            f"none of its {len(folders)} checkpoints is whole; {skipped[0]}", where=str(path)
        )

    def has(self, section: Section) -> bool:
        """Whether the section was saved (not whether it is still whole)."""
        return section in self.files

    def verify_shown(self, share: tuple[int, int] = (0, 1)) -> None:
        """`verify` with hashes, which reads everything again, with its progress on the screen."""
        total = -(-sum(len(files) for files in self.files.values()) // share[1])
        with Progress(f"checking {self.path.name}", total=total, unit="file") as bar:
            self.verify(hashes=True, share=share, on_file=bar.advance)

    def section_hash(self, section: Section) -> str:
        """SHA-256 of a section as it was written: of its file, or of the hashes of its files."""
        self._require(section)
        files = self.files[section]
        if len(files) == 1:
            return next(iter(files.values())).sha256
        lines = "".join(f"{name} {files[name].sha256}\n" for name in sorted(files))
        return hashlib.sha256(lines.encode()).hexdigest()

    def verify(
        self,
        *,
        sections: Sequence[Section] | None = None,
        hashes: bool = False,
        share: tuple[int, int] = (0, 1),
        on_file: Callable[[], None] = lambda: None,
    ) -> None:
        """Check that sections are there with their sizes, and if asked with their hashes.

        Args:
            sections: None: all that were saved.
            hashes: read every file again; tells a file of the right size with wrong content.
            share: of so many ranks this one, which reads its share of the files: together they
                read each once.
            on_file: called after each file of this share.

        Raises:
            CheckpointError: names the first files that differ, how, and who wrote them.
        """
        rank, ranks = share
        for section in sections or ():
            self._require(section)
        chosen = list(self.files) if sections is None else [DESCRIPTION, *sections]
        files = [(section, *file) for section in chosen for file in self.files[section].items()]
        files.sort(key=lambda file: -file[2].size)  # each rank gets large ones and small ones
        reads = {name for _, name, _ in files[rank::ranks]} if hashes else set()
        problems = [
            f"{section} section: {problem}"
            for section, name, record in sorted(files, key=lambda f: chosen.index(f[0]))
            if (problem := self._problem(name, record, on_file if name in reads else None))
        ]
        if problems:
            generates = all(p.startswith("optimizer") for p in problems)
            raise CheckpointError(
                f"the checkpoint is not whole: {'; '.join(problems[:3])}",
                where=str(self.path),
                hint="it can generate and start a new run (--ckpt-path), but not resume (--load)"
                if generates
                else "copy it again, or use an earlier one of the run",
            )

    def load_model(
        self,
        module: nn.Module,
        which: Literal["model", "ema"] = "model",
        *,
        allow_new: Sequence[str] = (),
        allow_unexpected: Sequence[str] = (),
        device: torch.device | str | None = None,
        leave: Collection[str] = (),
        initial: Initial | None = None,
    ) -> LoadReport:
        """Fill a module strictly, as `load_weights` does."""
        self._require(which)
        return load_weights(
            module,
            self.path,
            section=which,
            allow_new=allow_new,
            allow_unexpected=allow_unexpected,
            device=device,
            leave=leave,
            initial=initial,
        )

    def load_tensors(self, section: Literal["model", "ema"], into: Mapping[str, Tensor]) -> None:
        """Fill the tensors of `into` in place, sharded or not; names and shapes must be those
        saved.

        Raises:
            WeightsError: they are another model's; nothing is touched.
        """
        self._require(section)
        with TensorSource(self.path, section) as tensors:
            fill_tensors(into, tensors, whose=f"this {section} section")

    def load_optimizer(self, into: Mapping[str, Tensor]) -> None:
        """Fill the tensors of `into` in place, sharded or not, whatever the layout was that they
        were saved in; names and shapes must be those saved."""
        self._require("optimizer")
        read_optimizer(self.path / "optimizer", into)

    @classmethod
    def _read(cls, path: Path) -> Checkpoint:
        file = path / STATE_FILE
        try:
            content = json.loads(file.read_text())
            if content["format"] != FORMAT:
                raise CheckpointError(
                    f"has format {content['format']!r}; this version reads {FORMAT!r}",
                    where=str(file),
                )
            sections = {
                section: {name: FileRecord(**record) for name, record in files.items()}
                for section, files in content["sections"].items()
            }
            return cls(
                path=path,
                epoch=content["epoch"],
                step=content["step"],
                state=content["state"],
                components=json.loads((path / "components.json").read_text()),
                versions=content["versions"],
                files=sections,
            )
        except CheckpointError:
            raise
        except FileNotFoundError as error:
            raise CheckpointError(
                f"is not a whole checkpoint: {Path(error.filename).name} is missing "
                "(a save or a copy that did not finish?)",
                where=str(path),
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"cannot be read: {error.strerror}", where=str(error.filename)
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"is not a whole checkpoint: its JSON is damaged ({error})", where=str(path)
            ) from None

    def _require(self, section: Section) -> None:
        if section not in self.files:
            saved = ", ".join(s for s in self.files if s != DESCRIPTION)
            raise CheckpointError(
                f"was saved without the {section} section (it has {saved})", where=str(self.path)
            )

    def _problem(
        self, name: str, record: FileRecord, on_file: Callable[[], None] | None
    ) -> str | None:
        by = f" (written by rank {record.rank})"
        try:
            size = (self.path / name).stat().st_size
            if size != record.size:
                return f"{name} has {size} of {record.size} bytes{by}"
            if on_file is not None:
                found = read_record(self.path / name)
                on_file()
                if found.sha256 != record.sha256:
                    return f"{name} has other content than was written{by}"
        except FileNotFoundError:
            return f"{name} is missing{by}"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror}){by}"
        return None


def is_ours(path: Path) -> bool:
    """Whether a path is (what is left of) a checkpoint of ours, or a run folder with some.

    Open-Sora's own training calls its folders the same, and has the weights in `model/`.
    """
    named = NAME.fullmatch(path.name) is not None and not (path / "model").is_dir()
    return (path / STATE_FILE).is_file() or named or bool(checkpoint_folders(path))


def checkpoint_folders(run: Path) -> list[Path]:
    """Folders of a run that are named as checkpoints, newest first, whole or not."""
    if not run.is_dir():
        return []
    found = [(m, p) for p in run.iterdir() if (m := NAME.fullmatch(p.name)) and p.is_dir()]
    # One that is being replaced is whole too, but comes after what replaces it.
    found.sort(key=lambda f: (int(f[0][3]), int(f[0][2]), f[0][1] is None), reverse=True)
    return [path for _, path in found]
