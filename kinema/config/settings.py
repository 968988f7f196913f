"""Settings of a component: a frozen dataclass that checks itself when it is made.

Every room declares its own in its `config.py`, which must import without torch::

    @settings
    class OptimConfig:
        lr: float = 1e-4
        betas: tuple[float, float] = (0.9, 0.999)

Unknown fields and wrong types are errors; `1` is a float, `"1"` and `1.5` are not integers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterator
from difflib import get_close_matches
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
)

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from kinema.config.errors import ConfigError

T = TypeVar("T")
MISSING = ("missing", "missing_keyword_only_argument")
"""What pydantic calls a value that is required and not there."""
Path = tuple[str, ...]
"""Where a value stands in a recipe: `("model", "depth")`."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only, validated dataclass.

    It refuses unknown fields, and numbers that are not finite.
    """
    config = ConfigDict(
        extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
    return cast(type[T], pydantic_dataclass(frozen=True, kw_only=True, config=config)(cls))


def is_settings(annotation: object) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def from_dict(schema: type[T], data: dict[str, Any], *, where: str = "settings") -> T:
    """Build `schema` from plain data (as YAML or JSON give it).

    Raises:
        ConfigError: unknown or missing keys, wrong types or values; names every one of them,
            `where` it stands, and the nearest right name.
    """
    return build(schema, data, locate=lambda path: f"{where}: {dotted(path)}" if path else where)


def build(schema: type[T], data: dict[str, Any], *, locate: typing.Callable[[Path], str]) -> T:
    """`from_dict`, with the caller's own way of telling where a key stands (file and line)."""
    problems = [
        (path, unknown_key_message(path[-1], known)) for path, known in unknown_keys(schema, data)
    ]
    if not problems:
        try:
            # JSON mode is strict and still takes a list for a tuple, "51" for an integer dict key.
            return TypeAdapter(schema).validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            found: dict[Path, str] = {}
            for item in error.errors():
                path = _clean_location(data, item["loc"], item["type"] in MISSING)
                text = _message(dict(item))  # a value of several kinds has a message of each
                found[path] = f"{found[path]}; or else: {text}" if path in found else text
            problems = list(found.items())
        except TypeError as error:
            raise ConfigError(str(error), where=locate(())) from None
    first_path, first = problems[0]
    more = "".join(f"\n{locate(path)}: {text}" for path, text in problems[1:])
    raise ConfigError(first + more, where=locate(first_path))


def to_dict(value: object) -> dict[str, Any]:
    """Plain data (JSON types only) of a settings object: what `from_dict` takes back."""
    dumped = TypeAdapter(type(value)).dump_python(value, mode="json")
    assert isinstance(dumped, dict)
    return dumped


def fingerprint(value: object) -> str:
    """SHA-256 over the canonical JSON of a settings object or of plain data."""
    plain = to_dict(value) if is_settings(type(value)) else value
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def dotted(path: Path) -> str:
    return ".".join(path)


def unknown_key_message(key: str, known: typing.Iterable[str]) -> str:
    names = sorted(known)
    near = get_close_matches(key, names, n=1)
    if near:
        return f"unknown key {key!r}; did you mean {near[0]!r}?"
    return f"unknown key {key!r}; known here: {', '.join(names)}"


def unknown_keys(annotation: Any, data: object, at: Path = ()) -> Iterator[tuple[Path, list[str]]]:
    """Every key of `data` that the schema does not have, with the names it has there."""
    for option in _options(annotation, data):
        if is_settings(option) and isinstance(data, dict):
            hints = _hints(option)
            fields = {f.name: hints[f.name] for f in dataclasses.fields(option) if f.init}
            for key, value in data.items():
                if str(key) not in fields:
                    yield (*at, str(key)), list(fields)
                else:
                    yield from unknown_keys(fields[str(key)], value, (*at, str(key)))
        elif get_origin(option) is dict and isinstance(data, dict):
            key_type, value_type = get_args(option)
            allowed = [str(v) for v in get_args(key_type)] if _is_literal(key_type) else None
            for key, value in data.items():
                if allowed is not None and str(key) not in allowed:
                    yield (*at, str(key)), allowed
                else:
                    yield from unknown_keys(value_type, value, (*at, str(key)))
        elif get_origin(option) in (tuple, list) and isinstance(data, (list, tuple)):
            inner = [a for a in get_args(option) if a is not Ellipsis]
            for index, value in enumerate(data):
                if inner:
                    item = inner[min(index, len(inner) - 1)]
                    yield from unknown_keys(item, value, (*at, str(index)))


def _is_literal(annotation: object) -> bool:
    return get_origin(annotation) is Literal


def _strip(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _options(annotation: Any, data: object) -> list[Any]:
    """The members of a union that `data` can mean: settings are told apart by their `type`."""
    annotation = _strip(annotation)
    if get_origin(annotation) not in (Union, types.UnionType):
        return [annotation]
    members = list(_members(annotation))
    tagged = [m for m in members if is_settings(m) and _tag(m) is not None]
    if tagged and isinstance(data, dict):
        kind = data.get("type", _tag(tagged[0]) if len(tagged) == 1 else None)
        return [m for m in tagged if _tag(m) == kind]
    if isinstance(data, dict):
        return [m for m in members if is_settings(m) or get_origin(m) is dict][:1]
    return [m for m in members if get_origin(m) in (tuple, list)][:1]


def _members(annotation: Any) -> Iterator[Any]:
    """Members of a union, and of unions in it (`Annotated[A | B, ...] | None`)."""
    annotation = _strip(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    """Types of a schema's fields, by name: every setting that is read asks for them."""
    return typing.get_type_hints(schema, include_extras=True)


def _tag(schema: type) -> str | None:
    hint = _strip(_hints(schema).get("type"))
    return str(get_args(hint)[0]) if _is_literal(hint) else None


def _clean_location(data: Any, loc: tuple[object, ...], missing: bool) -> Path:
    """Drop what pydantic adds to a location (union tags, type names), keep the recipe's keys.

    Args:
        missing: the last part is a key that is not in `data`.
    """
    path: list[str] = []
    for part in loc:
        name = str(part)
        if isinstance(data, dict) and name in {str(k) for k in data}:
            data = next(v for k, v in data.items() if str(k) == name)
        elif isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif not (missing and part is loc[-1]):
            continue
        path.append(name)
    return tuple(path)


def _message(error: dict[str, Any]) -> str:
    kind, value = error["type"], error.get("input")
    shown = json.dumps(value, default=str)
    if kind in MISSING:
        if str(error["loc"][-1]).isdecimal():
            return "has too few values"
        return "this key is required and missing"
    if kind in ("union_tag_invalid", "literal_error", "union_tag_not_found"):
        context = error.get("ctx", {})
        expected = str(context.get("expected_tags") or context.get("expected") or "a 'type'")
        wrong = context.get("tag", value)
        near = get_close_matches(str(wrong), re.findall(r"'([^']*)'", expected), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        if kind == "union_tag_not_found":
            return f"needs a key 'type' that says which kind it is{hint}"
        return f"{wrong!r} is not one of {expected}{hint}"
    text = str(error["msg"]).removeprefix("Value error, ")
    return text if kind == "value_error" else f"{text} (got {shown[:80]})"
