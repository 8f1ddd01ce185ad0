"""Tables on stdout, and several seeds in one cell."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import rich.box
import rich.console
import rich.table

Run = TypeVar("Run")

_WIDTH = 160  # where stdout is no terminal


def table_of(
    groups: Iterable[list[Run]], columns: Mapping[str, Callable[[list[Run]], str]], title: str
) -> rich.table.Table:
    """A row for each group of runs; ``columns``: for each heading, what makes its cell of a group."""
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD)
    for heading in columns:
        justify = "left" if heading in ("method", "remarks") else "right"
        table.add_column(heading, justify=justify, no_wrap=heading == "remarks")
    for group in groups:
        table.add_row(*(cell(group) for cell in columns.values()))
    return table


def print_table(table: rich.table.Table) -> None:
    console = rich.console.Console(markup=False)  # a cell may hold [brackets]
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(table)


def spread(values: Iterable[float], spec: str, infinite: str = "inf") -> str:
    """Median, and below it [least, most] where values differ; nan (unknown) is left out."""

    def show(value: float) -> str:
        return infinite if math.isinf(value) else format(value, spec)

    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    if len(set(known)) == 1:
        return show(known[0])
    return f"{show(statistics.median(known))}\n[{show(min(known))}, {show(max(known))}]"
