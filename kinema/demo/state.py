"""What a demo has done so far: one JSON file in its folder, so that it can be continued."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kinema
from kinema.config.errors import KinemaError
from kinema.config.settings import to_dict
from kinema.demo.config import DemoConfig
from kinema.generation.clip import write_json

FILE = "demo.json"


class DemoState:
    """Finished stages of a demo folder with their results and seconds.

    Raises:
        KinemaError: the folder holds a demo with other settings, or something else.
    """

    def __init__(self, folder: Path, config: DemoConfig) -> None:
        self.folder = folder
        self._file = folder / FILE
        self._data: dict[str, Any] = {
            "settings": to_dict(config),
            "version": kinema.__version__,
            "stages": {},
        }
        folder.mkdir(parents=True, exist_ok=True)
        if self._file.exists():
            self._continue()
        elif any(folder.iterdir()):
            raise KinemaError(
                "the folder is not empty and holds no demo", where=str(folder), hint="--out DIR"
            )
        else:
            write_json(self._file, self._data)

    def _continue(self) -> None:
        try:
            old = json.loads(self._file.read_text(encoding="utf-8"))
            settings, version = old["settings"], old["version"]
        except (ValueError, KeyError, TypeError):
            raise KinemaError("is not a demo's record", where=str(self._file)) from None
        if settings != self._data["settings"] or version != kinema.__version__:
            changed = [k for k, v in self._data["settings"].items() if settings.get(k) != v]
            raise KinemaError(
                "the folder holds a demo with other settings "
                f"({', '.join(changed) or f'of kinema {version}'})",
                where=str(self.folder),
                hint="--out with another folder, or delete this one",
            )
        self._data = old

    def done(self, stage: str) -> bool:
        return stage in self._data["stages"]

    def result(self, stage: str) -> Any:
        """What a finished stage returned."""
        return self._data["stages"][stage]["result"]

    def seconds(self, stage: str) -> float:
        """How long a finished stage took, over all runs that worked on it."""
        return float(self._data["stages"][stage]["seconds"])

    def run(self, stage: str, work: Callable[[], Any]) -> Any:
        """Do a stage and keep its result (JSON values), unless an earlier run has."""
        if self.done(stage):
            return self.result(stage)
        before = float(self._data.get("interrupted", {}).get(stage, 0.0))
        start = time.monotonic()
        try:
            result = work()
        except BaseException:
            spent = before + time.monotonic() - start
            self._data.setdefault("interrupted", {})[stage] = spent
            write_json(self._file, self._data)
            raise
        self._data.get("interrupted", {}).pop(stage, None)
        seconds = round(before + time.monotonic() - start, 2)
        self._data["stages"][stage] = {"seconds": seconds, "result": result}
        write_json(self._file, self._data)
        return result
