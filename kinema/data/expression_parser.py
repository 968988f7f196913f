"""Reads expressions over columns into trees; nothing is evaluated here.

A recursive-descent parser of its own, so that text from a command line or a page can never be
code. Precedence, from loose to tight, as in Python: `or`, `and`, `not`, comparisons (which may be
chained), `+ -`, `* /`, unary `-`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from kinema.data.expression_tree import (
    Call,
    Chain,
    Column,
    Compare,
    ExpressionError,
    Flag,
    Junction,
    Negative,
    Node,
    Not,
    Number,
    Text,
    Values,
    fault,
)

UNITS = {
    "B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
    "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40,
    "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9,
    "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0,
    "px": 1.0, "fps": 1.0, "%": 0.01,
}  # fmt: skip
"""What may follow a number, as a factor: bytes, bits (per second), seconds, a share."""
FUNCTIONS = {
    "abs": 1, "log": 1, "log10": 1, "sqrt": 1, "min": -2, "max": -2,
    "words": 1, "length": 1, "lower": 1, "blank": 1, "missing": 1,
    "contains": 2, "starts": 2, "ends": 2, "matches": 2,
}  # fmt: skip
"""Name -> how many arguments; a negative number: at least as many."""
KEYWORDS = ("and", "or", "not", "in", "true", "false")
MAX_LENGTH = 20_000
MAX_DEPTH = 60
"""Of parentheses, signs and functions inside each other."""

_TOKEN = re.compile(
    r"""\s+
    | (?P<number> (?: \d[\d_]* (?: \.\d* )? | \.\d+ ) (?: [eE][+-]?\d+ )? )
    | (?P<name> [^\W\d]\w* )
    | (?P<quoted> `[^`]*` )
    | (?P<text> "(?: [^"\\] | \\. )*" | '(?: [^'\\] | \\. )*' )
    | (?P<sign> == | != | <= | >= | [-+*/<>()\[\],%] )
    """,
    re.VERBOSE | re.DOTALL,
)
_MEANT = {
    "=": "`==` compares",
    "&": "write `and`",
    "|": "write `or`",
    "!": "write `not`",
    "~": "write `not`",
    "“": 'quote text with "',
    "”": 'quote text with "',
    "’": "quote text with '",
    "≥": "write `>=`",
    "≤": "write `<=`",
    "≠": "write `!=`",
    "×": "write `*`",
    "^": "there are no powers; multiply",
    '"': "the text has no closing quote",
    "'": "the text has no closing quote",
    "`": "the name has no closing `",
}


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    """number, name, quoted, text, sign or end."""
    text: str
    start: int
    end: int


def _tokens(text: str) -> list[_Token]:
    found, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            sign = text[position]
            raise fault(
                text,
                position,
                position + 1,
                f"{sign!r} is not expected here",
                hint=_MEANT.get(sign),
            )
        if match.lastgroup:
            found.append(_Token(match.lastgroup, match.group(), position, match.end()))
        position = match.end()
    found.append(_Token("end", "", len(text), len(text)))
    return found


def parse_tree(text: str) -> Node:
    """The tree of one expression.

    Raises:
        ExpressionError: it cannot be read; shows where.
    """
    if not text.strip():
        raise ExpressionError("the expression is empty", hint="aesthetic >= 4.5")
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"an expression has at most {MAX_LENGTH:,} characters")
    parser = _Parser(text)
    tree = parser.any_of()
    parser.end()
    return tree


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _tokens(text)
        self.position = 0
        self.depth = 0

    @property
    def now(self) -> _Token:
        return self.tokens[self.position]

    def take(self, *texts: str) -> _Token | None:
        """The next token if it is one of these names or signs."""
        token = self.now
        if token.kind in ("name", "sign") and token.text in texts:
            self.position += 1
            return token
        return None

    def expect(self, sign: str, why: str) -> _Token:
        token = self.take(sign)
        if token is None:
            raise self.unexpected(f"`{sign}` is missing: {why}")
        return token

    def unexpected(self, what: str | None = None, hint: str | None = None) -> ExpressionError:
        token = self.now
        if what is None:
            what = "it ends too early" if token.kind == "end" else f"{token.text} is not expected"
        return fault(self.text, token.start, max(token.end, token.start + 1), what, hint=hint)

    def end(self) -> None:
        token = self.now
        if token.kind == "end":
            return
        if token.kind == "name" and token.text.lower() in KEYWORDS and token.text not in KEYWORDS:
            raise self.unexpected(hint=f"`{token.text.lower()}` is written in small letters")
        before = self.tokens[self.position - 1]
        if before.kind == "number" and token.kind == "name":
            near = [u for u in UNITS if u.lower() == token.text.lower()]
            raise self.unexpected(
                f"{token.text!r} is not a unit", hint=", ".join(near or [u for u in UNITS])
            )
        near_end = token.text == ")"
        raise self.unexpected(
            "there is no `(` for this" if near_end else None,
            None if near_end else "join conditions by `and` or `or`",
        )

    def deeper(self, token: _Token) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise fault(self.text, token.start, token.end, f"deeper than {MAX_DEPTH} levels")

    def any_of(self) -> Node:
        operands = [self.all_of()]
        while self.take("or"):
            operands.append(self.all_of())
        return self.junction("or", operands)

    def all_of(self) -> Node:
        operands = [self.negation()]
        while self.take("and"):
            operands.append(self.negation())
        return self.junction("and", operands)

    def junction(self, sign: str, operands: list[Node]) -> Node:
        if len(operands) == 1:
            return operands[0]
        return Junction(operands[0].start, operands[-1].end, sign, tuple(operands))

    def negation(self) -> Node:
        token = self.take("not")
        if token is None:
            return self.comparison()
        self.deeper(token)
        operand = self.negation()
        self.depth -= 1
        return Not(token.start, operand.end, operand)

    def comparison(self) -> Node:
        first = self.sum()
        rest: list[tuple[str, Node]] = []
        while (sign := self.comparison_sign()) is not None:
            rest.append((sign, self.values() if sign.endswith("in") else self.sum()))
        return Compare(first.start, rest[-1][1].end, first, tuple(rest)) if rest else first

    def comparison_sign(self) -> str | None:
        if token := self.take("==", "!=", "<=", ">=", "<", ">", "in"):
            return token.text
        following = self.tokens[min(self.position + 1, len(self.tokens) - 1)]
        if self.now.text == "not" and self.now.kind == "name" and following.text == "in":
            self.position += 2
            return "not in"
        return None

    def values(self) -> Node:
        opening = self.expect("[", 'after `in` comes a list: [1, 2] or ["a", "b"]')
        numbers: list[float] = []
        texts: list[str] = []
        if self.now.text == "]":
            raise self.unexpected("the list is empty")
        while True:
            item = self.unary()
            negative = isinstance(item, Negative)
            inner = item.operand if isinstance(item, Negative) else item
            if isinstance(inner, Number):
                numbers.append(-inner.value if negative else inner.value)
            elif isinstance(inner, Text) and not negative:
                texts.append(inner.value)
            else:
                raise fault(
                    self.text, item.start, item.end, "a list holds numbers or quoted texts only"
                )
            if numbers and texts:
                raise fault(self.text, item.start, item.end, "a list mixes numbers and texts")
            if not self.take(","):
                break
        closing = self.expect("]", "it ends the list")
        found = tuple(numbers) if numbers else tuple(texts)
        return Values(opening.start, closing.end, found)

    def sum(self) -> Node:
        return self.chain(self.product, "+", "-")

    def product(self) -> Node:
        return self.chain(self.unary, "*", "/")

    def chain(self, operand: object, *signs: str) -> Node:
        assert callable(operand)
        first: Node = operand()
        rest: list[tuple[str, Node]] = []
        while token := self.take(*signs):
            rest.append((token.text, operand()))
        return Chain(first.start, rest[-1][1].end, first, tuple(rest)) if rest else first

    def unary(self) -> Node:
        token = self.take("-", "+")
        if token is None:
            return self.atom()
        self.deeper(token)
        operand = self.unary()
        self.depth -= 1
        return Negative(token.start, operand.end, operand) if token.text == "-" else operand

    def atom(self) -> Node:
        token = self.now
        if token.kind == "number":
            return self.number()
        if token.kind == "text":
            self.position += 1
            return Text(token.start, token.end, _unquoted(token.text))
        if token.kind == "quoted":
            self.position += 1
            return Column(token.start, token.end, token.text[1:-1])
        if self.take("("):
            self.deeper(token)
            inner = self.any_of()
            self.expect(")", "it closes an earlier `(`")
            self.depth -= 1
            return inner
        if self.take("true", "false"):
            return Flag(token.start, token.end, token.text == "true")
        if token.kind == "name" and token.text not in KEYWORDS:
            self.position += 1
            return (
                self.call(token)
                if self.now.text == "("
                else Column(token.start, token.end, token.text)
            )
        raise self.unexpected()

    def number(self) -> Node:
        token = self.now
        self.position += 1
        value, end, unit = float(token.text.replace("_", "")), token.end, self.now
        if unit.text in UNITS and unit.kind in ("name", "sign"):
            self.position += 1
            factor, end = UNITS[unit.text], unit.end
            # 20% is the number nearest to 0.2, which 20 * 0.01 is not.
            value = value / round(1 / factor) if factor < 1 else value * factor
        return Number(token.start, end, value)

    def call(self, token: _Token) -> Node:
        if token.text not in FUNCTIONS:
            near = get_close_matches(token.text.lower(), FUNCTIONS, n=1)
            raise fault(
                self.text,
                token.start,
                token.end,
                f"there is no function {token.text!r}",
                hint=near[0] if near else ", ".join(FUNCTIONS),
            )
        opening = self.expect("(", "")
        self.deeper(opening)
        arguments: list[Node] = []
        if self.now.text != ")":
            arguments.append(self.any_of())
            while self.take(","):
                arguments.append(self.any_of())
        closing = self.expect(")", f"it ends {token.text}(...)")
        self.depth -= 1
        wanted = FUNCTIONS[token.text]
        if len(arguments) != wanted if wanted >= 0 else len(arguments) < -wanted:
            least = "at least " if wanted < 0 else ""
            raise fault(
                self.text,
                token.start,
                closing.end,
                f"{token.text} takes {least}{abs(wanted)} "
                f"argument{'' if abs(wanted) == 1 else 's'}, here are {len(arguments)}",
            )
        return Call(token.start, closing.end, token.text, tuple(arguments))


def _unquoted(written: str) -> str:
    # A backslash keeps its meaning for `matches` unless it stands before a quote or another one.
    return re.sub(r"\\([\\\"'])", r"\1", written[1:-1])
