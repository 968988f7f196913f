"""Rules: what each drops, what stays dropped, what comes back, what another threshold keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kinema.data.expression import ExpressionError
from kinema.data.filter import (
    READY_RULES,
    Filtering,
    Rule,
    apply_rules,
    parse_rules,
    usable,
    what_if,
)
from kinema.data.filter_file import filter_file, what_if_file
from kinema.data.filter_presets import PRESETS, preset, render_presets
from kinema.data.table_file import TableFile
from kinema.data.tables import write_table

TABLE = pa.table(
    {
        "path": [f"{i}.mp4" for i in range(8)],
        "aesthetic": [4.0, 5.0, 6.0, None, 5.0, 4.0, 7.0, 5.0],
        "text": ["a b c", "", "a", "a b", None, "", "x", "y"],
        "dropped_by": ["", "", "", "", "", "check:truncated", "filter: old rule", ""],
    }
)
RULES = parse_rules(["aesthetic >= 5", "not blank(text)", "aesthetic < 6.5"])


def test_accounts_of_each_rule() -> None:
    result = apply_rules(TABLE, RULES)
    assert result.dropped_by.to_pylist() == [
        "filter: aesthetic >= 5",
        "filter: not blank(text)",
        "",
        "filter: aesthetic >= 5",
        "filter: not blank(text)",
        "check:truncated",
        "filter: aesthetic < 6.5",
        "",
    ]
    figures = [(c.first, c.alone, c.would, c.no_value) for c in result.counts]
    # Row 3 has no score, so both rules about it drop it; neither does it alone.
    assert figures == [(2, 1, 2, 1), (2, 2, 2, 0), (1, 1, 2, 1)]
    assert result.others == {"check:truncated": 1}
    assert (result.rows, result.kept) == (8, 2)
    assert result.kept_mask.tolist() == [False, False, True, False, False, False, False, True]


def test_loosening_brings_rows_back_but_only_those_of_a_filter() -> None:
    first = apply_rules(TABLE, RULES)
    table = TABLE.set_column(3, "dropped_by", first.dropped_by)
    again = apply_rules(table, parse_rules(["aesthetic >= 4"]))
    assert np.flatnonzero(~again.kept_mask).tolist() == [3, 5]
    assert again.dropped_by[5].as_py() == "check:truncated"
    assert apply_rules(table, []).kept == 7


def test_figures_do_not_depend_on_how_rows_come() -> None:
    whole = apply_rules(TABLE, RULES)
    parts = Filtering(RULES)
    result = parts.result([parts.add(TABLE.slice(i, 3)) for i in (0, 3, 6)])
    assert result.dropped_by.to_pylist() == whole.dropped_by.to_pylist()
    assert result.counts == whole.counts
    assert result.others == whole.others


def test_many_rows_against_plain_counting() -> None:
    random = np.random.default_rng(3)
    columns = {name: random.integers(0, 10, 5000) for name in "abc"}
    result = apply_rules(pa.table(columns), parse_rules([f"{name} > 2" for name in "abc"]))
    breaks = np.stack([columns[name] <= 2 for name in "abc"])
    assert [c.would for c in result.counts] == breaks.sum(1).tolist()
    alone = breaks & (breaks.sum(0) == 1)
    assert [c.alone for c in result.counts] == alone.sum(1).tolist()
    first = breaks & (np.cumsum(breaks, 0) == 1)
    assert [c.first for c in result.counts] == first.sum(1).tolist()
    assert result.kept == int((~breaks.any(0)).sum())


def test_rules_without_their_columns() -> None:
    rules = parse_rules(["aesthetic >= 5", "flow > 1 and jitter < 2", "aesthetic >= 5"])
    assert len(rules) == 2
    able, left_out = usable(rules, TABLE.column_names)
    assert [rule.text for rule in able] == ["aesthetic >= 5"]
    assert [(rule.text, names) for rule, names in left_out] == [
        ("flow > 1 and jitter < 2", ["flow", "jitter"])
    ]
    with pytest.raises(ExpressionError, match="no column 'flow'"):
        apply_rules(TABLE, rules)


def test_a_rule_is_on_one_line_and_its_texts_are_kept() -> None:
    rule = Rule.parse('aesthetic\n  >= 5  and text == "a  b"')
    assert rule.reason == 'filter: aesthetic >= 5 and text == "a  b"'
    assert Rule.parse(rule.text) == rule


def test_what_if() -> None:
    found = what_if(TABLE, "aesthetic", [4.0, 5.0, 6.5])
    assert (found.rows, found.missing) == (7, 1)  # the truncated one is not looked at
    assert found.at_least.tolist() == [6 / 7, 5 / 7, 1 / 7]
    assert found.at_most.tolist() == [1 / 7, 4 / 7, 5 / 7]
    assert found.sentence(1) == "at aesthetic >= 5 you keep 71 %"
    words = what_if(TABLE, "words(text)", [1])
    assert words.at_least.tolist() == [5 / 7]
    assert what_if(TABLE, "aesthetic", [5], within=np.arange(8) < 2).at_least.tolist() == [0.5]


@pytest.mark.parametrize("scale", [1e-5, 1.0, 3e7])
def test_thresholds_are_round_and_near_the_tenths(scale: float) -> None:
    values = np.random.default_rng(0).normal(5, 1, 4000) * scale
    found = what_if(pa.table({"v": values}), "v")
    assert 9 <= len(found.thresholds) <= 12
    assert (np.abs(found.at_least[1:-1] - np.linspace(0.9, 0.1, 9)) < 0.05).all()
    digits = [f"{t:.9e}".partition("e")[0].rstrip("0") for t in found.thresholds]
    assert all(len(mantissa) <= 4 for mantissa in digits), digits


def test_what_if_of_one_value_or_none() -> None:
    assert what_if(pa.table({"v": [3.0, 3.0]}), "v").thresholds.tolist() == [3.0]
    assert what_if(pa.table({"v": pa.nulls(2)}), "v").thresholds.tolist() == []


def test_every_preset_and_ready_rule_is_readable() -> None:
    schema_columns = {name for p in PRESETS.values() for name in p.columns}
    assert {"aesthetic", "duration", "text"} <= schema_columns
    assert all(p.source and p.title and p.rules for p in PRESETS.values())
    assert len(parse_rules(list(READY_RULES))) == len(READY_RULES)
    text = render_presets()
    assert all(name in text for name in PRESETS)
    assert preset("opensora-1.2/stage2").columns == ["aesthetic", "text"]
    with pytest.raises(ValueError, match=r"try: opensora-1\.2/stage2"):
        preset("opensora-1.2/stag2")


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_file_is_filtered_as_the_table_is(tmp_path: Path, ending: str) -> None:
    source, output = tmp_path / f"in.{ending}", tmp_path / "sub" / f"out.{ending}"
    write_table(TABLE, source)
    result = filter_file(TableFile(source), RULES, str(output))
    assert result.dropped_by.to_pylist() == apply_rules(TABLE, RULES).dropped_by.to_pylist()
    written = TableFile(output).read()
    assert written["dropped_by"].to_pylist() == result.dropped_by.to_pylist()
    assert written["path"][0].as_py() == str(tmp_path / "0.mp4")  # it means the same file there
    assert written["aesthetic"].to_pylist() == TABLE["aesthetic"].to_pylist()


def test_removing_and_only_counting(tmp_path: Path) -> None:
    source, output = tmp_path / "in.parquet", tmp_path / "out.parquet"
    write_table(TABLE, source)
    filter_file(TableFile(source), RULES, None)
    assert not output.exists()
    filter_file(TableFile(source), RULES, str(output), remove=True)
    written = TableFile(output).read()
    assert written["path"].to_pylist() == ["2.mp4", "7.mp4"]
    assert "dropped_by" not in written.column_names
    with pytest.raises(ValueError, match="no clip is kept"):
        filter_file(TableFile(source), parse_rules(["false"]), str(output), remove=True)
    assert TableFile(output).rows == 2  # what was there stays


def test_what_if_of_a_file_with_other_rules(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    write_table(TABLE, source)
    found = what_if_file(TableFile(source), "aesthetic", RULES, [5.0])
    assert (found.alone.rows, found.alone.missing) == (7, 1)
    assert found.alone.at_least.tolist() == [5 / 7]
    assert found.with_rules is not None
    assert found.with_rules.rows == 5  # with a caption; the rules about the column are not applied
    assert found.with_rules.at_least.tolist() == [3 / 5]
