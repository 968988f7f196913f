"""The rooms and what each may import (docs/architecture.md has the reasons)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "kinema"

MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "telemetry": {"config"},
    "media": {"config"},
    "endpoint": {"config"},
    "models": {"config"},
    "diffusion": {"config"},
    "data": {"config", "telemetry", "media"},
    "checkpoint": {"config", "telemetry", "models"},
    "parallel": {"config", "models"},
    "curation": {
        "config", "telemetry", "media", "endpoint", "models", "data", "checkpoint",
    },
    "generation": {
        "config", "telemetry", "media", "endpoint", "models", "diffusion", "parallel", "checkpoint",
    },
    "training": {
        "config", "telemetry", "media", "models", "diffusion", "data", "checkpoint", "parallel",
        "generation",
    },
    "evaluation": {
        "config", "telemetry", "media", "models", "diffusion", "data", "checkpoint", "parallel",
        "generation",
    },
    "serving": {"config", "telemetry", "media", "data", "checkpoint", "generation"},
    "cluster": {"config", "telemetry"},
    "demo": {
        "config", "telemetry", "media", "models", "diffusion", "data", "checkpoint", "parallel",
        "generation", "training", "evaluation",
    },
}  # fmt: skip
MAY_IMPORT["cli"] = set(MAY_IMPORT)

MAY_DISTRIBUTE = {"parallel", "checkpoint", "training", "generation"}
TORCH_FREE_ROOMS = {"config", "cluster"}
"""Rooms without torch anywhere; every `config.py` and all of `cli` (at module level) as well."""


def _files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module_level(tree: ast.Module) -> ast.Module:
    body = [n for n in tree.body if not isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return ast.Module(body=body, type_ignores=[])


def _room(path: Path) -> str | None:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_keep_to_the_table(path: Path) -> None:
    room = _room(path)
    tree = ast.parse(path.read_text())
    names = list(_imports(tree))
    if room is None or room == "recipes":
        return
    assert room in MAY_IMPORT, f"room {room!r} is not in the table"
    used = {n.split(".")[1] for n in names if n.startswith("kinema.") and n.count(".") >= 1}
    used = {u for u in used if (PACKAGE / u).is_dir()}
    assert used - {room} <= MAY_IMPORT[room], f"{room} imports {used - MAY_IMPORT[room] - {room}}"
    distributed = [n for n in names if n.startswith("torch.distributed")]
    assert room in MAY_DISTRIBUTE or not distributed, f"{room} touches torch.distributed"
    if room in TORCH_FREE_ROOMS or path.name == "config.py":
        assert not [n for n in names if n.split(".")[0] == "torch"], "must import without torch"
    if room == "cli":
        top = {n.split(".")[0] for n in _imports(_module_level(tree))}
        heavy = top - {"__future__", "typer", "kinema"} - set(__import__("sys").stdlib_module_names)
        assert not heavy, f"imported at the top of a command module: {heavy}"


def test_the_table_has_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {r for r, needs in MAY_IMPORT.items() if r not in done and needs <= done | {r}}
        assert ready, f"rooms import each other in a circle: {set(MAY_IMPORT) - done}"
        done |= ready


def test_rooms_named_helper_drawers_do_not_exist() -> None:
    bad = {"utils.py", "util.py", "misc.py", "common.py", "helpers.py"}
    assert not [p for p in _files() if p.name in bad]
