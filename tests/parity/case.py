"""One case of a golden folder, and the registry of adapters that run our code on it.

An adapter is chosen by the case's `official` name; it builds our part from `case.config`, feeds
`in.*`, and calls `case.check(name, got)` for every expected tensor (or compares tables itself).
Nothing about a case (sizes, seeds, file names) is written in an adapter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass
class Case:
    """A manifest entry with its tensors (or its table) loaded."""

    folder: Path
    entry: dict[str, Any]
    siblings: dict[str, dict[str, Any]]
    """All entries of the manifest by name, for cases that refer to another."""
    checked: set[str] = field(default_factory=set)
    _tensors: dict[str, Tensor] | None = None

    @property
    def name(self) -> str:
        return str(self.entry["name"])

    @property
    def official(self) -> str:
        return str(self.entry["official"])

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.entry.get("config") or {})

    @property
    def tensors(self) -> dict[str, Tensor]:
        if self._tensors is None:
            tensors: dict[str, Tensor] = {}
            if self.entry.get("weights_file"):
                shared = load_file(self.folder / self.entry["weights_file"])
                tensors = {k: v for k, v in shared.items() if k.startswith("weight.")}
            self._tensors = tensors | load_file(self.folder / self.entry["file"])
        return self._tensors

    def table(self, file: str | None = None) -> Any:
        """The JSON of this case (or of another file of the folder)."""
        return json.loads((self.folder / (file or self.entry["file"])).read_text())

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below `prefix.`, without it: `group("weight")` is the state dict."""
        cut = len(prefix) + 1
        return {k[cut:]: v for k, v in self.tensors.items() if k.startswith(prefix + ".")}

    def input(self, name: str) -> Tensor:
        return self.tensors[f"in.{name}"]

    def has(self, name: str) -> bool:
        return name in self.tensors

    def check(self, name: str, got: Tensor) -> None:
        """Compare with the expected tensor `name` (full name: `out.x`, `grad.in.x`) by the rule."""
        want = self.tensors[name]
        self.checked.add(name)
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} != {tuple(want.shape)}"
        got, want = got.detach().double(), want.double()
        undefined = torch.isnan(want)
        assert torch.equal(torch.isnan(got), undefined), f"{name}: NaN in other places"
        if undefined.all():
            return
        error = float((got - want)[~undefined].abs().max())
        allowed = self.allowed(float(want[~undefined].abs().max()))
        assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"

    def allowed(self, maximum: float) -> float:
        rule = self.entry["tolerance"]
        return 0.0 if rule == "exact" else float(rule["abs"] + rule["rel_of_max"] * maximum)

    def unchecked(self) -> set[str]:
        """Expected tensors that no `check` looked at."""
        if self.entry["kind"] != "safetensors":
            return set()
        expected = {k for k in self.tensors if k.startswith(("out.", "grad."))}
        return expected - self.checked


Adapter = Callable[[Case], None]
_ADAPTERS: list[tuple[re.Pattern[str], str | None, Adapter]] = []


def adapter(official: str, kind: str | None = None) -> Callable[[Adapter], Adapter]:
    """Register a function for cases whose `official` matches the pattern (and `kind`, if given)."""

    def register(function: Adapter) -> Adapter:
        _ADAPTERS.append((re.compile(official), kind, function))
        return function

    return register


def find_adapter(entry: dict[str, Any]) -> Adapter | None:
    found = [
        f
        for pattern, kind, f in _ADAPTERS
        if pattern.search(entry["official"]) and kind in (None, entry["kind"])
    ]
    assert len(found) <= 1, f"{entry['name']}: several adapters match {entry['official']!r}"
    return found[0] if found else None


def load_cases(folder: Path) -> list[Case]:
    entries = json.loads((folder / "manifest.json").read_text())["cases"]
    by_name = {e["name"]: e for e in entries}
    return [Case(folder, e, by_name) for e in entries]


def only_weights(case: Case) -> bool:
    """A file that only holds weights for other cases is not a case."""
    if case.entry["kind"] != "safetensors":
        return False
    return not any(k.startswith(("out.", "grad.")) for k in case.entry.get("tensors", {}))
