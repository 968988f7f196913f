"""What an expression is made of, and how a mistake in one is shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kinema.config.errors import KinemaError

SHOWN = 88
"""Characters of an expression that a message shows."""


class ExpressionError(KinemaError):
    """An expression that cannot be read, or not on these columns; shown with a caret."""

    exit_code = 2


def fault(
    text: str, start: int, end: int, what: str, *, hint: str | None = None, where: str | None = None
) -> ExpressionError:
    """An error about `text[start:end]`."""
    line = "".join(c if c.isprintable() else " " for c in text)
    first = max(0, min(start - SHOWN // 2, len(line) - SHOWN)) if len(line) > SHOWN else 0
    before = "..." if first else ""
    after = "..." if len(line) > first + SHOWN else ""
    shown = before + line[first : first + SHOWN] + after
    width = max(1, min(end, first + SHOWN) - start)
    carets = " " * (len(before) + start - first) + "^" * width
    return ExpressionError(f"{what}\n    {shown}\n    {carets}", hint=hint, where=where)


@dataclass(frozen=True, slots=True)
class Node:
    """A part of an expression; `start` and `end` are its place in the text."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Number(Node):
    value: float


@dataclass(frozen=True, slots=True)
class Text(Node):
    value: str


@dataclass(frozen=True, slots=True)
class Flag(Node):
    value: bool


@dataclass(frozen=True, slots=True)
class Column(Node):
    name: str


@dataclass(frozen=True, slots=True)
class Values(Node):
    """`[a, b, ...]` after `in`: numbers only, or texts only."""

    values: tuple[float, ...] | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Call(Node):
    name: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Negative(Node):
    operand: Node


@dataclass(frozen=True, slots=True)
class Chain(Node):
    """`a + b - c` or `a * b / c`, from left to right."""

    first: Node
    rest: tuple[tuple[str, Node], ...]


@dataclass(frozen=True, slots=True)
class Compare(Node):
    """`a < b <= c`: both must hold."""

    first: Node
    rest: tuple[tuple[str, Node], ...]


@dataclass(frozen=True, slots=True)
class Not(Node):
    operand: Node


@dataclass(frozen=True, slots=True)
class Junction(Node):
    """All (`and`) or any (`or`) of the operands."""

    sign: str
    operands: tuple[Node, ...]


def children(node: Node) -> Iterator[Node]:
    """The parts that a node is made of."""
    match node:
        case Call():
            yield from node.arguments
        case Negative() | Not():
            yield node.operand
        case Chain() | Compare():
            yield node.first
            yield from (operand for _, operand in node.rest)
        case Junction():
            yield from node.operands


def walk(node: Node) -> Iterator[Node]:
    """A node and all below it, as they stand in the text."""
    yield node
    for child in children(node):
        yield from walk(child)
