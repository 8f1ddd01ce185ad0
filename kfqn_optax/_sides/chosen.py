"""Which side a layer gets: a square factor where it fits, limited memory or a diagonal elsewhere."""

from collections.abc import Callable

from kfqn_optax._capture.layers import LONG_MEMORY, MAX_DIM, Layer
from kfqn_optax._constants import check_constants
from kfqn_optax._sides.bfgs import bfgs
from kfqn_optax._sides.diagonal import diagonal
from kfqn_optax._sides.factor import InverseFactor
from kfqn_optax._sides.fisher import fisher, fisher_diagonal
from kfqn_optax._sides.group_secant import group_secant
from kfqn_optax._sides.hessian_action import hessian_action
from kfqn_optax._sides.lbfgs import lbfgs
from kfqn_optax._sides.minibatch_action import minibatch_action
from kfqn_optax._sides.secant import DampingRule, secant
from kfqn_optax._sides.side import Side


def _limit(max_dim: int | None) -> int:
    check_constants(max_dim=max_dim)
    return MAX_DIM if max_dim is None else int(max_dim)


def hessian_action_side(decay: float, max_dim: int | None) -> Callable[[Layer], Side]:
    limit = _limit(max_dim)
    dense, other = hessian_action(decay), minibatch_action_side(bfgs, decay, max_dim)

    def side(layer: Layer) -> Side:
        return dense if layer.has_second_moment and layer.rows <= limit else other(layer)

    return side


def minibatch_action_side(
    factor: InverseFactor, decay: float, max_dim: int | None
) -> Callable[[Layer], Side]:
    limit = _limit(max_dim)
    short, long = minibatch_action(factor), minibatch_action(lbfgs(LONG_MEMORY))
    counts = diagonal(decay)

    def side(layer: Layer) -> Side:
        if layer.kind == "Embed":
            return counts
        return short if layer.rows <= limit else long

    return side


def secant_side(
    factor: InverseFactor,
    rule: DampingRule,
    decay: float,
    mu1: float,
    max_dim: int | None,
    groups: int = 1,
    start: str = "identity",
) -> Callable[[Layer], Side]:
    check_constants(groups=groups)
    limit = _limit(max_dim)
    short, long = (secant(f, rule, decay, mu1) for f in (factor, lbfgs(LONG_MEMORY)))
    if (groups, start) != (1, "identity"):
        short = group_secant(rule, decay, mu1, groups, start)

    def side(layer: Layer) -> Side:
        fits = layer.out_dim <= limit and (start == "identity" or "grad_moment" in layer.slot_shapes)
        return short if fits else long

    return side


def fisher_sides(
    decay: float, max_dim: int | None
) -> tuple[Callable[[Layer], Side], Callable[[Layer], Side]]:
    """Those of the inputs, and of the outputs."""
    limit = _limit(max_dim)
    moments = [lambda statistics: statistics.second_moment, lambda statistics: statistics.grad_moment]
    of_inputs, of_grads = (fisher(moment, decay, inverse_every=1) for moment in moments)
    long_inputs = diagonal(decay)
    long_outputs = fisher_diagonal(lambda statistics: statistics.grad_squares, decay)

    def input_side(layer: Layer) -> Side:
        return of_inputs if "second_moment" in layer.slot_shapes and layer.rows <= limit else long_inputs

    def output_side(layer: Layer) -> Side:
        return of_grads if "grad_moment" in layer.slot_shapes and layer.out_dim <= limit else long_outputs

    return input_side, output_side
