"""Small pictures of clips: made on demand, kept in a cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path

from kinema.data.manifest import Manifest
from kinema.media.container import check_file
from kinema.media.errors import MediaError
from kinema.media.info import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from kinema.media.pool import DecodePool
from kinema.media.stores import Place, is_url, join, open_place, suffix, version_in_store
from kinema.serving.browse.poster import make_poster

TIMEOUT_S = 30.0
CACHE_BYTES = 1 << 30
"""What is kept from one start of the page to the next."""


class Posters:
    """The poster of each row, and its file for playing; use it as a context manager's member."""

    def __init__(self, manifest: Manifest, *, workers: int, folder: Path | None = None) -> None:
        """Args:
        workers: processes that decode.
        folder: where pictures are kept; default: the user's cache folder.
        """
        self.folder = folder or _cache_folder()
        self._manifest = manifest
        self._pool = DecodePool(workers, TIMEOUT_S)
        self._making: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        self._has_frames = "frames" in manifest.table.column_names

    def close(self) -> None:
        self._pool.close()

    def place(self, row: int) -> Place:
        """Where a row's clip is.

        Raises:
            MediaError: `missing`, or not named like a video or an image: nothing else is served,
                whatever a manifest says.
        """
        place = self._manifest.absolute_path(row)
        if suffix(place) not in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
            raise MediaError("not_media", str(place))
        check_file(place)
        return place

    def poster(self, row: int) -> tuple[Path, Future[None]]:
        """The file that will be there when the future is done.

        The future raises MediaError where no picture can be made.

        Raises:
            MediaError: see `place`.
        """
        place = self.place(row)
        strip = self._strip(row)
        name = hashlib.blake2b(
            "\0".join(("3", str(place), _version(place), strip)).encode(), digest_size=16
        ).hexdigest()
        file = self.folder / name[:2] / f"{name}.jpg"
        done: Future[None] = Future()
        if file.is_file():
            done.set_result(None)
            return file, done
        with self._lock:
            if name in self._making:
                return file, self._making[name]
            shape = [int(self._manifest.column(n)[row]) for n in ("height", "width")]
            future = self._pool.submit(
                make_poster, str(place), str(file), strip, (max(1, shape[0]), max(1, shape[1]))
            )
            self._making[name] = future
        future.add_done_callback(lambda _: self._making.pop(name, None))
        return file, future

    def local(self, row: int) -> Path:
        """The clip as a local file: one in a store is fetched to the cache folder.

        Raises:
            MediaError: see `place`.
        """
        place = self.place(row)
        if not is_url(place):
            return Path(place)
        name = hashlib.blake2b(f"{place} {_version(place)}".encode(), digest_size=16).hexdigest()
        file = self.folder / name[:2] / f"{name}{suffix(place)}"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
                with open_place(place) as source:
                    shutil.copyfileobj(source, temporary, 1 << 20)
                os.replace(temporary.name, file)
        return file

    def _strip(self, row: int) -> str:
        """The pictures that curation kept of this clip, or `""`."""
        table, root = self._manifest.table, self._manifest.root
        if is_url(root):
            return ""
        name = table.column("frames")[row].as_py() if self._has_frames else ""
        if not isinstance(name, str) or suffix(name) not in IMAGE_SUFFIXES or is_url(name):
            return ""
        if name.startswith("/") or ".." in name.split("/"):
            return ""
        path = Path(join(root, name))
        return str(path) if path.is_file() else ""

    def tidy(self) -> None:
        """Remove the pictures that were made longest ago, beyond `CACHE_BYTES`."""
        found = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        kept = 0
        for _, size, path in sorted(found, reverse=True):
            kept += size
            if kept > CACHE_BYTES:
                path.unlink(missing_ok=True)


def _version(place: Place) -> str:
    if is_url(place):
        return version_in_store(place)
    status = os.stat(place)
    return f"{status.st_size}:{status.st_mtime_ns}"


def _cache_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kinema/browse"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            return cache
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="kinema-browse-"))
