"""Expressions over columns: against a plain evaluator, missing values, kinds, messages."""

from __future__ import annotations

import contextlib
import math
import operator
import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinema.data.expression import BATCH_ROWS, ExpressionError, parse, quoted
from kinema.data.expression_values import word_counts

TABLE = pa.table(
    {
        "aesthetic": pa.array([4.0, 5.5, None, float("nan"), 6.25]),
        "score32": pa.array([4.7, 4.8, None, 1e30, -1.0], pa.float32()),
        "height": pa.array([480, 720, 1080, None, 0]),
        "file_size": [49_999_999, 50_000_000, 50_000_001, 1, 2],
        "text": ["a cat runs", "", None, "   ", 'the "Big" Cat, slowly'],
        "camera": pa.array(["pan", "tilt", "pan", None, ""]).dictionary_encode(),
        "audio": [True, False, None, True, False],
        "unknown": pa.nulls(5),
        "aesthetic score": [1.0, 2.0, 3.0, 4.0, 5.0],
        "shape": [[1, 2]] * 5,
    }
)


def kept(text: str) -> list[int]:
    return np.flatnonzero(parse(text).mask(TABLE)).tolist()


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        # A comparison with a missing number is false, whichever it is.
        ("aesthetic >= 4", [0, 1, 4]),
        ("aesthetic < 4", []),
        ("aesthetic != 4", [1, 4]),
        ("aesthetic not in [4]", [1, 4]),
        ("not aesthetic < 5", [1, 2, 3, 4]),
        ("missing(aesthetic)", [2, 3]),
        ("missing(aesthetic) or aesthetic > 5", [1, 2, 3, 4]),
        ("4 < aesthetic <= 6", [1]),
        ("6 > aesthetic > 4 != aesthetic", [1]),
        # What cannot be worked out is missing.
        ("height / height == 1", [0, 1, 2]),
        ("missing(height / height)", [3, 4]),
        ("log(height) > 0", [0, 1, 2]),
        ("missing(sqrt(score32))", [2, 4]),
        ("min(height, aesthetic) <= 6", [0, 1, 4]),
        ("max(aesthetic, 5) == 5", [0]),
        ("abs(score32) == 1", [4]),
        # 32-bit scores are compared as they are stored.
        ("score32 >= 4.7", [0, 1, 3]),
        ("score32 in [4.7, 4.8]", [0, 1]),
        ("score32 < 1e300", [0, 1, 3, 4]),
        # Units, shares, separators.
        ("file_size <= 50MB", [0, 1, 3, 4]),
        ("file_size <= 50 MB", [0, 1, 3, 4]),
        ("file_size > 47.6837158 MiB", [1, 2]),
        ("file_size == 50_000_000", [1]),
        ("20% == 0.2 and 2min == 120 and 250ms == 0.25s and 1h == 3600", [0, 1, 2, 3, 4]),
        ("-height + 2 * 240 >= 0", [0, 4]),
        ("10 - 2 - 3 == 5 and 8 / 2 / 2 == 2 and 2 + 3 * 2 == 8", [0, 1, 2, 3, 4]),
        # Text: missing is empty.
        ('text == ""', [1, 2]),
        ('camera != "pan"', [1, 3, 4]),
        ('camera in ["pan", "tilt"]', [0, 1, 2]),
        ('camera not in ["pan"]', [1, 3, 4]),
        ("missing(camera)", [3, 4]),
        ("blank(text)", [1, 2, 3]),
        ("not blank(text)", [0, 4]),
        ("words(text) >= 3", [0, 4]),
        ("words(text) == 0", [1, 2, 3]),
        ("length(text) == 10", [0]),
        ('contains(text, "cat")', [0]),
        ('contains(lower(text), "cat")', [0, 4]),
        (r'matches(text, "\bruns$|^the")', [0, 4]),
        ('matches(text, "(?i)CAT")', [0, 4]),
        (r'contains(text, "\"Big\"")', [4]),
        ("starts(text, 'a ') or ends(text, 'ly')", [0, 4]),
        ("contains(text, '\"')", [4]),
        # True and false.
        ("audio", [0, 3]),
        ("not audio", [1, 2, 4]),
        ("audio == false", [1, 4]),
        ("missing(audio)", [2]),
        ("(height > 500) == audio", [4]),
        ("true and not false", [0, 1, 2, 3, 4]),
        # Nothing is known of a column.
        ("unknown > 1", []),
        ('unknown == "x"', []),
        ('unknown == ""', [0, 1, 2, 3, 4]),
        ("missing(unknown)", [0, 1, 2, 3, 4]),
        # Precedence.
        ("true or true and false", [0, 1, 2, 3, 4]),
        ("not true or true", [0, 1, 2, 3, 4]),
        ("not (true or true)", []),
        ("`aesthetic score` > 4", [4]),
    ],
)
def test_rows(text: str, rows: list[int]) -> None:
    assert kept(text) == rows


@pytest.mark.parametrize(
    ("text", "message", "at"),
    [
        ("astetic >= 4.5", "there is no column 'astetic'", "astetic"),
        ("aesthetic >= 4.5 and heigth > 1", "there is no column 'heigth'", "heigth"),
        ("aesthetic = 4", "'=' is not expected here", "="),
        ("aesthetic >= 4 && audio", "'&' is not expected", "&"),
        ("aesthetic >=", "it ends too early", ""),
        ("(aesthetic >= 4", "`)` is missing", ""),
        ("aesthetic >= 4)", "there is no `(`", ")"),
        ("aesthetic 4", "4 is not expected", "4"),
        ("file_size < 50 mb", "'mb' is not a unit", "mb"),
        ("audio AND audio", "AND is not expected", "AND"),
        ("lenght(text) > 3", "there is no function 'lenght'", "lenght"),
        ("words() > 3", "words takes 1 argument", "words()"),
        ("words(height) > 3", "words needs text; this is a number", "height"),
        ("text > 4", "compares text with a number", "text > 4"),
        ('text > "a"', "text has no order", 'text > "a"'),
        ("audio < true", "true or false has no order", "audio < true"),
        ("height", "a rule is true or false; this is a number", "height"),
        ("not height", "`not` needs a condition", "height"),
        ("height and audio", "`and` joins conditions", "height"),
        ("height + text > 1", "`+` needs numbers; this is text", "text"),
        ("missing(height > 1)", "a condition is never missing", "height > 1"),
        ("height in []", "the list is empty", "]"),
        ('height in [1, "a"]', "mixes numbers and texts", '"a"'),
        ("height in [aesthetic]", "numbers or quoted texts only", "aesthetic"),
        ("height in 3", "`[` is missing", "3"),
        ('matches(text, "(")', "not a regular expression", '"("'),
        ("matches(text, camera)", "looks for a quoted text", "camera"),
        ("shape == 1", "column 'shape' holds list", "shape"),
        ('text == "a', "is not expected here", '"'),
        ("(" * 61 + "1", "deeper than 60 levels", "("),
        ("__import__('os').system('true')", "'.' is not expected", "."),
        ("exec('1') == 1", "there is no function 'exec'", "exec"),
    ],
)
def test_messages_point_at_the_place(text: str, message: str, at: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        parse(text).mask(TABLE)
    what, shown, carets = caught.value.what.split("\n")
    assert message in what
    assert shown.strip() == text.strip()
    first = carets.index("^") - 4
    assert text[first : first + carets.count("^")] == at


def test_the_nearest_name_is_offered() -> None:
    with pytest.raises(ExpressionError, match=r"try: aesthetic$"):
        parse("Aestethic > 1").mask(TABLE)
    with pytest.raises(ExpressionError, match=r"try: `aesthetic score`$"):
        parse("aesthetic_score > 1").mask(TABLE)
    with pytest.raises(ExpressionError, match="empty"):
        parse("  ")


def test_a_long_expression_is_shown_around_the_place() -> None:
    text = " and ".join(["aesthetic >= 4.5"] * 40 + ["nonsense > 1"] + ["aesthetic >= 4.5"] * 40)
    with pytest.raises(ExpressionError) as caught:
        parse(text).mask(TABLE)
    _, shown, carets = caught.value.what.split("\n")
    assert len(shown) < 110
    assert shown[carets.index("^") :].startswith("nonsense > 1")


def test_long_chains_do_not_exhaust_the_stack() -> None:
    assert kept(" and ".join(["height >= 0"] * 1200)) == [0, 1, 2, 4]
    assert kept("1" + " + 1" * 4000 + " == 4001") == [0, 1, 2, 3, 4]


def test_columns_kinds_and_values() -> None:
    expression = parse("words(text) * 2 + min(height, 5) > 3")
    assert expression.columns == {"text", "height"}
    assert pickle.loads(pickle.dumps(expression)) == expression
    assert parse("height * 2").kind(TABLE.schema) == "number"
    assert parse("height * 2").value(TABLE).to_pylist() == [960, 1440, 2160, None, 0]
    assert parse("lower(text)").value(TABLE).to_pylist()[4] == 'the "big" cat, slowly'
    assert parse("audio").value(TABLE).to_pylist() == [True, False, None, True, False]
    assert parse("1 + 1").numbers(TABLE).tolist() == [2.0] * 5
    assert quoted("aesthetic score") == "`aesthetic score`"
    assert quoted("height") == "height"
    assert quoted("and") == "`and`"
    with pytest.raises(ExpressionError, match="not a number"):
        parse("text").numbers(TABLE)


def test_what_a_rule_looked_at() -> None:
    rule = parse('aesthetic >= 4.5 and words(text) > 5 and camera == "pan"')
    assert rule.looked_at(TABLE, 0) == [
        ("words(text)", 3.0), ("aesthetic", 4.0), ("text", "a cat runs"), ("camera", "pan")
    ]  # fmt: skip
    assert dict(rule.looked_at(TABLE, 2))["aesthetic"] is None


def test_batches_and_chunks_join() -> None:
    rows = BATCH_ROWS + 77
    values = np.arange(rows)
    halves = [pa.array(values[:1000]), pa.array(values[1000:])]
    table = pa.table({"n": pa.chunked_array(halves), "m": pa.array(values % 7)})
    mask = parse("n - m * 3 > 40000 or m == 2").mask(table)
    assert (mask == ((values - values % 7 * 3 > 40000) | (values % 7 == 2))).all()
    assert parse("n >= 0").mask(table.slice(0, 0)).tolist() == []
    assert parse("true").mask(table.slice(5, 3)).tolist() == [True] * 3
    assert parse("n >= 5").mask(table.slice(4, 3)).tolist() == [False, True, True]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(alphabet="ab \t\n\x1c\u00a0\u2003\u200b\u3000é’", max_size=9), max_size=9),
    st.sampled_from([pa.string(), pa.large_string()]),
    st.integers(0, 3),
)
def test_words_are_those_of_split(texts: list[str], kind: pa.DataType, first: int) -> None:
    expected = [len(text.split()) for text in texts]
    assert word_counts(pa.array(texts, kind)).tolist() == expected
    assert word_counts(pa.array(texts, kind).slice(first, 3)).tolist() == expected[first:][:3]


# A second, plain evaluator: one row at a time, None is missing.

NUMBERS = st.one_of(st.none(), st.integers(-4, 4).map(float))
TEXTS = st.sampled_from([None, "", "a", "b b", "a b c"])
SIGNS = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le,
    ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


def _apply(sign: str, a: float | None, b: float | None) -> float | None:
    if a is None or b is None or (sign == "/" and b == 0):
        return None
    return {"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a / b


Tree = tuple[str, Any]
"""Its text, and a function of a row."""


def _numeric() -> st.SearchStrategy[Tree]:
    leaf = st.one_of(
        st.sampled_from(["x", "y"]).map(lambda n: (n, lambda row: row[n])),
        st.integers(0, 4).map(lambda n: (str(n), lambda row: float(n))),
        st.just(("words(t)", lambda row: float(len((row["t"] or "").split())))),
    )

    def deeper(inner: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
        def pair(sign: str, a: Tree, b: Tree) -> Tree:
            return f"({a[0]} {sign} {b[0]})", lambda row: _apply(sign, a[1](row), b[1](row))

        def least(a: Tree, b: Tree) -> Tree:
            def both(row: Any) -> float | None:
                values = a[1](row), b[1](row)
                return None if None in values else min(values)

            return f"min({a[0]}, {b[0]})", both

        def minus(a: Tree) -> Tree:
            return f"-{a[0]}", lambda row: None if a[1](row) is None else -a[1](row)

        return st.one_of(
            st.builds(pair, st.sampled_from("+-*/"), inner, inner),
            st.builds(least, inner, inner),
            st.builds(minus, inner),
        )

    return st.recursive(leaf, deeper, max_leaves=4)


def _condition() -> st.SearchStrategy[Tree]:
    def compare(sign: str, a: Tree, b: Tree) -> Tree:
        def holds(row: Any) -> bool:
            values = a[1](row), b[1](row)
            return None not in values and SIGNS[sign](*values)

        return f"{a[0]} {sign} {b[0]}", holds

    def band(a: Tree, b: Tree, c: Tree) -> Tree:
        first, second = compare("<", a, b), compare("<=", b, c)
        return f"{a[0]} < {b[0]} <= {c[0]}", lambda row: first[1](row) and second[1](row)

    number = _numeric()
    leaf = st.one_of(
        st.builds(compare, st.sampled_from(list(SIGNS)), number, number),
        st.builds(band, number, number, number),
        number.map(lambda n: (f"missing({n[0]})", lambda row: n[1](row) is None)),
        st.sampled_from(["", "a", "b b"]).map(
            lambda v: (f't == "{v}"', lambda row: (row["t"] or "") == v)
        ),
        st.just(('contains(t, "b")', lambda row: "b" in (row["t"] or ""))),
        st.just(("x in [1, -2]", lambda row: row["x"] in (1.0, -2.0))),
    )

    def deeper(inner: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
        return st.one_of(
            st.builds(
                lambda a, b: (f"({a[0]} and {b[0]})", lambda row: a[1](row) and b[1](row)),
                inner, inner,
            ),
            st.builds(
                lambda a, b: (f"({a[0]} or {b[0]})", lambda row: a[1](row) or b[1](row)),
                inner, inner,
            ),
            inner.map(lambda a: (f"not ({a[0]})", lambda row: not a[1](row))),
        )  # fmt: skip

    return st.recursive(leaf, deeper, max_leaves=4)


@settings(max_examples=150, deadline=None)
@given(_condition(), st.lists(st.tuples(NUMBERS, NUMBERS, TEXTS), min_size=1, max_size=8))
def test_like_a_plain_evaluator(tree: Tree, rows: list[tuple[Any, Any, Any]]) -> None:
    table = pa.table(
        {
            "x": pa.array([row[0] for row in rows], pa.float64()),
            "y": pa.array([row[1] for row in rows], pa.int64()),
            "t": pa.array([row[2] for row in rows], pa.string()),
        }
    )
    text, holds = tree
    expected = [bool(holds({"x": x, "y": y, "t": t})) for x, y, t in rows]
    assert parse(text).mask(table).tolist() == expected, text


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="xyt()[]<>=!+-*/.,'\"`0129 andortinwordsmissing%&\n", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    table = pa.table({"x": [1.0], "y": [2.0], "t": ["a"]})
    with contextlib.suppress(ExpressionError):
        assert parse(text).mask(table).shape == (1,)


def test_poles_are_missing() -> None:
    table = pa.table({"x": [0.0, -1.0, 1.0, math.e]})
    assert parse("log(x)").value(table).to_pylist() == [None, None, 0.0, 1.0]
    assert parse("log10(x * 100)").value(table).to_pylist()[2] == 2.0
    assert parse("1 / x").value(table).to_pylist()[0] is None
