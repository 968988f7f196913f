from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from kinema.config.errors import ConfigError
from kinema.config.recipe import dump_recipe, load_recipe, parse_overrides
from kinema.config.settings import settings


@settings
class Model:
    type: Literal["model"] = "model"
    depth: int = 2
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError("a model has at least one block")


@settings
class Other:
    type: Literal["other"] = "other"
    gain: float = 1.0


@settings
class Recipe:
    model: Annotated[Model | Other, Field(discriminator="type")]
    ratio: str | None = None
    sizes: dict[str, int] = Field(default_factory=dict)


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_inherits_merges_and_overrides(tmp_path: Path) -> None:
    write(
        tmp_path, "base.yaml", "model: {type: model, depth: 3, rate: 1e-4}\nsizes: {a: 1, b: 2}\n"
    )
    child = write(tmp_path, "child.yaml", "base: base.yaml\nmodel: {depth: 4}\nsizes: {b: 3}\n")
    recipe = load_recipe(child, Recipe, ["model.rate=2e-4", "--ratio", "16:9"])
    assert recipe.model == Model(depth=4, rate=2e-4)
    assert recipe.sizes == {"a": 1, "b": 3}
    assert recipe.ratio == "16:9"


def test_replace_and_a_new_type_take_the_place_of_what_was_inherited(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "model: {type: model, depth: 3}\nsizes: {a: 1}\n")
    child = write(
        tmp_path,
        "child.yaml",
        "base: base.yaml\nmodel: {type: other, gain: 2}\nsizes: !replace {b: 3}\n",
    )
    recipe = load_recipe(child, Recipe)
    assert recipe.model == Other(gain=2.0)
    assert recipe.sizes == {"b": 3}


def test_a_dumped_recipe_reads_back_equal(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", "model: {type: model, rate: 1e-15}\nratio: '9:16'\n")
    recipe = load_recipe(path, Recipe)
    again = load_recipe(write(tmp_path, "d.yaml", dump_recipe(recipe)), Recipe)
    assert again == recipe


def test_errors_name_file_line_and_key(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "model:\n  type: model\n  depht: 3\n")
    child = write(tmp_path, "child.yaml", "base: base.yaml\nratio: x\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(child, Recipe)
    assert f"{tmp_path / 'base.yaml'}:3: model.depht" in str(caught.value)
    assert "did you mean 'depth'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {type: model}\nmodel: {type: other}\n", "key 'model' is given twice"),
        ("- 1\n- 2\n", "a mapping of keys"),
        ("model: [1, 2\n", "not valid YAML"),
        ("model: !python/object:os.system {}\n", "tag !python/object:os.system is not known"),
        ("model: !!python/object:os.system x\n", "python/object:os.system is not known"),
        ("model: !repalce {type: model}\n", r"r\.yaml:1: tag !repalce is not known"),
        ("model: {type: model, depth: !!int abc}\n", "not what its tag says"),
        ("model: {type: model, depth: !!bool abc}\n", "not what its tag says"),
        ("base: nothing-here\nmodel: {type: model}\n", "no recipe 'nothing-here'"),
        ("", "required"),
        ("model:\n\ttype: 1\n", r"r\.yaml:2: is not valid YAML: while scanning"),
        ("model: &a [*a]\n", "contains itself"),
        ("? [a]\n: 1\n", r"r\.yaml:1: a key is a name"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, "r.yaml", text)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_recipe(path, Recipe)
    assert "r.yaml" in str(caught.value) or "recipe" in str(caught.value)


def test_a_circle_of_bases_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    write(tmp_path, "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_recipe(str(tmp_path / "a.yaml"), Recipe)


def test_missing_recipe_names_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"neither a \.yaml file nor a named recipe"):
        load_recipe("no/such", Recipe)


def test_overrides_are_yaml_values_under_dotted_keys() -> None:
    tokens = ["--a.b", "1e-3", "c=[1, 2]", "--d=null", "e=on"]
    assert parse_overrides(tokens) == [
        (("a", "b"), 1e-3),
        (("c",), [1, 2]),
        (("d",), None),
        (("e",), "on"),
    ]


@pytest.mark.parametrize(
    "tokens",
    [
        ["--a"],
        ["word"],
        ["=1"],
        ["a..b=1"],
        ["a=[1"],
        ["a={b: 1, b: 2}"],
        ["a=!no {}"],
        ["a=!no 1"],
    ],
)
def test_a_bad_override_is_refused(tokens: list[str]) -> None:
    with pytest.raises(ConfigError, match="command line"):
        parse_overrides(tokens)


def test_a_wrong_override_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", "model: {type: model}\n")
    with pytest.raises(ConfigError, match=r"command line: model\.depth"):
        load_recipe(path, Recipe, ["model.depth=3.5"])
    with pytest.raises(ConfigError, match="did you mean 'depth'"):
        load_recipe(path, Recipe, ["--model.depht", "3"])


def test_an_override_below_the_place_of_an_error_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", "model: {type: model}\n")
    with pytest.raises(ConfigError, match=r"r\.yaml:1 with model\.depth from the command line: m"):
        load_recipe(path, Recipe, ["model.depth=0"])


def test_an_override_merges_a_mapping_or_replaces_it(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", "model: {type: model}\nsizes: {a: 1}\n")
    assert load_recipe(path, Recipe, ["sizes={b: 2}"]).sizes == {"a": 1, "b": 2}
    assert load_recipe(path, Recipe, ["sizes=!replace {b: 2}"]).sizes == {"b": 2}
    assert load_recipe(path, Recipe, ["ratio="]).ratio is None
