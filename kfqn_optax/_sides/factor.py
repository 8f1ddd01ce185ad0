"""What an inverse factor is, and how a pair is taken into one without harm."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfqn_optax._numerics import all_finite, safe_divide
from kfqn_optax._returned import check_returned


class InverseFactor(NamedTuple):
    """A symmetric positive definite approximation H of an inverse, learnt from pairs; pure functions.

    Attributes:
      init: ``init(dim, dtype, scale) -> state``, for H = scale I.
      update: ``update(state, s, y) -> state``, after which H y = s. Only called with s^T y > 0.
      apply: ``apply(state, x) -> H x`` for x of shape (dim,) or (dim, k).
    """

    init: Callable[[int, Any, jax.Array | float], Any]
    update: Callable[[Any, jax.Array, jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]


class PairCounts(NamedTuple):
    """What became of the pairs offered to one factor.

    Attributes:
      counts: how many were taken; how many of those a damping rule changed first; how many were
        skipped, because a number was not finite or s^T y not positive enough, which leaves the factor as
        it was, or because the factor was found indefinite, which starts it again. (3,).
      ratio: s^T y / y^T H y of the last pair, before damping; 1 if H was right along y already.
    """

    counts: jax.Array
    ratio: jax.Array


def no_pairs(dtype: Any) -> PairCounts:
    return PairCounts(jnp.zeros(3, jnp.int32), jnp.ones([], dtype))


def take_pair(
    factor: InverseFactor,
    state: Any,
    pairs: PairCounts,
    pair: tuple[jax.Array, jax.Array],
    gate: jax.Array,
    valid: jax.Array,
    rule: Callable[..., tuple[jax.Array, jax.Array]] | None = None,
) -> tuple[Any, PairCounts, jax.Array]:
    """Update a factor with a pair, or leave it as it was, or start it again at I.

    The pair is skipped unless s^T y > 0, s^T y > 1e-4 s^T s ||gate||, the new state is finite, and
    ``valid``. Source: the authors' program of Goldfarb, Ren, Bahamou 2020. Where y^T H y < 0 rounding
    has made H indefinite, and no pair would mend that: H starts again.

    Args:
      factor: the kind of factor.
      state: its state.
      pairs: counts so far.
      pair: (s, y), each of shape (d,).
      gate: the vector of the second condition. (d,).
      valid: whether the pair was measured at all.
      rule: damping ``rule(s, y, H y) -> (s, y)``, or None.

    Returns:
      The state, the counts, and whether H was indefinite.
    """
    s, y = pair
    hy = factor.apply(state, y)
    check_returned("InverseFactor.apply", hy, y, "H x")
    undamped = s @ y
    curvature = y @ hy
    ratio = safe_divide(undamped, curvature)
    indefinite = valid & (curvature < 0)
    if rule is not None:
        damped = rule(s, y, hy)
        check_returned("the damping rule", damped, (s, y), "(s, y)")
        s, y = damped
    sy = s @ y
    enough = (sy > 0) & (sy > 1e-4 * (s @ s) * jnp.linalg.norm(gate))
    candidate = factor.update(state, s, y)
    check_returned("InverseFactor.update", candidate, state, "the state")
    take = valid & enough & ~indefinite & all_finite(candidate)
    outcome = jnp.stack([take, take & (sy != undamped), ~take]).astype(jnp.int32)
    pairs = PairCounts(
        counts=pairs.counts + outcome, ratio=jnp.where(jnp.isfinite(ratio), ratio, pairs.ratio)
    )
    kept = optax.tree.where(indefinite, factor.init(s.shape[0], s.dtype, 1.0), state)
    return optax.tree.where(take, candidate, kept), pairs, indefinite
