"""Which examples of a batch the factors are made of, and which the model of the loss is taken on.

Both are spread over the whole batch: one example is drawn from each of equally long runs of neighbours, so
that batches in the order of the data (the pixels of an image, points along a line, one class after the
other) do as well as shuffled ones. Drawn within the runs, not at a fixed stride: a stride of 64 through
64 x 64 pixels would see one column.

With B the greatest common divisor of the numbers involved, each of B equal blocks of the batch has an equal
part of them, whatever is drawn. So a device that holds a block needs no example of another one.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfqn_optax._capture.outputs import as_key


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """How a batch is divided in one step.

    Attributes:
      key: of the draws, a seed or a key.
      factor_rows: on how many examples the factors are made; the model leaves these out as far as there are
        others. None for all.
    """

    key: Any = 0
    factor_rows: int | None = None

    def of_factors(self, examples: int, rows: int) -> tuple[jax.Array, int]:
        """The examples that the factors are made of, and the number of blocks that have as many each."""
        blocks = math.gcd(examples, rows)
        return turned(spread(examples, rows, self._key(0)), examples // blocks, self._key(1)), blocks

    def of_model(self, examples: int, rows: int) -> tuple[jax.Array, int]:
        """Those that the model of the loss is taken on, as far as possible others."""
        if self.factor_rows is None or self.factor_rows >= examples:
            return self.of_factors(examples, rows)
        # Where there are too few others, it takes those of the factors' examples too that it needs.
        left_out = spread(examples, self.factor_rows, self._key(0))
        if rows > examples - self.factor_rows:
            left_out = left_out[spread(self.factor_rows, examples - rows, self._key(2))]
        factor_blocks = math.gcd(examples, self.factor_rows)
        blocks, others = math.gcd(factor_blocks, rows), examples - len(left_out)
        ranks = turned(spread(others, rows, self._key(3)), others // blocks, self._key(4))
        return turned(without(left_out, ranks), examples // factor_blocks, self._key(1)), blocks

    def _key(self, use: int) -> jax.Array:
        return jax.random.fold_in(as_key(self.key), use)


def spread(total: int, few: int, key: jax.Array) -> jax.Array:
    """``few`` of the numbers below ``total``, increasing: one drawn from each of ``few`` runs.

    The runs are as long, or longer by one where ``few`` does not divide ``total``.
    """
    edges = (np.arange(few + 1) * total // few).astype(np.int32)
    return jax.random.randint(key, (few,), edges[:-1], edges[1:], jnp.int32)


def turned(chosen: jax.Array, length: int, key: jax.Array) -> jax.Array:
    """The numbers moved on within their blocks of this length, and around the end; by how many is drawn.

    Numbers in a longer run are drawn less often. So they are not always the same ones.
    """
    within = chosen % length
    return chosen - within + (within + jax.random.randint(key, (), 0, length, jnp.int32)) % length


def without(left_out: jax.Array, ranks: jax.Array) -> jax.Array:
    """The numbers of these ranks among those that are not left out; ``left_out`` increases."""
    # How many numbers below each of them are not left out.
    before = left_out - jnp.arange(len(left_out), dtype=jnp.int32)
    return ranks + jnp.searchsorted(before, ranks, side="right").astype(ranks.dtype)
