"""What `top` knows, as a table for a terminal of any width."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kinema.cluster.top import NodeUse, Process, as_dict

GIB = 2**30
HOT_C = 87.0
LOW_PART = 0.8
"""A node whose GPUs do less than that part of the median node's work waits for something."""
Sort = Literal["worst", "name", "utilisation", "power", "temperature", "memory"]
LAST_COLUMN = 24
"""Characters that it should have."""
PADDING = 2
BAD, DOUBTFUL, OURS, DIM = "bold red", "yellow", "green", "dim"


@dataclass(frozen=True)
class Column:
    """What a column shows.

    Attributes:
        rank: columns of a higher one are left out first where the terminal is narrow; 0: never.
    """

    title: str
    rank: int
    cell: Callable[[Any], Text]
    right: bool = True


def render(
    nodes: Sequence[NodeUse], *, width: int, by_gpu: bool, sort: Sort, most_rows: int | None = None
) -> RenderableType:
    """The table, and a line on all nodes.

    Args:
        width: of the terminal, columns.
        by_gpu: a line for each GPU; else one for each node.
        most_rows: lines that have room; None: all.
    """
    ordered = arrange(nodes, sort)
    usual = _usual(nodes)
    # A row is (node, GPU or None, its processes) or a node.
    rows: list[Any] = _gpu_rows(ordered) if by_gpu else list(ordered)
    shown = rows if most_rows is None else rows[:most_rows]
    columns = _gpu_columns() if by_gpu else _node_columns(nodes, usual)
    table = _table(columns, shown, width)
    parts: list[RenderableType] = [table]
    if len(shown) < len(rows):
        parts.append(Text(f"… {len(rows) - len(shown)} more (--once shows all)", style=DIM))
    return Group(*parts, Text(), Text(totals(nodes), overflow="fold"))


def _table(columns: list[Column], rows: Sequence[Any], width: int) -> Table:
    """The last column takes what is left; where that is too little, others are left out."""
    cells = [[column.cell(row) for column in columns] for row in rows]
    widths = [
        max([len(column.title), *(line[at].cell_len for line in cells)])
        for at, column in enumerate(columns)
    ]
    keep = list(range(len(columns) - 1))

    def left() -> int:
        return width - sum(widths[at] + PADDING for at in keep)

    while left() < LAST_COLUMN and (spare := [at for at in keep if columns[at].rank]):
        keep.remove(max(spare, key=lambda at: columns[at].rank))
    table = Table(box=None, padding=(0, PADDING, 0, 0), pad_edge=False, header_style="bold")
    for at in keep:
        side: Literal["left", "right"] = "right" if columns[at].right else "left"
        table.add_column(columns[at].title, justify=side, no_wrap=True, min_width=widths[at])
    room = max(left(), len(columns[-1].title))
    table.add_column(columns[-1].title, no_wrap=True, max_width=room)
    for line in cells:
        line[-1].truncate(room, overflow="ellipsis")
        table.add_row(*(line[at] for at in keep), line[-1])
    return table


def totals(nodes: Sequence[NodeUse]) -> str:
    """One line on all nodes."""
    all_of_them = as_dict(nodes)
    gpus = [one for node in nodes for one in node.gpus]
    parts = [f"{len(nodes)} nodes" if len(nodes) > 1 else "1 node"]
    if gpus:
        parts[0] += f", {len(gpus)} GPUs"
        power = all_of_them["total_power_w"]
        if power is not None:
            there = sum(1 for node in nodes if node.total("power_w") is not None)
            mean = all_of_them["mean_power_w"]
            parts.append(
                f"{_watts(power)} in all, {_watts(power / there)} a node, {mean:.0f} W a GPU"
            )
        busy = [g.utilisation_percent for g in gpus if g.utilisation_percent is not None]
        if busy:
            parts.append(f"{sum(busy) / len(busy):.0f} % busy")
    ours = Counter(_recipe(p) for node in nodes for p in node.processes if p.ours)
    parts += [f"{count} rank{'s' if count > 1 else ''} of {what}" for what, count in ours.items()]
    lost = sum(1 for node in nodes if node.problem is not None)
    if lost:
        parts.append(f"{lost} do not answer" if lost > 1 else "1 does not answer")
    return "; ".join(parts)


def arrange(nodes: Sequence[NodeUse], sort: Sort) -> list[NodeUse]:
    """In the order that was asked for; ties as in the hostfile."""
    usual = _usual(nodes)
    keys: dict[str, Callable[[NodeUse], Any]] = {
        "worst": lambda n: -_badness(n, usual),
        "name": lambda n: n.name,
        "utilisation": lambda n: _or(n.mean("utilisation_percent"), -1.0),
        "power": lambda n: -_or(n.total("power_w"), -1.0),
        "temperature": lambda n: -_or(_hottest(n), -1.0),
        "memory": lambda n: -_or(n.total("memory_used"), _or(n.memory_used, 0.0) / 1e6),
    }
    return sorted(nodes, key=keys[sort])


def _badness(node: NodeUse, usual: float | None) -> int:
    if node.problem is not None:
        return 4
    if node.note is not None:
        return 3
    if node.slowed or _or(_hottest(node), 0.0) > HOT_C:
        return 2
    return int(_is_low(node.mean("utilisation_percent"), usual))


def _usual(nodes: Sequence[NodeUse]) -> float | None:
    values = [v for node in nodes if (v := node.mean("utilisation_percent")) is not None]
    return median(values) if values else None


def _is_low(value: float | None, usual: float | None) -> bool:
    return value is not None and usual is not None and value < LOW_PART * usual


def _hottest(node: NodeUse) -> float | None:
    values = [g.temperature_c for g in node.gpus if g.temperature_c is not None]
    return max(values) if values else None


def _slowest_clock(node: NodeUse) -> float | None:
    values = [g.sm_mhz for g in node.gpus if g.sm_mhz is not None]
    return min(values) if values else None


def _node_columns(nodes: Sequence[NodeUse], usual: float | None) -> list[Column]:
    gpus = [
        Column("GPUs", 1, lambda n: _text(len(n.gpus) or None, "{:d}")),
        Column("busy", 0, lambda n: _busy(n.mean("utilisation_percent"), usual)),
        Column("memory", 5, lambda n: _of(n.total("memory_used"), n.total("memory_total"))),
        Column("W/GPU", 2, lambda n: _text(n.mean("power_w"), "{:.0f}")),
        Column("power", 7, lambda n: Text(_watts(n.total("power_w")))),
        Column("°C", 3, lambda n: _heat(_hottest(n))),
        Column("MHz", 8, lambda n: _text(_slowest_clock(n), "{:.0f}")),
    ]
    return [
        Column("node", 0, _name, right=False),
        *(gpus if any(node.gpus for node in nodes) else []),
        Column("CPU", 4, lambda n: _text(n.cpu_percent, "{:.0f} %")),
        Column("load", 9, lambda n: _text(n.load, "{:.1f}")),
        Column("RAM", 6, lambda n: _of(n.memory_used, n.memory_total)),
        Column("what", 0, _says, right=False),
    ]


def _name(node: NodeUse) -> Text:
    return Text(node.name, style=BAD if node.problem or node.note else "")


def _says(node: NodeUse) -> Text:
    """What is wrong, and what runs."""
    if node.problem is not None:
        return Text(node.problem, style=BAD)
    text = Text()
    if node.note is not None:
        text.append(node.note + " ", style=BAD)
    if node.slowed:
        reasons = dict.fromkeys(reason for why in node.slowed.values() for reason in why)
        where = ",".join(map(str, node.slowed))
        text.append(f"{', '.join(reasons)} (GPU {where})  ", style=BAD)
    ours = Counter(_what(p) for p in node.processes if p.ours)
    for what, count in ours.items():
        text.append(f"{count} rank{'s' if count > 1 else ''} of {what}  ", style=OURS)
    others = Counter((p.user, _program(p.command)) for p in node.processes if not p.ours)
    for (user, program), count in others.items():
        times = f"{count} × " if count > 1 else ""
        # Next to a training it takes the training's memory and time.
        text.append(f"{user}: {times}{program}  ", style=DOUBTFUL if ours else "")
    return text or Text("nothing runs", style=DIM)


GpuRow = tuple[NodeUse, Any, tuple[Process, ...]]


def _gpu_rows(nodes: Sequence[NodeUse]) -> list[GpuRow]:
    rows: list[GpuRow] = []
    for node in nodes:
        for one in node.gpus:
            rows.append((node, one, tuple(p for p in node.processes if p.gpu == one.index)))
        loose = [p for p in node.processes if p.gpu is None]
        rows += [(node, None, (process,)) for process in loose]
        if not node.gpus and not loose:
            rows.append((node, None, ()))
    return rows


def _gpu_columns() -> list[Column]:
    def of_gpu(show: Callable[[Any], Text]) -> Callable[[GpuRow], Text]:
        return lambda row: Text("-", style=DIM) if row[1] is None else show(row[1])

    return [
        Column("node", 0, lambda row: _name(row[0]), right=False),
        Column("GPU", 0, of_gpu(lambda g: _text(g.index, "{:d}"))),
        Column("busy", 0, of_gpu(lambda g: _text(g.utilisation_percent, "{:.0f} %"))),
        Column("memory", 2, of_gpu(lambda g: _of(g.memory_used, g.memory_total))),
        Column("W", 1, of_gpu(lambda g: _text(g.power_w, "{:.0f}"))),
        Column("°C", 3, of_gpu(lambda g: _heat(g.temperature_c))),
        Column("MHz", 4, of_gpu(lambda g: _text(g.sm_mhz, "{:.0f}"))),
        Column("what", 0, _gpu_says, right=False),
    ]


def _gpu_says(row: GpuRow) -> Text:
    node, one, processes = row
    if node.problem is not None:
        return Text(node.problem, style=BAD)
    text = Text()
    if one is not None and one.slowed:
        text.append(", ".join(one.slowed) + "  ", style=BAD)
    if node.note is not None:
        text.append(node.note + "  ", style=BAD)
    for process in processes:
        memory = "" if process.gpu_memory is None else f", {process.gpu_memory / GIB:.1f} GiB"
        if process.gpu is None:
            memory = "" if process.memory is None else f", {process.memory / GIB:.1f} GiB"
            memory += "" if process.cpu_percent is None else f", {process.cpu_percent:.0f} % CPU"
        who = f"{process.user} {process.pid}{memory}  "
        if process.ours:
            rank = "" if process.rank is None else f"rank {process.rank} of "
            text.append(f"{rank}{_what(process)}, {who}", style=OURS)
        else:
            text.append(f"{_program(process.command)}, {who}", style=DOUBTFUL)
    return text or Text("nothing runs", style=DIM)


def _what(process: Process) -> str:
    """Which training it is, with its run where the process writes that."""
    run = (process.run or "").rpartition("/")[2]
    return f"{_recipe(process)} ({run})" if run else _recipe(process)


def _recipe(process: Process) -> str:
    return process.recipe or "a training"


def _program(command: str) -> str:
    """`python train.py` of `/usr/bin/python3 -u train.py --x 1`."""
    words = [word for word in command.split() if not word.startswith("-")][:2]
    return " ".join(word.rpartition("/")[2] for word in words) or "?"


def _text(value: float | None, form: str) -> Text:
    return Text("-", style=DIM) if value is None else Text(form.format(value))


def _busy(value: float | None, usual: float | None) -> Text:
    text = _text(value, "{:.0f} %")
    text.stylize(BAD if _is_low(value, usual) else "")
    return text


def _heat(value: float | None) -> Text:
    text = _text(value, "{:.0f}")
    text.stylize(BAD if value is not None and value > HOT_C else "")
    return text


def _of(used: float | None, total: float | None) -> Text:
    if used is None or total is None:
        return Text("-", style=DIM)
    return Text(f"{used / GIB:.0f}/{total / GIB:.0f}G")


def _watts(power: float | None) -> str:
    if power is None:
        return "-"
    return f"{power / 1000:.1f} kW" if power >= 999.5 else f"{power:.0f} W"


def _or(value: float | None, other: float) -> float:
    return other if value is None else value
