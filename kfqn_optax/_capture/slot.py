"""What a layer's statistics come in: a slot of zeros, whose gradient they are.

A *slot* is a small dictionary of zero arrays that travels beside a layer's kernel. The layer's output
passes through ``tap``, an identity whose backward rule returns, as the slot's "gradient",

=================  ======================  =========================================================
key                shape of the slot       what ``jax.grad`` returns for it
=================  ======================  =========================================================
``rows``           (1, 1, 1)               number of rows (examples x positions) the layer saw
``inputs``         (groups, d_in, 1)       sum over rows of the layer's inputs a
``squares``        (groups, d_in, 1)       sum over rows of a^2, element by element
``grads``          (groups, d_out, 1)      sum over rows of dL/dh, h the layer's output
``grad_squares``   (groups, d_out, 1)      sum over rows of (dL/dh)^2, element by element
``second_moment``  (groups, d_in, d_in)    sum over rows of a a^T; only where a layer has this key, and
                                           for a convolution estimated from about 4096 rows
``product``        (groups, d_in, 1)       sum over rows of a (a^T v), v the *value* of ``vector``
``bias_product``   (groups, 1, 1)          sum over rows of a^T v
``vector``         (groups, d_in, 1)       nothing; it brings v to the layer
``grad_moment``    (groups, d_out, d_out)  sum over rows of dL/dh (dL/dh)^T; only where it is there
``part_rows``      (parts, 1, 1)           ``rows`` of each of several equal parts of the batch
``part_inputs``    (parts groups, d_in, 1)   ``inputs`` of each part; parts come before groups
``part_grads``     (parts groups, d_out, 1)  ``grads`` of each part; only where a slot has these keys
=================  ======================  =========================================================

so the statistics have no side effect to leak: they are stacked by scan and vmap, and summed over weight
sharing, micro-batches and devices, exactly as gradients are. A slot may carry trailing axes of length
one, which give it the rank that a lifted transformation expects of it. What is not used of a slot's
gradient, XLA does not compute.
"""

from collections.abc import Mapping

import jax

SLOT = "kfqn_slot"


Slot = Mapping[str, jax.Array]


def slot_shapes(
    groups: int, in_dim: int, out_dim: int, rank: int, second_moment: bool, grad_moment: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of the slot of one layer, every leaf of rank ``rank`` (at least 3)."""
    shapes = {
        "rows": (1, 1, 1),
        "inputs": (groups, in_dim, 1),
        "squares": (groups, in_dim, 1),
        "grads": (groups, out_dim, 1),
        "grad_squares": (groups, out_dim, 1),
        "product": (groups, in_dim, 1),
        "bias_product": (groups, 1, 1),
        "vector": (groups, in_dim, 1),
    }
    if second_moment:
        shapes["second_moment"] = (groups, in_dim, in_dim)
    if grad_moment:
        shapes["grad_moment"] = (groups, out_dim, out_dim)
    return {key: shape + (1,) * (rank - 3) for key, shape in shapes.items()}
