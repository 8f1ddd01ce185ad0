"""What each side of a layer's preconditioner is: a table of pure functions.

The direction of a layer with averaged gradient M is D = H_a M H_g. The input side keeps H_a, which acts
on the rows of M (the layer's inputs), the output side H_g, which acts on its columns. A variant of the
method is another side with the same functions. A side sees one copy of one layer at a time;
``scale_by_kfqn`` maps it over stacked copies and over layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax._capture.statistics import Statistics


def _observe(state: Any, statistics: Statistics, damping: jax.Array) -> Any:
    del statistics, damping
    return state


def _starting(state: Any) -> jax.Array:
    del state
    return jnp.asarray(False)


def _start(state: Any, inverse: jax.Array) -> Any:
    del inverse
    return state


def _update(state: Any, before: Statistics, after: Statistics, damping: jax.Array) -> Any:
    del before, after, damping
    return state


class Side(NamedTuple):
    """One side; in each step ``scale_by_kfqn`` calls its functions in this order.

    Attributes:
      init: ``init(dim, dtype) -> state``. The state has a field ``pairs`` (:class:`PairCounts`) and a
        field ``factor``, which :func:`diagnostics` reports.
      apply: ``apply(state, x) -> H x`` for x of shape (dim, k).
      observe: ``observe(state, statistics, damping) -> state``, before the direction.
      starting: ``starting(state) -> bool``, whether ``start`` is to be called now.
      matrix: ``matrix(state, damping) -> M`` of shape (dim, dim), symmetric positive definite, whose
        inverse the side needs; None for a side that needs none. The inverses of all sides are computed
        together, in steps in which any of them is starting.
      start: ``start(state, inverse) -> state``, before the direction, in these steps; NaN if M was not
        positive definite.
      query: ``query(state, statistics) -> v`` of shape (dim,), for a side that needs ``after.product``,
        the product A v; None for one that does not.
      update: ``update(state, before, after, damping) -> state``, with the statistics of one batch
        before the step and after it.
      second_pass: whether ``update`` does anything.
      scale: ``scale(state, statistics) -> number``, the mean diagonal element of the matrix that the side
        damps and inverts, as it will be after ``observe``; None for a side that does not know. Where both
        sides of a layer know, the damping is split in proportion.
      of_factors: whether ``observe`` is to be given ``curvature.factor_statistics``, of labels sampled from
        the model where the loss marks its outputs, rather than the statistics of the loss's own gradient.
    """

    init: Callable[[int, Any], Any]
    apply: Callable[[Any, jax.Array], jax.Array]
    observe: Callable[[Any, Statistics, jax.Array], Any] = _observe
    starting: Callable[[Any], jax.Array] = _starting
    matrix: Callable[[Any, jax.Array], jax.Array] | None = None
    start: Callable[[Any, jax.Array], Any] = _start
    query: Callable[[Any, Statistics], jax.Array] | None = None
    update: Callable[[Any, Statistics, Statistics, jax.Array], Any] = _update
    second_pass: bool = True
    scale: Callable[[Any, Statistics], jax.Array] | None = None
    of_factors: bool = False
