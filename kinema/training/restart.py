"""Starting again by itself: under torchrun a run goes on in its folder, and a mistake that no
restart cures is not tried again. Without torch.

torchrun starts the same command again after any process failed. What it is to go on with is
remembered in `outputs/.launches`, in a file named by the launch; it counts for this launch if it
was written since torchrun itself started on one of the machines.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import psutil

from kinema.config.errors import KinemaError

LAUNCHES = ".launches"
"""Folder of `outputs`."""
CLOCKS_DIFFER_S = 1.0
"""Files of a shared disk are stamped by its own clock, in coarse steps."""


class Ranks(Protocol):
    """The processes of a run, as `kinema.parallel.world.World`."""

    @property
    def is_main(self) -> bool: ...
    def gather(self, value: Any) -> list[Any]: ...
    def broadcast(self, value: Any) -> Any: ...


def launch_id() -> str | None:
    """Name of this launch by torchrun; None: another way of starting, which restarts nothing."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return None
    if name == "none":  # what torchrun is called without --rdzv-id or --standalone
        name = f"none-{socket.gethostname()}-{os.getppid()}"
    return re.sub(r"[^\w.-]+", "-", name)


class Launch:
    """What this launch has written in an outputs folder, if torchrun started it."""

    def __init__(self, outputs: str | Path) -> None:
        self._folder = Path(outputs) / LAUNCHES
        self._name = launch_id()

    # The run

    def run(self, ranks: Ranks) -> Path | None:
        """The run that this launch began before torchrun started it anew. Collective."""
        name = ranks.broadcast(self._name)
        if name is None:
            return None
        file = self._folder / f"{name}.json"
        # Another machine may not see the file yet; all ranks go the same way all the same.
        seen = ranks.gather((_is_ours(file), _remembered(file)))
        found = next((run for _, run in seen if run is not None), None)
        if found is None or not any(ours for ours, _ in seen):
            return None
        run = Path(found)
        return run if all(ranks.gather((run / "run.json").is_file())) else None

    def remember(self, run: Path) -> None:
        """The run that a restart goes on with. On one rank."""
        if self._name is not None:
            _write(self._folder / f"{self._name}.json", {"run": str(run.absolute())})

    def forget(self) -> None:
        """The run has come to its end. On one rank."""
        if self._name is None:
            return
        for ending in (".json", ".error.json"):
            with suppress(OSError):
                (self._folder / f"{self._name}{ending}").unlink()
        with suppress(OSError):
            self._folder.rmdir()

    # Its errors

    @contextmanager
    def final_errors(self) -> Iterator[None]:
        """Around a run: a `KinemaError` in it is final.

        torchrun knows no error that it must not try again. So the next processes say the same
        words at once, instead of working until they fail again; and torchrun's own last report has
        them too.

        Raises:
            KinemaError: an earlier start of this launch has ended with it.
        """
        if self._name is None:
            yield
            return
        file = self._folder / f"{self._name}.error.json"
        count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        try:
            if count != "0" and _is_ours(file):
                raise _read_error(file)
            yield
        except KinemaError as error:
            _tell_torchrun(error)
            if not file.exists() or not _is_ours(file):
                with suppress(OSError):  # a full disk may be the very error
                    _write(file, {"what": error.what, "where": error.where, "hint": error.hint})
            raise


def newest_run(outputs: str | Path, has_name: Callable[[Path], bool]) -> Path | None:
    """The run folder with the highest number of an outputs folder.

    Args:
        has_name: whether a run folder is one of the wanted recipe.
    """
    folder = Path(outputs)
    found = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.match(r"(\d{3,})-", path.name)) and (path / "run.json").is_file()
    ]
    return next((path for _, path in sorted(found, reverse=True) if has_name(path)), None)


def _is_ours(file: Path) -> bool:
    """Whether a file was written since this process's torchrun started."""
    try:
        written = file.stat().st_mtime
        return written > psutil.Process(os.getppid()).create_time() - CLOCKS_DIFFER_S
    except (OSError, psutil.Error):
        return False


def _remembered(file: Path) -> str | None:
    """The run that a file of a launch names."""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError):
        return None


def _read_error(file: Path) -> KinemaError:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        return KinemaError(said["what"], where=said["where"], hint=said["hint"])
    except (OSError, ValueError, KeyError):
        return KinemaError("an earlier start ended with an error that a restart does not cure")


def _tell_torchrun(error: KinemaError) -> None:
    """As `torch.distributed.elastic.multiprocessing.errors.record` does, without torch."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        # Where others have the stack, which says nothing about a mistake of a person.
        extra = {"py_callstack": f"error: {error}", "timestamp": str(int(time.time()))}
        content = {"message": {"message": f"error: {error}", "extraInfo": extra}}
        with suppress(OSError):
            Path(path).write_text(json.dumps(content), encoding="utf-8")


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, file)
