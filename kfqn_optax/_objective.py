"""Of what the gradient given to ``update`` is the gradient, where it is not the loss's own.

Transformations before this one may scale the gradient of the loss L or add to it. The given gradient u is
fitted by kappa g + rho p, with g the gradient of L and p the parameters (those whose gradient was touched):

* ``scale``, ``clip_by_global_norm``: u = kappa g. The objective is L: a factor of the gradient changes no
  step of a rule that chooses the length of its steps. With kappa < 0 it is -L: ascent.
* ``add_decayed_weights``, alone or with one of those: u = kappa (g + rho p). The objective has the penalty
  rho |p|^2 / 2.
* anything else (noise, gradient surgery, elementwise clipping, a mean over other batches): the objective is
  L and a linear term, so that its gradient is u, and its second derivatives are those of L.

So in each case a step is where the given gradient would have it, and stands still where that is zero.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import Params as ArrayTree

from kfqn_optax._capture.curvature import Curvature
from kfqn_optax._numerics import inner, safe_divide, wide_dtype


class Objective(NamedTuple):
    """The objective F of one batch.

    Attributes:
      curvature: the batch, of which the value, the forms and the statistics are those of F.
      grads: the gradient of F, shaped like the updates.
      unit: how many times the updates ``grads`` are. ().
      decay: the coefficient of the penalty in F: the damping that is in F already. ().
    """

    curvature: Curvature
    grads: ArrayTree
    unit: jax.Array
    decay: jax.Array


def objective(curvature: Curvature, updates: ArrayTree) -> Objective:
    """The objective of which ``updates`` are a multiple of the gradient."""
    given, structure = jax.tree.flatten(updates)
    own: Any = curvature.grads
    raw = jax.tree.leaves(curvature.of_own(own))
    untouched = [u is g for u, g in zip(given, raw, strict=True)]
    if all(untouched):
        return Objective(curvature, updates, jnp.ones([]), jnp.zeros([]))
    touched = lambda leaves: [
        jnp.zeros_like(leaf) if same else leaf for leaf, same in zip(_wide(leaves), untouched, strict=True)
    ]
    start = _wide(jax.tree.leaves(curvature.of_own(curvature.params)))
    precision = max(float(jnp.finfo(leaf.dtype).eps) for leaf in (*given, *raw)) ** 0.5
    factor, rate = _fit(_wide(given), _wide(raw), touched(start), precision, scaled=not any(untouched))
    size, sign = jnp.abs(factor), jnp.sign(factor)
    decay = rate / size
    grads = [(u / size).astype(u.dtype) for u in given]
    rest = _minus(_minus(_wide(grads), sign, _wide(raw)), decay, touched(start))

    def added(own: ArrayTree) -> jax.Array:
        """What F has besides L or -L, at such parameters: its linear term is 0 at those of the batch."""
        leaves = jax.tree.leaves(own)
        now = touched(leaves)
        return 0.5 * decay * inner(now, now) + inner(rest, _minus(_wide(leaves), 1.0, start))

    grads = jax.tree.unflatten(structure, grads)
    return Objective(curvature.of_objective(sign, added), grads, 1 / size, decay)


def _fit(
    u: list[jax.Array], g: list[jax.Array], p: list[jax.Array], precision: float, scaled: bool
) -> tuple[jax.Array, jax.Array]:
    """kappa and rho >= 0 of u = kappa g + rho p; 1 and 0 where u is nothing of the kind, to rounding.

    Where g and p are parallel, as in one dimension or at the minimum of L and a penalty, kappa is 1; so it
    is without ``scaled``.
    """
    norm = lambda leaves: jnp.sqrt(inner(leaves, leaves))
    factor = jnp.ones([])
    if scaled:
        # The part of p across g, and what u has of it: by Gram and Schmidt, for the sake of rounding.
        along = safe_divide(inner(g, p), inner(g, g))
        across = _minus(p, along, g)
        apart = norm(across) > precision * norm(p)
        rate = jnp.where(apart, safe_divide(inner(u, across), inner(across, across)), 0)
        free = safe_divide(inner(u, g), inner(g, g)) - rate * along
        factor = jnp.where((apart | (norm(p) == 0)) & (free != 0), free, 1)
    added = _minus(u, factor, g)
    rate = safe_divide(inner(added, p), inner(p, p))
    left = norm(_minus(added, rate, p))
    exact = left <= precision * (jnp.abs(factor) * norm(g) + jnp.abs(rate) * norm(p))
    return jnp.where(exact, factor, 1), jnp.where(exact, jnp.maximum(rate, 0), 0)


def _minus(x: list[jax.Array], factor: jax.Array | float, y: list[jax.Array]) -> list[jax.Array]:
    return [(a - factor * b).astype(a.dtype) for a, b in zip(x, y, strict=True)]


def _wide(leaves: list[jax.Array]) -> list[jax.Array]:
    return [leaf.astype(wide_dtype(leaf)) for leaf in leaves]
