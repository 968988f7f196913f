"""Recipes: YAML files that inherit, can be overridden by dotted keys, and are checked whole.

A recipe is named by its path below `kinema/recipes/` (`tiny/world`) or by a path to a file.
`base: NAME` (or a list) starts from other recipes; mappings merge key by key. A mapping marked
`!replace`, or one that changes its `type`, replaces the inherited one instead.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path as FilePath
from typing import Any, TypeVar

import yaml

from kinema.config.errors import ConfigError
from kinema.config.settings import Path, build, dotted, to_dict

T = TypeVar("T")
RECIPES = FilePath(__file__).resolve().parent.parent / "recipes"
CORE_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")
}
COMMAND_LINE = "command line"
"""Where an override was written."""


class _Replace(dict[str, Any]):
    """A mapping that takes the place of the inherited one."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core scalars: `1e-4` is a number, `16:9` and `on` are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, Any]]] = {}  # noqa: RUF012 (yaml's own)


def _resolver(tag: str, pattern: str, first: str) -> None:
    import re

    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


_resolver("bool", r"^(?:true|false|True|False)$", "tfTF")
_resolver("null", r"^(?:~|null|Null|NULL|)$", "~nN\0")
_resolver("int", r"^[-+]?[0-9]+$", "-+0123456789")
_resolver(
    "float",
    r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$",
    "-+0123456789.",
)
_Loader.yaml_implicit_resolvers.setdefault("", []).extend(
    _Loader.yaml_implicit_resolvers.get("\0", [])
)


@dataclass
class Source:
    """Plain data of a recipe and where each key of it was written."""

    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[Path, str] = field(default_factory=dict)

    def locate(self, path: Path) -> str:
        """File, line and key; names overrides below it, as they may be what is wrong."""
        place = next(
            self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines
        )
        below = [
            dotted(key)
            for key, written in self.lines.items()
            if written == COMMAND_LINE and len(key) > len(path) and key[: len(path)] == path
        ]
        if below:
            place += f" with {', '.join(below)} from the {COMMAND_LINE}"
        return f"{place}: {dotted(path)}" if path else place


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml"))


def find_recipe(name: str, relative_to: FilePath | None = None) -> FilePath:
    """The file of a recipe given by name or path.

    Raises:
        ConfigError: neither a file nor a known name; names the nearest.
    """
    for candidate in ([relative_to / name] if relative_to else []) + [FilePath(name)]:
        if candidate.suffix in (".yaml", ".yml") and candidate.is_file():
            return candidate
    known = recipe_names()
    if name in known:
        return RECIPES / f"{name}.yaml"
    near = get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"no recipe {name!r}: neither a .yaml file nor a named recipe",
        hint=f"{hint}named recipes: {', '.join(known)}",
    )


def read_source(name: str, overrides: list[str] | None = None) -> Source:
    """Read a recipe with its bases and apply overrides, unchecked."""
    source = _read(find_recipe(name), ())
    for path, value in parse_overrides(overrides or []):
        _merge(source.data, _nest(path, value))
        source.lines = {k: v for k, v in source.lines.items() if k[: len(path)] != path}
        source.lines[path] = COMMAND_LINE
    return source


def load_recipe(name: str, schema: type[T], overrides: list[str] | None = None) -> T:
    """Read, inherit, override and check a recipe.

    Args:
        name: name or path of the recipe.
        schema: a `@settings` class.
        overrides: `["optim.lr=1e-4", "--model.depth", "4"]`, values in YAML.

    Raises:
        ConfigError: with file, line, key and the nearest right name.
    """
    source = read_source(name, overrides)
    return build(schema, source.data, locate=source.locate)


def dump_recipe(value: object) -> str:
    """The whole resolved recipe as YAML that `load_recipe` reads back to an equal value."""
    return yaml.safe_dump(to_dict(value), sort_keys=False, allow_unicode=True)


def parse_overrides(tokens: list[str]) -> list[tuple[Path, Any]]:
    """`a.b=1`, `--a.b=1` and `--a.b 1` all set key `a.b`; the value is YAML.

    A mapping is merged into what is there, `a.b=!replace {...}` takes its place.

    Raises:
        ConfigError: a token that is no assignment, or an option without a value.
    """
    result: list[tuple[Path, Any]] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        key, equals, text = token.removeprefix("--").partition("=")
        if not equals:
            if not token.startswith("--"):
                raise ConfigError(
                    f"{token!r} is not an override", where=COMMAND_LINE, hint="write KEY=VALUE"
                )
            if not rest:
                raise ConfigError(f"{token!r} needs a value", where=COMMAND_LINE)
            text = rest.pop(0)
        if not key or not all(key.split(".")):
            raise ConfigError(f"{token!r} has no key", where=COMMAND_LINE, hint="KEY=VALUE")
        try:
            node = yaml.compose(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"{text!r} is not a YAML value: {_problem(error)}", where=f"{COMMAND_LINE}: {key}"
            ) from None
        value = None if node is None else _construct(node, FilePath(COMMAND_LINE), (), {})
        result.append((tuple(key.split(".")), value))
    return result


def _nest(path: Path, value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def _read(path: FilePath, seen: tuple[FilePath, ...]) -> Source:
    path = path.resolve()
    if path in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise ConfigError(f"recipes inherit from each other in a circle: {chain}", where=str(path))
    own = _parse(path)
    bases = own.data.pop("base", None) or []
    merged = Source()
    for base in [bases] if isinstance(bases, str) else bases:
        try:
            inherited = _read(find_recipe(str(base), path.parent), (*seen, path))
        except ConfigError as error:
            if error.where is None:
                raise ConfigError(error.what, where=f"{path}: base", hint=error.hint) from None
            raise
        _merge(merged.data, inherited.data)
        merged.lines.update(inherited.lines)
    _merge(merged.data, own.data)
    merged.lines.update(own.lines)
    return merged


def _parse(path: FilePath) -> Source:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path)) from None
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"is not valid YAML: {_problem(error)}", where=where) from None
    source = Source(lines={(): _shown(path)})
    if node is None:
        return source
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError("a recipe is a mapping of keys to values", where=str(path))
    try:
        source.data = _construct(node, path, (), source.lines)
    except RecursionError:
        raise ConfigError("a value contains itself (`&` and `*`)", where=str(path)) from None
    return source


def _shown(path: FilePath) -> str:
    """What messages call a recipe's file: of one that comes with the package, below `recipes/`."""
    return str(path.relative_to(RECIPES) if path.is_relative_to(RECIPES) else path)


def _problem(error: yaml.YAMLError) -> str:
    """What YAML says is wrong, without its own idea of the place."""
    parts = (
        (error.context, error.problem) if isinstance(error, yaml.MarkedYAMLError) else (str(error),)
    )
    return ", ".join(part for part in parts if part)


def _construct(node: yaml.Node, path: FilePath, at: Path, lines: dict[Path, str]) -> Any:
    line = f"{_shown(path)}:{node.start_mark.line + 1}"
    replaces = isinstance(node, yaml.MappingNode) and node.tag == "!replace"
    if node.tag not in CORE_TAGS and not replaces:
        raise ConfigError(
            f"tag {node.tag} is not known; only !replace is, of a mapping", where=line
        )
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = _Replace() if replaces else {}
        for key_node, value_node in node.value:
            here = f"{_shown(path)}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError("a key is a name or a number", where=here)
            key = str(key_node.value)
            if key in result:
                raise ConfigError(f"key {key!r} is given twice", where=here)
            lines[(*at, key)] = here
            result[key] = _construct(value_node, path, (*at, key), lines)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(v, path, (*at, str(i)), lines) for i, v in enumerate(node.value)]
    try:
        return _Loader("").construct_object(node)
    except (ValueError, KeyError):  # an explicit tag: `!!int abc`
        raise ConfigError(f"{node.value!r} is not what its tag says", where=line) from None


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        old = into.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and not isinstance(value, _Replace):
            kind = value.get("type")
            if kind is None or kind == old.get("type"):
                _merge(old, value)
                continue
        into[key] = copy.deepcopy(value)
