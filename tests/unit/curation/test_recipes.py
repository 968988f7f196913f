"""The recipes of curation that come with the package."""

from __future__ import annotations

import pytest

from kinema.config.errors import ConfigError
from kinema.config.recipe import load_recipe, recipe_names
from kinema.curation.config import CurateRecipe
from kinema.curation.dedup import COLUMNS as DEDUP
from kinema.curation.rules import Rules
from kinema.curation.stages import column_names

NAMES = [name for name in recipe_names() if name.startswith("curate/")]


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_is_about_a_column_that_the_recipe_gives(name: str) -> None:
    recipe = load_recipe(name, CurateRecipe)
    Rules.of(recipe).check({*column_names(recipe), *DEDUP})


@pytest.mark.parametrize("name", NAMES)
def test_a_mistyped_key_names_the_right_one(name: str) -> None:
    with pytest.raises(ConfigError, match="did you mean 'crf'"):
        load_recipe(name, CurateRecipe, ["cut.crff=3"])


def test_stages_run_only_where_the_recipe_says() -> None:
    names = column_names(load_recipe("curate/default", CurateRecipe))
    assert "flow" in names
    assert not names & {"aesthetic", "ocr_area", "match", "caption_words"}
    alone = column_names(load_recipe("curate/alone", CurateRecipe))
    assert "flow" not in alone


def test_rules_of_a_preset_come_first_and_those_of_duplicates_last() -> None:
    recipe = load_recipe("curate/opensora-1.2-stage2", CurateRecipe, ["filter.rules=[flow >= 1]"])
    texts = Rules.of(recipe).texts
    assert texts.index("aesthetic >= 4.5") < texts.index("flow >= 1")
    assert texts[-2:] == ['duplicate_of == ""', 'similar_to == ""']


def test_a_column_that_no_stage_gives_is_told_with_what_would() -> None:
    recipe = load_recipe("curate/default", CurateRecipe, ["filter.rules=[ocr_area < 0.1]"])
    with pytest.raises(ConfigError, match="the stage 'ocr' gives it"):
        Rules.of(recipe).check(column_names(recipe))
