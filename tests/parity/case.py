"""One case of a golden folder, and the registry of adapters that run our code on it.

An adapter is chosen by the case's `official` name; it builds our part from `case.config`, feeds
`in.*`, and calls `case.check(name, got)` for every expected tensor (or compares tables itself).
Nothing about a case (sizes, seeds, file names) is written in an adapter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
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

    def check_each(self, compute: Mapping[str, Callable[[], Tensor]]) -> None:
        """`check` those of the named tensors that the case has, and compute no others."""
        for name, run in compute.items():
            if self.has(name):
                self.check(name, run())

    def unchecked(self) -> set[str]:
        """Expected tensors that no `check` looked at."""
        if self.entry["kind"] != "safetensors":
            return set()
        return {name for name in self.tensors if is_expected(name)} - self.checked


def is_expected(tensor: str) -> bool:
    """Whether our code has to give a tensor of that name."""
    return tensor.startswith(("out.", "grad."))


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


class GoldenError(Exception):
    """A folder that holds no cases."""


def load_cases(folder: Path) -> list[Case]:
    """All cases of a folder.

    Raises:
        GoldenError: no manifest there, or not one of this format.
    """
    manifest = folder / "manifest.json"
    try:
        entries = json.loads(manifest.read_text())["cases"]
        by_name = {e["name"]: e for e in entries}
        for entry in entries:
            missing = {"name", "file", "kind", "official", "tolerance"} - entry.keys()
            if missing:
                raise GoldenError(f"{manifest}: {entry['name']} has no {min(missing)}")
    except OSError as error:
        raise GoldenError(f"{manifest} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GoldenError(f"{manifest} is no manifest of golden cases: {error!r}") from None
    if not entries:
        raise GoldenError(f"{manifest} lists no cases")
    if len(by_name) < len(entries):
        raise GoldenError(f"{manifest} gives several cases the same name")
    return [Case(folder, e, by_name) for e in entries]


def only_holds_inputs(case: Case) -> bool:
    """A file that only holds weights or inputs for other cases is not a case."""
    file = case.folder / case.entry["file"]
    if case.entry["kind"] != "safetensors" or not file.is_file():
        return False
    with safe_open(file, "pt") as tensors:
        return not any(is_expected(name) for name in tensors.keys())  # noqa: SIM118
