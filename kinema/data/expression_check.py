"""What the parts of an expression are on a table's columns, and what does not go together."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from typing import Literal

import pyarrow as pa

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

Kind = Literal["number", "text", "flag", "any"]
"""What a value is; a `flag` is true or false, `any` a column in which nothing is known."""
NAMES = {"number": "a number", "text": "text", "flag": "true or false", "any": "anything"}
OF_TEXT = ("words", "length", "lower", "blank", "contains", "starts", "ends", "matches")
CONDITIONS = ("blank", "missing", "contains", "starts", "ends", "matches")


def column_kind(type_: pa.DataType) -> Kind | None:
    """What an Arrow column holds; none: nothing that expressions know (lists, bytes, ...)."""
    kind = type_.value_type if pa.types.is_dictionary(type_) else type_
    if pa.types.is_boolean(kind):
        return "flag"
    if pa.types.is_null(kind):
        return "any"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    textual = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return "text" if textual or kind == pa.string_view() else None


def nearest(name: str, names: Collection[str]) -> str | None:
    """The name that was likely meant."""
    for other in names:
        if other.lower() == name.lower():
            return other
    close = get_close_matches(name, names, n=1)
    return close[0] if close else None


class Checker:
    """Finds out what the parts are, and refuses what does not go together."""

    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.text = text
        self.schema = schema

    def fault(self, node: Node, what: str, hint: str | None = None) -> ExpressionError:
        return fault(self.text, node.start, node.end, what, hint=hint)

    def want(self, node: Node, kind: Kind, why: str) -> None:
        found = self.kind(node)
        if found != kind and found != "any":
            raise self.fault(node, f"{why}; this is {NAMES[found]}")

    def kind(self, node: Node) -> Kind:
        match node:
            case Number():
                return "number"
            case Text():
                return "text"
            case Flag():
                return "flag"
            case Column():
                return self.column(node)
            case Call():
                return self.call(node)
            case Negative():
                self.want(node.operand, "number", "`-` needs a number")
                return "number"
            case Chain():
                for sign, operand in (("", node.first), *node.rest):
                    self.want(operand, "number", f"`{sign or node.rest[0][0]}` needs numbers")
                return "number"
            case Compare():
                self.compare(node)
            case Not():
                self.want(node.operand, "flag", "`not` needs a condition")
            case Junction():
                for operand in node.operands:
                    self.want(operand, "flag", f"`{node.sign}` joins conditions")
        return "flag"

    def column(self, node: Column) -> Kind:
        names = self.schema.names
        if node.name not in names:
            near = nearest(node.name, names)
            if near is not None and not near.isidentifier():
                near = f"`{near}`"
            shown = [name for name in names if not name.startswith("_")]
            raise self.fault(
                node, f"there is no column {node.name!r}", near or f"it has {', '.join(shown)}"
            )
        type_ = self.schema.field(node.name).type
        kind = column_kind(type_)
        if kind is None:
            raise self.fault(node, f"column {node.name!r} holds {type_}, which has no order")
        return kind

    def call(self, node: Call) -> Kind:
        if node.name == "missing":
            inner = node.arguments[0]
            if self.kind(inner) == "flag" and not isinstance(inner, Column):
                raise self.fault(inner, "a condition is never missing", "missing(COLUMN)")
            return "flag"
        wanted: Kind = "text" if node.name in OF_TEXT else "number"
        for argument in node.arguments:
            self.want(argument, wanted, f"{node.name} needs {NAMES[wanted]}")
        if node.name in CONDITIONS:
            return "flag"
        return "text" if node.name == "lower" else "number"

    def compare(self, node: Compare) -> None:
        left = node.first
        for sign, right in node.rest:
            one = self.kind(left)
            if isinstance(right, Values):
                other: Kind = "text" if isinstance(right.values[0], str) else "number"
            else:
                other = self.kind(right)
            if one != other and "any" not in (one, other):
                raise fault(
                    self.text, left.start, right.end,
                    f"compares {NAMES[one]} with {NAMES[other]}",
                    hint='text is quoted: "..."' if "text" in (one, other) else None,
                )  # fmt: skip
            if sign in ("<", "<=", ">", ">=") and {one, other} & {"text", "flag"}:
                kind = NAMES["text" if "text" in (one, other) else "flag"]
                raise fault(
                    self.text, left.start, right.end,
                    f"{kind} has no order here", hint="compare by `==`, `!=` or `in`",
                )  # fmt: skip
            left = right
