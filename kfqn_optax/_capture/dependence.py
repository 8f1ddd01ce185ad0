"""How a loss depends on its parameters and marks: a walk through its program, in which nothing is run."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from kfqn_optax._capture.program import programs_of


class Sources(NamedTuple):
    """What one value of the program depends on, where a derivative may flow.

    Attributes:
      around: numbers of the inputs that reach it on a way without a mark.
      through: numbers of the inputs that reach it on a way through a mark.
      marks: numbers of the marks that reach it.
    """

    around: frozenset[int] = frozenset()
    through: frozenset[int] = frozenset()
    marks: frozenset[int] = frozenset()

    def __or__(self, other: "Sources") -> "Sources":  # type: ignore[override]
        return Sources(*(one | two for one, two in zip(self, other, strict=True)))

    def marked(self, number: int) -> "Sources":
        """The sources of what the mark with this number marks, after it."""
        return Sources(frozenset(), self.around | self.through, self.marks | {number})


class Dependence(NamedTuple):
    """What :func:`dependence` finds.

    Attributes:
      loss: what the first output of the program depends on.
      nested: pairs of marks of which the second is computed from the first.
      reverse_only: whether an input goes through a ``jax.custom_vjp``, which has no forward mode.
    """

    loss: Sources
    nested: frozenset[tuple[int, int]]
    reverse_only: bool


def dependence(program: Any, marks: Mapping[str, int]) -> Dependence:
    """How the first output of a closed ``Jaxpr`` depends on its inputs and on its marks.

    Args:
      program: what ``jax.make_jaxpr`` returned.
      marks: for the name of each mark, as ``jax.ad_checkpoint.checkpoint_name`` left it, its number.
    """
    walk = _Walk(marks)
    inputs = [Sources(around=frozenset([i])) for i in range(len(program.jaxpr.invars))]
    loss = walk.outputs(program, inputs)[0]
    return Dependence(loss, frozenset(walk.nested), walk.reverse_only)


class _Walk:
    """One walk; what it met on the way is collected."""

    def __init__(self, marks: Mapping[str, int]):
        self.names = marks
        self.nested: set[tuple[int, int]] = set()
        self.reverse_only = False

    def outputs(self, program: Any, inputs: Sequence[Sources]) -> list[Sources]:
        """The sources of a program's outputs."""
        jaxpr = getattr(program, "jaxpr", program)
        known = dict(zip(jaxpr.invars, inputs, strict=True))

        def sources(atom: Any) -> Sources:
            return (
                Sources() if hasattr(atom, "val") else known.get(atom, Sources())
            )  # a literal has a value

        for equation in jaxpr.eqns:
            results = self._equation(equation, [sources(atom) for atom in equation.invars])
            for variable, result in zip(equation.outvars, results, strict=True):
                differentiable = jnp.issubdtype(variable.aval.dtype, jnp.inexact)
                known[variable] = result if differentiable else Sources()
        return [sources(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[Sources]) -> list[Sources]:
        name, count = equation.primitive.name, len(equation.outvars)
        union = _union(inputs)
        if name == "stop_gradient":
            return [Sources()] * count
        if name == "name" and equation.params["name"] in self.names:
            return [self._mark(self.names[equation.params["name"]], union)]
        if "custom_vjp" in name and (union.around or union.through):
            self.reverse_only = True
        inner = [equation.params["body_jaxpr"]] if name == "while" else programs_of(equation)
        found = [self._inner(equation, getattr(program, "jaxpr", program), inputs) for program in inner]
        if not found or any(len(results) != count for results in found):
            return [union | _union([one for results in found for one in results])] * count
        return [_union(of_one) for of_one in zip(*found, strict=True)]

    def _mark(self, number: int, sources: Sources) -> Sources:
        self.nested |= {(before, number) for before in sources.marks}
        return sources.marked(number)

    def _inner(self, equation: Any, jaxpr: Any, inputs: list[Sources]) -> list[Sources]:
        """The sources of the outputs of a program inside an equation.

        Its inputs are the last ones of the equation's: before them come the index of a branch, and what
        the condition of a loop takes. What a loop carries goes round until nothing is added.
        """
        count, known = len(jaxpr.invars), inputs[len(inputs) - len(jaxpr.invars) :]
        if len(known) != count:
            known = [_union(inputs)] * count
        start, carried = _carry(equation)
        while True:
            results = self.outputs(jaxpr, known)
            grown = list(known)
            for i in range(carried):
                grown[start + i] = known[start + i] | results[i]
            if grown == known:
                return results
            known = grown


def _carry(equation: Any) -> tuple[int, int]:
    """Where the inputs begin that a loop's body carries, and how many outputs they come from."""
    if equation.primitive.name == "scan":
        return equation.params["num_consts"], equation.params["num_carry"]
    if equation.primitive.name == "while":
        return equation.params["body_nconsts"], len(equation.outvars)
    return 0, 0


def _union(sources: Sequence[Sources]) -> Sources:
    return (
        Sources(*(frozenset().union(*sets) for sets in zip(*sources, strict=True)))
        if sources
        else Sources()
    )
