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
    compared with the paths below the folder; then without its leading folders; then with the
    ends of paths (with names, if it has no folder); each time also without its ending (`ID` and
    `ID.webm`). What fits several files, or one that another key means as well, is not guessed at.
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
            unique_names: a name alone says which clip it is in this data set: folders need not
                agree, and of several files of one name, which hold the same, the first is taken.
        """
        keys = as_text(keys)
        keys = pc.replace_substring(keys, "\\", "/")
        unsafe = to_mask(pc.match_substring_regex(keys, r"(^|/)\.\.(/|$)|\x00"))
        wanted = ~unsafe & to_mask(pc.not_equal(keys, ""))
        keys = pc.replace_substring_regex(keys, r"^(\./+|/+)+", "")
        keys = pc.replace_substring_regex(keys, r"//+|/\./", "/")

        found, weakly, several = self._search(keys, wanted, unique_names)
        ambiguous = several
        if not unique_names:
            ambiguous = several | (weakly & _shared(found, keys))
        return Match(np.where(ambiguous, -1, found), unsafe, ambiguous)

    def _search(
        self, keys: pa.ChunkedArray, wanted: Mask, unique_names: bool
    ) -> tuple[Rows, Mask, Mask]:
        """The first file that fits each key, whether folders were left out of the comparison, and
        whether other files fit as well."""
        found = np.full(len(keys), -1, np.int64)
        weakly = np.zeros(len(keys), bool)
        several = np.zeros(len(keys), bool)

        def look(theirs: Any, ours: pa.Array, among: Mask, weak: bool) -> None:
            missing = among & (found < 0)
            if not missing.any():
                return
            rows = self._look(theirs, ours, missing)
            new = rows >= 0
            if new.any():
                found[new] = rows[new]
                weakly[new] = weak
                if not unique_names and ours is not self.paths:
                    several[new] |= to_mask(pc.is_in(theirs, value_set=_repeated(ours)))[new]

        def look_without_ending(theirs: Any, ours: pa.Array, among: Mask, weak: bool) -> None:
            look(theirs, ours, among, weak)
            if (among & (found < 0)).any():
                look(pc.replace_substring_regex(theirs, _SUFFIX, ""), ours, among, weak)

        look(keys, self.paths, wanted, weak=False)
        look_without_ending(keys, self._stems, wanted, weak=False)
        shorter = keys
        for _ in range(MAX_FOLDERS):
            missing = wanted & (found < 0)
            if not missing.any() or not to_mask(pc.match_substring(shorter, "/"))[missing].any():
                break
            shorter = pc.replace_substring_regex(shorter, r"^[^/]*/+", "")
            look(shorter, self.paths, wanted, weak=True)
            look_without_ending(shorter, self._stems, wanted, weak=True)
        ends = self.paths
        folders = wanted & to_mask(pc.match_substring(keys, "/"))
        for _ in range(MAX_FOLDERS):
            deep = pc.any(pc.match_substring(ends, "/")).as_py()
            if not deep or not (folders & (found < 0)).any():
                break
            ends = pc.replace_substring_regex(ends, r"^[^/]*/+", "")
            look(keys, ends, folders, weak=True)
            bare = pc.replace_substring_regex(ends, _SUFFIX, "")
            look_without_ending(keys, bare, folders, weak=True)
        if (wanted & (found < 0)).any():
            # A key with folders means those, unless names alone say which clip it is.
            among = wanted & (unique_names | ~folders)
            names = pc.replace_substring_regex(keys, r"^.*/", "")
            look(names, self._names, among, weak=True)
            look_without_ending(names, self._stem_names, among, weak=True)
        return found, weakly, several

    def _look(self, keys: Any, values: pa.Array, wanted: Mask) -> Rows:
        rows = np.flatnonzero(wanted)
        found = np.full(len(keys), -1, np.int64)
        if rows.size and len(values):
            some = keys.take(pa.array(rows))
            where = pc.fill_null(pc.index_in(some, value_set=values), -1)
            found[rows] = where.to_numpy(zero_copy_only=False)
        return found

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


def _shared(files: Rows, keys: Any) -> Mask:
    """Rows whose file another, different key has found too."""
    pairs = pa.table({"file": files, "key": keys})
    counts = pairs.group_by("file").aggregate([("key", "count_distinct")])
    many = counts.filter(pc.greater(counts.column("key_count_distinct"), 1)).column("file")
    return to_mask(pc.is_in(pa.array(files), value_set=many.combine_chunks())) & (files >= 0)
