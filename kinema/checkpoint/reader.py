"""Tensors out of weights files one at a time, in any order, while the files stay open."""

from __future__ import annotations

import threading
from pathlib import Path

from torch import Tensor, nn

from kinema.checkpoint.layout import Layout, Stored, detect
from kinema.checkpoint.released_names import layouts
from kinema.checkpoint.source import TensorSource


class TensorReader:
    """Reads the tensors of a file or folder of weights by name; a context manager.

    Safe to use from several threads: they take turns.

    Args:
        path: as for `load_weights`.
        section: which weights of a folder.
        like: the network whose tensors are asked for (on the meta device will do): the file may
            then have any form that `load_released` reads. None: the names of the file.

    Raises:
        WeightsError: a missing or unreadable file.
    """

    def __init__(
        self, path: str | Path, *, section: str = "model", like: nn.Module | None = None
    ) -> None:
        self._lock = threading.Lock()
        self._source = TensorSource(Path(path), section)
        self._shapes = self._source.shapes
        self._layout = Layout("file", {n: Stored((n,)) for n in self._shapes})
        if like is not None:
            self._layout = detect(self._source.shapes, layouts(like))
            self._shapes = {n: t.shape for n, t in like.state_dict().items()}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.__exit__()

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own, on the CPU."""
        with self._lock:
            return self._layout.stored[name].read(self._source.read, self._shapes[name])
