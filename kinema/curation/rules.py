"""The rules of a curation run: which are known when, and what they drop."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa

from kinema.config.errors import ConfigError
from kinema.curation.config import CurateRecipe
from kinema.curation.stage import Stage
from kinema.data.expression import nearest
from kinema.data.filter import FilterResult, Rule, apply_rules, parse_rules

GIVEN_BY = {
    "aesthetic": "aesthetic",
    "match": "match",
    "nsfw": "nsfw",
    "watermark": "watermark",
    "ocr_boxes": "ocr",
    "ocr_area": "ocr",
    "ocr_text": "ocr",
    "similar_to": "embed",
    "similarity": "embed",
    "concept": "embed",
    "concept_rank": "embed",
    "duplicate_of": "dedup",
    "hash_distance": "dedup",
}
"""Column -> what to switch on in the recipe to have it."""

STAYS = frozenset(
    {"duration", "num_frames", "fps", "height", "width", "aspect_ratio", "resolution"}
)
"""What cutting a clip states anew, but for rounding as it was planned."""


@dataclass(frozen=True)
class Rules:
    """Expressions that kept clips fulfil, the preset's first, those about duplicates last."""

    rules: tuple[Rule, ...]

    @classmethod
    def of(cls, recipe: CurateRecipe) -> Rules:
        """The rules of a recipe.

        Raises:
            KinemaError: one cannot be read, or there is no such preset.
        """
        from kinema.curation.dedup import dedup_rules
        from kinema.data.filter_presets import preset

        texts: list[str] = []
        if recipe.filter.preset is not None:
            texts += preset(recipe.filter.preset).rules
        texts += recipe.filter.rules
        if recipe.dedup is not None:
            texts += dedup_rules(recipe.dedup, embeddings=recipe.embed is not None)
        return cls(tuple(parse_rules(texts)))

    @property
    def columns(self) -> set[str]:
        return {name for rule in self.rules for name in rule.columns}

    @property
    def texts(self) -> list[str]:
        return [rule.text for rule in self.rules]

    def check(self, columns: Collection[str]) -> None:
        """Refuse rules about columns that nothing gives.

        Args:
            columns: all that there will be.

        Raises:
            ConfigError: names the first such rule and what would give the column.
        """
        for rule in self.rules:
            for name in sorted(rule.columns - set(columns)):
                stage = GIVEN_BY.get(name)
                near = nearest(name, columns)
                hint = f"did you mean {near!r}?" if near else None
                if stage is not None:
                    hint = f"the stage {stage!r} gives it: switch it on in the recipe"
                raise ConfigError(
                    f"nothing gives the column {name!r} of the rule `{rule.text}`",
                    where="filter",
                    hint=hint,
                )

    def now(self, table: pa.Table, later: Sequence[Stage]) -> list[Rule]:
        """The rules that can be decided on already.

        Args:
            later: stages still to come: what they give, or give anew, is not looked at.
        """
        given = {name for stage in later for part in stage.parts for name in part.columns}
        known = set(table.column_names) - (given - STAYS)
        return [rule for rule in self.rules if rule.columns <= known]

    def apply(self, table: pa.Table) -> FilterResult:
        """The verdict on every row."""
        return apply_rules(table, self.rules)
