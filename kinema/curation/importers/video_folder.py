"""Which file in a folder of videos a row of a table means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinema.config.errors import KinemaError
from kinema.curation.importers.columns import Mask, as_text, to_mask
from kinema.data.find_media import SUFFIXES, Refusal, find_media

Rows = np.ndarray[Any, np.dtype[np.int64]]

MAX_FOLDERS = 32
_SUFFIX = "(?i)(" + "|".join(sorted(s.replace(".", r"\.") for s in SUFFIXES)) + ")$"


@dataclass(frozen=True)
class Match:
    """What was found for N keys."""

    files: Rows
    """Number of the file in `VideoFolder.files`, -1 where there is none [N]."""
    unsafe: Mask
    """Keys that leave the folder; they are not looked up [N]."""
    ambiguous: Mask
    """Keys that could mean several files, or whose file several keys could mean [N]."""


class VideoFolder:
    """The videos below a folder, to be found by path, by the end of a path, or by name.

    Tables name their files as they lay on the makers' disks; people keep them elsewhere. A key is
    compared with paths below the folder, exactly; then without its leading folders; then by name
    alone, and at last without its ending (`ID` and `ID.webm`). Where folders were left out of the
    comparison, a name that several keys or several files have is not guessed at.
    """

    def __init__(self, folder: Path, files: list[str] | None = None) -> None:
        """List the folder.

        Args:
            files: what is in it, if that is known.

        Raises:
            KinemaError: it is not there, or not a folder.
        """
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise KinemaError(what, where=str(folder), hint="give the videos' folder as --videos")
        self.folder = folder
        self.files: list[str]
        self.refused: list[Refusal]
        self.files, self.refused = (files, []) if files is not None else find_media(folder)
        self.paths = pa.array(self.files, pa.large_string())
        self._names = pc.replace_substring_regex(self.paths, r"^.*/", "")
        self._stems = pc.replace_substring_regex(self.paths, _SUFFIX, "")
        self._stem_names = pc.replace_substring_regex(self._names, _SUFFIX, "")

    @classmethod
    def of(cls, files: list[Path]) -> VideoFolder:
        """Files by absolute paths, wherever they are."""
        return cls(Path("/"), sorted(str(file).lstrip("/") for file in files))

    def find(self, keys: Any, *, unique_names: bool = False) -> Match:
        """The file of each key.

        Args:
            keys: text [N]; empty: none is meant.
            unique_names: names are unique in this data set: of several files of one name, which
                hold the same, the first is taken.
        """
        keys = as_text(keys)
        keys = pc.replace_substring(keys, "\\", "/")
        unsafe = to_mask(pc.match_substring_regex(keys, r"(^|/)\.\.(/|$)|\x00"))
        wanted = ~unsafe & to_mask(pc.not_equal(keys, ""))
        keys = pc.replace_substring_regex(keys, r"^(\./+|/+)+", "")
        keys = pc.replace_substring_regex(keys, r"//+|/\./", "/")

        found = np.full(len(keys), -1, np.int64)
        exact = self._look(keys, self.paths, wanted)
        found[exact >= 0] = exact[exact >= 0]
        weakly = self._by_less(keys, wanted & (found < 0))
        ambiguous = (weakly >= 0) & self._could_mean_others(keys, wanted, unique_names)
        found = np.where(weakly >= 0, weakly, found)
        return Match(np.where(ambiguous, -1, found), unsafe, ambiguous)

    def _by_less(self, keys: pa.ChunkedArray, wanted: Mask) -> Rows:
        """Files of keys that no path equals."""
        found = np.full(len(keys), -1, np.int64)
        shorter = keys
        for _ in range(MAX_FOLDERS):
            missing = wanted & (found < 0)
            if not missing.any() or not to_mask(pc.match_substring(shorter, "/"))[missing].any():
                break
            shorter = pc.replace_substring_regex(shorter, r"^[^/]*/+", "")
            found = np.where(missing, self._look(shorter, self.paths, missing), found)
        names = pc.replace_substring_regex(keys, r"^.*/", "")
        bare = pc.replace_substring_regex(keys, _SUFFIX, "")
        bare_names = pc.replace_substring_regex(names, _SUFFIX, "")
        for theirs, ours in (
            (names, self._names),
            (keys, self._stems),
            (bare, self._stems),
            (names, self._stem_names),
            (bare_names, self._stem_names),
        ):
            missing = wanted & (found < 0)
            if not missing.any():
                break
            found = np.where(missing, self._look(theirs, ours, missing), found)
        return found

    def _look(self, keys: Any, values: pa.Array, wanted: Mask) -> Rows:
        rows = np.flatnonzero(wanted)
        found = np.full(len(keys), -1, np.int64)
        if rows.size and len(values):
            some = keys.take(pa.array(rows))
            where = pc.fill_null(pc.index_in(some, value_set=values), -1)
            found[rows] = where.to_numpy(zero_copy_only=False)
        return found

    def _could_mean_others(self, keys: Any, wanted: Mask, unique_names: bool) -> Mask:
        """Keys whose bare name another key has too, or several files have."""
        names = pc.replace_substring_regex(keys, r"^.*/", "")
        names = pc.replace_substring_regex(names, _SUFFIX, "")
        pairs = pa.table({"key": keys, "name": names}).filter(pa.array(wanted))
        distinct = pairs.group_by(["key", "name"]).aggregate([])
        shared = _repeated(distinct.column("name"))
        if not unique_names:
            shared = pa.concat_arrays([shared, _repeated(self._stem_names)])
        return to_mask(pc.is_in(names, value_set=shared))

    def unused(self, used: Rows) -> list[str]:
        """Files that no key found, as paths below the folder."""
        free = np.ones(len(self.files), bool)
        free[used[used >= 0]] = False
        return [self.files[number] for number in np.flatnonzero(free)]


def _repeated(values: Any) -> pa.Array:
    counts = pc.value_counts(pc.cast(values, pa.large_string()))
    if isinstance(counts, pa.ChunkedArray):
        counts = counts.combine_chunks()
    names = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    return pc.cast(names, pa.large_string())
