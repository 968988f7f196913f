"""Optional packages that looking at videos needs, asked for before the work begins."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from kinema.config.errors import KinemaError


def opencv() -> Any:
    """`cv2`, on one thread: each worker has a core.

    Raises:
        KinemaError: it is not installed.
    """
    module = _needed("cv2", "looking at frames", "opencv-python-headless")
    module.setNumThreads(1)
    return module


def scenedetect() -> Any:
    """`scenedetect`.

    Raises:
        KinemaError: it is not installed.
    """
    return _needed("scenedetect", "finding scenes", "scenedetect-headless")


def _needed(name: str, what: str, package: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise KinemaError(
            f"{what} needs the package {package} ({error})", hint="pip install 'kinema[curate]'"
        ) from None
