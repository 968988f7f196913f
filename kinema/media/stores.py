"""Files in stores (`s3://bucket/clip.mp4`), read through fsspec as if they were here.

A *place* is a path of this machine, or the URL of a store as a string. fsspec and the package of
the store (s3fs, gcsfs, ...) are imported only when a URL is met; how to log in there (keys,
endpoints) is what their own documentation says: environment variables and configuration files.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from kinema.config.errors import KinemaError

Place = str | os.PathLike[str]
WHOLE_BYTES = 64 << 20
"""A file of at most this size is fetched in one go: a clip of some seconds, read in one request,
is there before a second request would be answered."""
BLOCK_BYTES = 8 << 20
"""What one request fetches of a larger file."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_KEPT = 2
_fetched: OrderedDict[tuple[str, str], bytes] = OrderedDict()
"""The last files fetched whole: an index and its frames are read one after the other."""


class StoreError(KinemaError):
    """A store that cannot be used: a package is missing, no access, no such protocol."""


def is_url(place: Place) -> bool:
    """Whether this is in a store; a `Path` never is (it would have lost a slash)."""
    return isinstance(place, str) and _URL.match(place) is not None


def suffix(place: Place) -> str:
    """The name's ending in small letters, with its dot: `.mp4`."""
    return PurePosixPath(os.fspath(place)).suffix.lower()


def join(folder: Place, name: str) -> Path | str:
    """`name` below `folder`; an absolute path or a URL as `name` stays what it is."""
    if is_url(name):
        return name
    if is_url(folder):
        if name.startswith("/"):
            return Path(name)
        return f"{os.fspath(folder).rstrip('/')}/{name}"
    return Path(folder) / name


def parent(place: Place) -> Path | str:
    """The folder that a file is in."""
    if is_url(place):
        return posixpath.dirname(os.fspath(place))
    return Path(place).parent


def filesystem(url: Place) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    Raises:
        StoreError: fsspec or the package of this store is not installed; no such protocol.
    """
    text = os.fspath(url)
    try:
        import fsspec
    except ImportError:
        raise StoreError(
            "reading from stores needs the package fsspec",
            where=text,
            hint="pip install 'kinema[stores]'",
        ) from None
    try:
        system, path = fsspec.core.url_to_fs(text)
        return system, str(path)
    except ImportError as error:
        protocol = text.split("://")[0]
        raise StoreError(
            f"stores of the kind {protocol}:// need a package of their own ({error})", where=text
        ) from None
    except ValueError as error:
        raise StoreError(str(error), where=text) from None


@contextmanager
def store_errors(url: Place) -> Iterator[None]:
    """What the store's own package raises, as an OSError that names the URL.

    Errors of the operating system's kinds (missing, not permitted) stay what they are.
    """
    try:
        yield
    except (OSError, KinemaError):
        raise
    except Exception as error:
        # Each store's package has its own: botocore's, google's, aiohttp's.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(None, f"the store answered: {reason}", os.fspath(url)) from error


def size_in_store(url: Place) -> int:
    """Bytes of a file.

    Raises:
        OSError: there is none, or it may not be read.
        StoreError: see `filesystem`.
    """
    return int(_info(url)[2].get("size") or 0)


def version_in_store(url: Place) -> str:
    """What changes when the file does: its size with the store's tag or time of writing."""
    info = _info(url)[2]
    marks = (info.get(name) for name in ("ETag", "etag", "md5Hash", "LastModified", "mtime",
                                         "updated", "created"))  # fmt: skip
    return f"{info.get('size')}:{next((str(m) for m in marks if m is not None), '')}"


def _info(url: Place) -> tuple[Any, str, dict[str, Any]]:
    system, path = filesystem(url)
    with store_errors(url):
        try:
            info = system.info(path)
        except FileNotFoundError:
            # Listings are remembered by fsspec; a file may have come since.
            system.invalidate_cache()
            info = system.info(path)
        if info.get("type") == "directory":
            raise IsADirectoryError(21, "is a folder", os.fspath(url))
    return system, path, info


def open_place(place: Place) -> BinaryIO:
    """A file for reading, with `seek`; the caller closes it.

    Raises:
        OSError, StoreError: see `size_in_store`.
    """
    if not is_url(place):
        return open(place, "rb")
    system, path, info = _info(place)
    if int(info.get("size") or 0) > WHOLE_BYTES:
        with store_errors(place):
            file: BinaryIO = system.open(path, "rb", block_size=BLOCK_BYTES)
            return file
    key = (os.fspath(place), version_in_store(place))
    if key not in _fetched:
        with store_errors(place):
            _fetched[key] = system.cat_file(path)
        while len(_fetched) > _KEPT:
            _fetched.popitem(last=False)
    return io.BytesIO(_fetched[key])


def read_bytes(place: Place) -> bytes:
    """All of a file.

    Raises:
        OSError, StoreError: see `size_in_store`.
    """
    with open_place(place) as file:
        return file.read()


def upload(file: Path, url: str) -> None:
    """Copy a finished local file to a store, where it appears whole.

    Raises:
        OSError, StoreError: it cannot be written.
    """
    system, path = filesystem(url)
    with store_errors(url):
        system.makedirs(posixpath.dirname(path), exist_ok=True)
        if _replaces_while_writing(system):
            temporary = f"{path}.{os.getpid()}.tmp"
            system.put_file(str(file), temporary)
            system.mv(temporary, path)
        else:
            system.put_file(str(file), path)


def _replaces_while_writing(system: Any) -> bool:
    """Object stores show an object when it is whole; others show what has arrived."""
    protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
    return not protocols & {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory"}
