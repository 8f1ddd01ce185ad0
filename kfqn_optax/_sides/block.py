"""The block BFGS update of a dense inverse factor: several pairs at once, as products of matrices."""

import jax
import jax.numpy as jnp
import optax

from kfqn_optax._numerics import all_finite, one_by_one, safe_divide
from kfqn_optax._sides.factor import PairCounts

_SLACK = 10  # roundings by which the unit diagonal of K is raised, so that its Cholesky factor exists


def block_update(h: jax.Array, s: jax.Array, y: jax.Array) -> jax.Array:
    """The H+ nearest to H with H+ Y = S, for pairs that are the columns of S and Y.

    With K = S^T Y,
    H+ = S K^-1 S^T + (I - S K^-1 Y^T) H (I - Y K^-1 S^T).
    K is symmetric where all pairs are of one symmetric matrix, Y = G S; otherwise its symmetric part
    stands for it, and H+ Y = S holds as nearly as that does. H+ is positive definite whenever K is.

    Pairs are first scaled to s_i^T y_i = 1, which changes nothing, and then made conjugate by the
    Cholesky factor L of K: with W = S L^-T and V = Y L^-T,
    H+ = H + W T^T + T W^T,  T = W (I + V^T H V) / 2 - H V: two products of H's size and width k.

    Args:
      h: H, symmetric positive definite. (d, d).
      s: (d, k).
      y: (d, k). A pair with s_i^T y_i <= 0 is left out.

    Returns:
      H+, symmetric to the last bit; NaN if K is not positive definite.

    Source: Goldfarb, Gower, Richtarik 2016, "Stochastic block BFGS", arXiv 1603.09649, equation 7.
    """
    sy = (s * y).sum(0)[None, :]
    fits = sy > 0
    scale = safe_divide(fits.astype(h.dtype), jnp.sqrt(jnp.where(fits, sy, 1)))
    s, y = jnp.where(fits, s, 0) * scale, jnp.where(fits, y, 0) * scale
    k = s.T @ y
    rounding = _SLACK * jnp.finfo(h.dtype).eps
    k = 0.5 * (k + k.T) + jnp.diag(rounding + ~fits[0])
    root = inverse_root(k)
    w, v = s @ root.T, y @ root.T
    hv = h @ v
    t = 0.5 * (w + w @ (v.T @ hv)) - hv
    product = w @ t.T
    return h + (product + product.T)


@one_by_one
def inverse_root(matrix: jax.Array) -> jax.Array:
    """L^-1 with L L^T the matrix (k, k); NaN if it is not positive definite."""
    root = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
    identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    return jax.lax.linalg.triangular_solve(root, identity, left_side=True, lower=True)


def take_block(
    h: jax.Array,
    pairs: PairCounts,
    s: jax.Array,
    y: jax.Array,
    good: jax.Array,
) -> tuple[jax.Array, PairCounts]:
    """Update a factor with the good ones of several pairs, or leave it as it was.

    Pairs that are not ``good``, or have no s^T y > 0, are left out. If what the others make of H is not
    finite, as where K = S^T Y is not positive definite, none is taken.

    Args:
      h: H. (d, d).
      pairs: counts so far.
      s: (d, k).
      y: (d, k).
      good: which pairs may be taken. (k,).

    Returns:
      H+ or H; the counts, to which every pair has been added as taken or skipped.
    """
    s, y = jnp.where(good[None, :], s, 0), jnp.where(good[None, :], y, 0)
    candidate = block_update(h, s, y)
    finite = all_finite(candidate)
    taken = jnp.where(finite, (((s * y).sum(0)) > 0).sum(), 0).astype(pairs.counts.dtype)
    counts = pairs.counts + jnp.stack([taken, jnp.zeros_like(taken), s.shape[1] - taken])
    return optax.tree.where(finite, candidate, h), pairs._replace(counts=counts)
