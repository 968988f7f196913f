"""Weights of the model hub, in its own cache: what is there, what is missing, downloads.

huggingface_hub is imported only when something has to be looked up there. Its downloads go on where
they were cut off and keep several processes from fetching a file twice; `HF_HOME`, `HF_HUB_CACHE`,
`HF_ENDPOINT` and `HF_TOKEN` mean what they mean to it.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from kinema.checkpoint.disk import is_full_disk
from kinema.checkpoint.errors import HubError
from kinema.checkpoint.places import HubFiles, Wanted

NAME = re.compile(
    r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?P<file>(?:/[\w.+-]+)+)?(?:@(?P<revision>[\w./-]+))?"
)
"""`owner/repository`, `owner/repository/folder/file`, each with `@revision`."""
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".json")
"""What no repository's name ends with."""
PREFERRED = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
)
"""Files of weights to take of a repository that is named without a file, best first."""
CONNECT_S = 10.0
"""How long a hub may take to answer before it counts as out of reach."""
BESIDE_WEIGHTS = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""What the folder of a model of transformers may need beside its weights."""


def resolve(wanted: Mapping[str, Wanted], *, offline: bool = False) -> dict[str, Path]:
    """Paths of all that is wanted, downloaded first where it is not here.

    Local paths are taken as they are, and so are files that are all in the cache (newer ones have
    another `@revision`). In offline mode (`offline`, or `HF_HUB_OFFLINE=1`) nothing touches the
    network, and all that is missing is named at once.

    Returns:
        For each role a file (or the index of a sharded one), or a folder where that is wanted.

    Raises:
        HubError: missing, no such repository or file, no permission, no network, a full disk.
    """
    offline = offline or offline_by_environment()
    local = {role: path for role, w in wanted.items() if (path := _local(w)) is not None}
    remote = {role: (w, _named(w)) for role, w in wanted.items() if role not in local}
    if offline:
        missing = {
            role: absent for role, (w, source) in remote.items() if (absent := _absent(source))
        }
        if missing:
            raise _offline_error({role: remote[role] for role in missing}, missing)
    found = {}
    for role, (w, source) in remote.items():
        # What a repository without named files should have is known only there.
        here = offline or (source.files and not _absent(source))
        first = _from_cache(source) if here else _download(source, w)
        found[role] = first.parent if w.folder else first
    return local | found


def check_places(wanted: Mapping[str, Wanted]) -> None:
    """Refuse places that are neither here nor names of the hub; asks the hub nothing.

    Raises:
        HubError: the first of them.
    """
    for one in wanted.values():
        if _local(one) is None:
            _named(one)


def in_cache(files: HubFiles) -> dict[str, Path | None]:
    """Where each needed file is in the cache, shards with their index; None: not here."""
    found: dict[str, Path | None] = {}
    for name in files.files:
        found[name] = path = _cached(files, name)
        if path is not None and name.endswith(".index.json"):
            for shard in _shards(path, name):
                found[shard] = _cached(files, shard)
    return found


def offline_by_environment() -> bool:
    """Whether the environment forbids the network, as huggingface_hub understands it."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _local(wanted: Wanted) -> Path | None:
    """The path that was given, if one was and it is not the name of a repository."""
    if wanted.given is None:
        return None
    path = Path(wanted.given).expanduser()
    if path.exists():
        inner = path / wanted.published.files[0]
        # A copy of a whole repository whose weights lie in a folder of it.
        if len(PurePosixPath(wanted.published.files[0]).parts) > 1 and inner.exists():
            return inner.parent if wanted.folder else inner
        part = path / wanted.within
        return part if wanted.within and part.is_dir() else path
    named = None if isinstance(wanted.given, Path) else NAME.fullmatch(wanted.given)
    if (
        named is None
        or (named["file"] is None and Path(named["repo"]).suffix in SUFFIXES)
        # The folder it begins with is here: a file is missing in it.
        or (named["revision"] is None and Path(path.parts[0]).is_dir())
    ):
        raise HubError(
            f"no such file or folder ({wanted.what})",
            where=str(wanted.given),
            hint=f"{wanted.flag} takes a path, or a name of the hub like {wanted.published.repo}",
        )
    return None


def _named(wanted: Wanted) -> HubFiles:
    """The files on the hub that are meant; without names if the repository has to be looked at."""
    if wanted.given is None:
        return wanted.published
    match = NAME.fullmatch(str(wanted.given))
    assert match is not None, "checked by _local"
    repo, revision = match["repo"], match["revision"]
    if match["file"]:
        file = match["file"].removeprefix("/")
        if ".." in PurePosixPath(file).parts:
            raise HubError("names a file outside the repository", where=str(wanted.given))
        return HubFiles(repo, (file,), revision=revision)
    if repo == wanted.published.repo:
        published = wanted.published
        return HubFiles(repo, published.files, published.optional, revision or published.revision)
    return HubFiles(repo, (), revision=revision)


def _download(source: HubFiles, wanted: Wanted) -> Path:
    """Fetch all files; the first one's path."""
    with _explained(source, wanted):
        _reach_hub()
        if not source.files:
            source = _choose(source, wanted)
        paths = []
        for name in source.files:
            paths.append(path := _fetch(source, name))
            if name.endswith(".index.json"):
                for shard in _shards(path, name):
                    _fetch(source, shard)
        for name in source.optional:
            _fetch_if_there(source, name)
    return paths[0]


def _reach_hub() -> None:
    """Without a network, fail now: huggingface_hub would try again for half a minute.

    Raises:
        OSError: the hub's machine has no address, or does not answer.
    """
    parts = urlsplit(_endpoint())
    # A proxy reaches what this machine itself does not.
    if parts.hostname and not getproxies():
        port = parts.port or (80 if parts.scheme == "http" else 443)
        socket.create_connection((parts.hostname, port), timeout=CONNECT_S).close()


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def _fetch(source: HubFiles, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(
        hf_hub_download(
            source.repo,
            name,
            revision=source.revision,
            endpoint=os.environ.get("HF_ENDPOINT"),
            cache_dir=_cache(),
        )
    )


def _fetch_if_there(source: HubFiles, name: str) -> None:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        _fetch(source, name)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        pass


def _choose(source: HubFiles, wanted: Wanted) -> HubFiles:
    """The files to take of a repository that was named without one."""
    names = _listing(source)
    weights = next((n for n in PREFERRED if n in names), None)
    if weights is None:
        raise HubError(
            f"the repository holds no weights under a usual name ({wanted.what})",
            where=str(source),
            hint=f"name the file: {wanted.flag} {source.repo}/FILE"
            + (f"; it has {', '.join(names[:6])}" if names else ""),
        )
    beside = tuple(n for n in BESIDE_WEIGHTS if n in names) if wanted.folder else ()
    return HubFiles(source.repo, (weights, *beside), revision=source.revision)


def _listing(source: HubFiles) -> list[str]:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    return sorted(api.list_repo_files(source.repo, revision=source.revision))


def _shards(index: Path, name: str) -> list[str]:
    """Names in the repository of the shards that an index speaks of."""
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [s for s in shards if PurePosixPath(s).name != s]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(f"is not an index of shards ({error})", where=str(index)) from None
    if outside:
        raise HubError(f"names a file outside its folder: {outside[0]!r}", where=str(index))
    return [str(PurePosixPath(name).with_name(s)) for s in shards]


def _absent(source: HubFiles) -> list[str]:
    """Names of the files that are not in the cache."""
    if not source.files:
        return [] if _any_cached(source) else ["(any file)"]
    return [name for name, path in in_cache(source).items() if path is None]


def _from_cache(source: HubFiles) -> Path:
    names = source.files or (_any_cached(source),)
    assert names[0] is not None
    path = _cached(source, names[0])
    assert path is not None, "checked by _absent"
    return path


def _any_cached(source: HubFiles) -> str | None:
    return next((n for n in PREFERRED if _cached(source, n) is not None), None)


def _cached(source: HubFiles, name: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    path = try_to_load_from_cache(source.repo, name, cache_dir=_cache(), revision=source.revision)
    return Path(path) if isinstance(path, str) else None


def _cache() -> str | None:
    """The cache that the environment names now (huggingface_hub reads it when imported only)."""
    if "HF_HUB_CACHE" in os.environ:
        return os.environ["HF_HUB_CACHE"]
    return str(Path(os.environ["HF_HOME"]) / "hub") if "HF_HOME" in os.environ else None


def _cache_in_words() -> str:
    return _cache() or "~/.cache/huggingface/hub"


def _offline_error(
    remote: Mapping[str, tuple[Wanted, HubFiles]], missing: Mapping[str, list[str]]
) -> HubError:
    count = sum(len(names) for names in missing.values())
    lines = []
    for role, (wanted, source) in remote.items():
        names = [f"{n} and its shards" if n.endswith(".index.json") else n for n in missing[role]]
        lines.append(f"  {wanted.what}: {source}: {', '.join(names)}")
        lines.append(f"    or {_by_path(wanted)}")
        if source.elsewhere:
            lines.append(f"    also at {source.elsewhere}")
    return HubError(
        f"offline, and {count} file{'s are' if count > 1 else ' is'} missing:\n" + "\n".join(lines),
        hint=f"fetch them where there is a network (`hf download REPOSITORY FILE`) and copy them "
        f"into {_cache_in_words()}, or give their places with the flags above",
    )


@contextmanager
def _explained(source: HubFiles, wanted: Wanted) -> Iterator[None]:
    """What goes wrong with a download, in words for a person."""
    try:
        import huggingface_hub.errors as errors
    except ImportError:
        raise HubError(
            f"downloading {wanted.what} needs the package huggingface_hub",
            where=str(source),
            hint=f"pip install 'kinema[pretrained]', or give {_by_path(wanted)}",
        ) from None
    by_hand = f"; or fetch it by hand and give {_by_path(wanted)}"
    elsewhere = f" (also at {source.elsewhere})" if source.elsewhere else ""
    try:
        yield
    except HubError:
        raise
    except errors.GatedRepoError:
        raise HubError(
            f"{wanted.what} is released only to people who accept its terms",
            where=str(source),
            hint=f"accept them on the page of {source.repo}, then `hf auth login` or set HF_TOKEN",
        ) from None
    except errors.RepositoryNotFoundError as error:
        path = "" if wanted.given is None else "no such path here, and "
        raise HubError(
            f"{path}no such repository on the hub, or it is private "
            f"({_status(error)}; {wanted.what})",
            where=str(source),
            hint=f"check the name; for a private one `hf auth login`{by_hand}{elsewhere}",
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(
            f"the repository has no revision {source.revision!r}", where=source.repo
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(source, wanted, error) from None
    except errors.EntryNotFoundError as error:
        raise HubError(
            f"the repository has no such file ({wanted.what})",
            where=f"{source}: {', '.join(source.files)}",
            hint=_nearest(source) + by_hand + elsewhere,
        ) from error
    except errors.HfHubHTTPError as error:
        hint = "try again later" + by_hand
        if _status(error) in ("401", "403"):
            hint = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"
        raise HubError(
            f"the hub refused or failed: status {_status(error)} ({wanted.what})",
            where=str(source),
            hint=hint,
        ) from None
    except OSError as error:
        if is_full_disk(error):
            raise HubError(
                f"could not be downloaded: the disk is full ({wanted.what})",
                where=_cache_in_words(),
                hint="free space there, or set HF_HOME to a larger disk; it goes on where it "
                "stopped",
            ) from None
        raise _unreachable(source, wanted, error) from None
    except Exception as error:
        # Its HTTP library's own errors: cut off, timed out.
        if not type(error).__module__.split(".")[0].startswith("httpx"):
            raise
        raise _unreachable(source, wanted, error) from None


def _unreachable(source: HubFiles, wanted: Wanted, error: BaseException) -> HubError:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    what = "no such path here, and it" if wanted.given else f"{wanted.what} is not here and"
    listed = " (--offline lists all that is missing)" if wanted.flag.startswith("--") else ""
    return HubError(
        f"{what} could not be downloaded from {_endpoint()} ({first})",
        where=str(source if wanted.given is None else wanted.given),
        hint="check the network and run it again: it goes on where it stopped; "
        f"or fetch it by hand and give {_by_path(wanted)}{listed}",
    )


def _by_path(wanted: Wanted) -> str:
    """How a path is given: to an option, or to a key of a recipe."""
    return f"{wanted.flag} PATH" if wanted.flag.startswith("--") else f"{wanted.flag}=PATH"


def _nearest(source: HubFiles) -> str:
    """What the repository has instead."""
    try:
        names = _listing(source)
    except Exception:  # a hint must not replace the error it belongs to
        return "check the name"
    near = get_close_matches(source.files[0], names, n=1, cutoff=0.4)
    return f"did you mean {near[0]}?" if near else f"it has {', '.join(names[:6])}"


def _status(error: Any) -> str:
    response = getattr(error, "response", None)
    return str(getattr(response, "status_code", "no answer"))
