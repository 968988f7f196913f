"""`run.json`: what identifies a run besides its recipe (names, ids of trackers, code version)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kinema.config.errors import KinemaError


def read_run_json(folder: Path) -> dict[str, Any]:
    """The content; empty where there is no file yet.

    Raises:
        KinemaError: the file is no JSON object.
    """
    path = folder / "run.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise KinemaError(f"is not valid JSON: {error}", where=str(path)) from None
    if not isinstance(data, dict):
        raise KinemaError("must hold a JSON object", where=str(path))
    return data


def update_run_json(folder: Path, fields: Mapping[str, Any]) -> None:
    """Set some fields and keep the others; the file is replaced whole."""
    data = read_run_json(folder) | dict(fields)
    path = folder / "run.json"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
