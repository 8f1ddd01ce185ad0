"""What a traced program is made of."""

from collections.abc import Iterator
from typing import Any

LOOPS = ("scan", "while")


def equations(program: Any, in_loop: bool = False) -> Iterator[tuple[Any, bool]]:
    """The equations of a ``Jaxpr``, plain or closed, and of those within; whether each is in a loop."""
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation, in_loop
        for inner in programs_of(equation):
            yield from equations(inner, in_loop or equation.primitive.name in LOOPS)


def programs_of(equation: Any) -> list[Any]:
    """The programs inside an equation, ``Jaxpr`` or closed ones: bodies of loops, branches, calls."""
    entries = equation.params.values()
    listed = (entry if isinstance(entry, (list, tuple)) else (entry,) for entry in entries)
    return [value for entry in listed for value in entry if hasattr(value, "eqns")]
