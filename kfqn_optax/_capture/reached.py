"""Whether a loss depends on any call of a layer."""

import functools
from typing import Any

import jax


class Reached:
    """Whether a derivative of the loss came back to the slots that went through :meth:`watch`.

    JAX does not transpose what no derivative reaches, which shows while tracing. Where the taps are run
    would not: a jitted function inside the loss is not traced a second time.
    """

    def __init__(self):
        self.any = False

    def watch(self, slots: Any) -> Any:
        """``slots``, an identity."""
        return _watched(self, slots)

    def backward(self, cotangent):
        self.any = True
        return (cotangent,)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watched(reached, slots):
    del reached
    return slots


_watched.defvjp(
    lambda reached, slots: (slots, None), lambda reached, residuals, cotangent: reached.backward(cotangent)
)
