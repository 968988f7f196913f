"""Files in stores (`s3://bucket/clip.mp4`), read through fsspec as if they were here.

A *place* is a path of this machine, or the URL of a store as a string. fsspec and the package of
the store (s3fs, gcsfs, ...) are imported only when a URL is met; how to log in there (keys,
endpoints) is what their own documentation says: environment variables and configuration files.
"""

from __future__ import annotations

import errno
import io
import os
import posixpath
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from kinema.config.errors import KinemaError

Place = str | os.PathLike[str]
WHOLE_BYTES = 64 << 20
"""A file of at most this size is fetched in one go: a clip of some seconds, read in one request,
is there before a second request would be answered."""
BLOCK_BYTES = 8 << 20
"""What one request fetches of a larger file."""
CONNECTIONS = 32
"""Requests at once for many small things."""
T = TypeVar("T")
_NUMBERS = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "sftp": "paramiko",
}
"""What fsspec needs for the stores that people have most."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_KEPT = 2
_fetched: OrderedDict[tuple[str, str], bytes] = OrderedDict()
"""The last files fetched whole: an index and its frames are read one after the other."""
_KNOWN_S = 1.0
_infos: OrderedDict[str, tuple[float, dict[str, Any]]] = OrderedDict()
"""When and what was answered about the last files: opening one asks several times in a row."""


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
    protocol = text.split("://")[0].lower()
    try:
        # Not `url_to_fs`: there `::` in a file's name begins another URL.
        kind = fsspec.get_filesystem_class(protocol)
        system = fsspec.filesystem(protocol, **kind._get_kwargs_from_urls(text))
        return system, str(kind._strip_protocol(text))
    except ImportError as error:
        raise StoreError(
            f"stores of the kind {protocol}:// need a package of their own ({error})",
            where=text,
            hint=f"pip install {PACKAGES.get(protocol, '(that package)')}",
        ) from None
    except ValueError as error:
        raise StoreError(str(error), where=text) from None


@contextmanager
def store_errors(url: Place) -> Iterator[None]:
    """What the store's own package raises, as an OSError that names the URL.

    Errors of the operating system's kinds (missing, not permitted) stay of their kind. What passes
    (a lost connection, `slow down`) has been tried again by the store's package before.
    """
    try:
        yield
    except KinemaError:
        raise
    except OSError as error:
        if error.errno is not None and error.filename is not None:
            raise
        number = next((n for kind, n in _NUMBERS.items() if isinstance(error, kind)), error.errno)
        raise OSError(number, _first_line(error.strerror or error), os.fspath(url)) from error
    except Exception as error:
        # Each store's package has its own: botocore's, google's, aiohttp's.
        raise OSError(None, _first_line(error), os.fspath(url)) from error


def _first_line(error: Exception | str) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__


def size_in_store(url: Place) -> int:
    """Bytes of a file.

    Raises:
        OSError: there is none, or it may not be read.
        StoreError: see `filesystem`.
    """
    return int(_info(url)[2].get("size") or 0)


def version_in_store(url: Place) -> str:
    """What changes when the file does: its size with the store's tag or time of writing."""
    return _version(_info(url)[2])


def is_file(place: Place) -> bool:
    """Whether there is such a file.

    Raises:
        OSError, StoreError: a store does not say.
    """
    if not is_url(place):
        return os.path.isfile(place)
    try:
        return bool(_info(place))
    except (FileNotFoundError, IsADirectoryError):
        return False


def _version(info: dict[str, Any]) -> str:
    marks = (info.get(name) for name in ("ETag", "etag", "md5Hash", "LastModified", "mtime",
                                         "updated", "created"))  # fmt: skip
    return f"{info.get('size') or 0}:{next((str(m) for m in marks if m is not None), '')}"


def files_below(url: str) -> dict[str, str]:
    """All files of a folder and its folders, sorted: name below it -> `version_in_store`, or `""`
    where the listing does not say it (a web page's); the name `""` is the URL's own, where it is a
    file's.

    Raises:
        OSError, StoreError: it cannot be listed. A folder without files and one that is not there
            are the same to most stores: both give nothing.
    """
    system, path = filesystem(url)
    with store_errors(url):
        system.invalidate_cache()
        found = system.find(path, detail=True)
    names = {name.removeprefix(path).lstrip("/"): info for name, info in found.items()}
    versions = {name: _version(names[name]) for name in sorted(names)}
    return {name: "" if version == "0:" else version for name, version in versions.items()}


def of_each(call: Callable[[str], T], urls: Sequence[str]) -> Iterator[T]:
    """`call` of many URLs, in their order: a request takes long and costs nothing here, so many
    are under way at once."""
    with ThreadPoolExecutor(min(CONNECTIONS, len(urls) or 1)) as pool:
        yield from pool.map(call, urls)


def _info(url: Place) -> tuple[Any, str, dict[str, Any]]:
    system, path = filesystem(url)
    key = os.fspath(url)
    known = _infos.get(key)
    if known is not None and time.monotonic() - known[0] < _KNOWN_S:
        return system, path, known[1]
    with store_errors(url):
        try:
            info = system.info(path)
        except FileNotFoundError:
            # Listings are remembered by fsspec; a file may have come since.
            system.invalidate_cache()
            info = system.info(path)
        if info.get("type") == "directory":
            raise IsADirectoryError(21, "is a folder", os.fspath(url))
    _infos[key] = time.monotonic(), info
    while len(_infos) > _KEPT:
        with suppress(KeyError):  # another thread did it
            _infos.popitem(last=False)
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
    key = (os.fspath(place), _version(info))
    data = _fetched.get(key)
    if data is None:
        with store_errors(place):
            data = _fetched[key] = system.cat_file(path)
        while len(_fetched) > _KEPT:
            with suppress(KeyError):
                _fetched.popitem(last=False)
    return io.BytesIO(data)


def read_bytes(place: Place) -> bytes:
    """All of a file.

    Raises:
        OSError, StoreError: see `size_in_store`.
    """
    if not is_url(place):
        return Path(place).read_bytes()
    system, path = filesystem(place)
    with store_errors(place):
        data: bytes = system.cat_file(path)
        return data


def upload(file: Path, url: str) -> None:
    """Copy a finished local file to a store, where it appears whole.

    Raises:
        OSError, StoreError: it cannot be written.
    """
    system, path = filesystem(url)
    _infos.pop(url, None)
    with store_errors(url):
        if _replaces_while_writing(system):
            system.makedirs(posixpath.dirname(path), exist_ok=True)
            temporary = f"{path}.{os.getpid()}.tmp"
            system.put_file(str(file), temporary)
            system.mv(temporary, path)
        else:
            # No folders there; and asking for one would make a bucket of a name with a slip in it.
            system.put_file(str(file), path)


def remove(url: str) -> None:
    """Delete a file of a store.

    Raises:
        OSError, StoreError: it cannot be deleted.
    """
    system, path = filesystem(url)
    with store_errors(url):
        system.rm_file(path)


def _replaces_while_writing(system: Any) -> bool:
    """Object stores show an object when it is whole; others show what has arrived."""
    protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
    return not protocols & {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory"}
