from __future__ import annotations

import pickle
from typing import Annotated, Literal

import pytest
from pydantic import Field

from kinema.config.errors import ConfigError, KinemaError
from kinema.config.settings import fingerprint, from_dict, settings, to_dict


@settings
class Small:
    type: Literal["small"] = "small"
    depth: int = 2
    patch: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth={self.depth}: a model needs at least one block")


@settings
class Wide:
    type: Literal["wide"] = "wide"
    width: float = 1.0


@settings
class Whole:
    model: Annotated[Small | Wide, Field(discriminator="type")]
    name: str | None = None
    mode: Literal["fast", "careful"] = "fast"
    buckets: dict[str, dict[int, tuple[float, int | None]]] = Field(default_factory=dict)


def test_builds_from_plain_data_and_back() -> None:
    data = {
        "model": {"type": "small", "depth": 3, "patch": [1, 1, 1]},
        "name": "a",
        "buckets": {"144p": {"51": [1, None]}},
    }
    whole = from_dict(Whole, data)
    assert whole.model == Small(depth=3, patch=(1, 1, 1))
    assert whole.buckets == {"144p": {51: (1.0, None)}}
    assert from_dict(Whole, to_dict(whole)) == whole


def test_is_frozen() -> None:
    with pytest.raises(AttributeError, match="depth"):
        Small().depth = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"model": {"type": "small", "depht": 1}}, "model.depht: unknown key 'depht'; did you"),
        ({"model": {"type": "wide", "depth": 1}}, "model.depth: unknown key 'depth'"),
        ({"model": {"type": "smal"}}, "'smal' is not one of 'small', 'wide'; did you mean 'small'"),
        ({"model": {"depth": 1}}, "needs a key 'type'"),
        ({"model": {"type": "small", "depth": 1.5}}, "model.depth: Input should be a valid int"),
        ({"model": {"type": "small", "depth": "3"}}, "valid integer (got \"3\")"),
        ({"model": {"type": "small", "depth": True}}, "model.depth"),
        ({"model": {"type": "small", "depth": 0}}, "depth=0: a model needs at least one block"),
        ({"model": {"type": "small", "depth": 0}}, "file.yaml: model: depth=0"),
        ({"model": {"type": "small", "patch": [1, 2]}}, "model.patch"),
        ({"model": {"type": "small"}, "mode": "carefull"}, "mode: 'carefull' is not one of"),
        ({"model": {"type": "small"}, "mode": "carefull"}, "did you mean 'careful'?"),
        ({}, "model: this key is required"),
        ({"model": {"type": "wide", "width": float("nan")}}, "should be a finite number"),
        ({"model": {"type": "wide", "width": float("-inf")}}, "should be a finite number"),
        ({"model": {"type": "small"}, "buckets": {"a": {"5": [1.0]}}}, "a.5.1: has too few values"),
        ({"model": {"type": "small"}, "buckets": {"144p": {"51": ["x", 1]}}}, "buckets.144p.51.0"),
        ({"model": {"type": "small"}, "buckets": {"a": {"five": [1.0, 1]}}}, "buckets.a.five"),
    ],
)  # fmt: skip
def test_says_what_is_wrong_and_where(data: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Whole, data, where="file.yaml")
    assert expected in str(caught.value)
    assert str(caught.value).startswith("file.yaml: ")


def test_names_every_unknown_key_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Whole, {"model": {"type": "small", "a": 1}, "nam": "x"})
    assert "model.a" in str(caught.value)
    assert "did you mean 'name'" in str(caught.value)


def test_fingerprint_follows_the_values_alone() -> None:
    assert fingerprint(Small(depth=3)) == fingerprint(Small(depth=3, patch=(1, 2, 2)))
    assert fingerprint(Small(depth=3)) != fingerprint(Small(depth=4))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_errors_cross_processes() -> None:
    error = pickle.loads(pickle.dumps(KinemaError("bad", where="x.mp4", hint="drop it")))
    assert (error.what, error.where, error.hint) == ("bad", "x.mp4", "drop it")
    assert str(error) == "x.mp4: bad\n  try: drop it"


@settings
class Mixed:
    over: Literal["all", "node"] | int = "all"


def test_a_value_of_several_kinds_has_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Mixed, {"over": "odd"})
    first, *more = str(caught.value).splitlines()
    assert "'odd' is not one of 'all' or 'node'; or else: " in first
    assert "integer" in first
    assert not more
