"""What the user of ``scale_by_kfqn`` chose."""

import contextlib
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfqn_optax._capture.layers import Layer, Layers
from kfqn_optax._sides.side import Side
from kfqn_optax._steps.rule import StepRule, as_given

ROWS, LEAST_EXAMPLES = 250, 32


class Method(NamedTuple):
    """What the user chose, by layer name where it differs from layer to layer."""

    layers: Layers
    inputs: dict[str, Side]
    outputs: dict[str, Side]
    rule: StepRule
    probe_step: optax.ScalarOrSchedule
    damping: optax.ScalarOrSchedule
    momentum: float
    update_every: int
    learn_every: int
    others_decay: float | None
    statistics_rows: int | Literal["auto"] | None
    factor_dtype: Any
    factor_mesh: jax.sharding.Mesh | None
    precision: str
    seed: int

    def within(self, present: Layers) -> "Method":
        """The method of an optimizer of these layers alone."""
        inputs, outputs = (
            {layer.name: sides[layer.name] for layer in present} for sides in (self.inputs, self.outputs)
        )
        return self._replace(inputs=inputs, outputs=outputs)

    @property
    def factor_rows(self) -> int | None:
        """Of how many examples factors are made; None for all."""
        if isinstance(self.statistics_rows, str):
            return usual_rows([layer for layer in self.layers if layer.name in self.inputs])
        return self.statistics_rows

    def dtype_of(self, layer: Layer) -> Any:
        return jnp.promote_types(self.factor_dtype or layer.dtype, jnp.float32)

    @property
    def of_factors(self) -> bool:
        return any(side.of_factors for side in (*self.inputs.values(), *self.outputs.values()))

    @property
    def second_pass(self) -> bool:
        return any(side.second_pass for side in (*self.inputs.values(), *self.outputs.values()))

    @property
    def leaves_out(self) -> bool:
        """Whether outliers are left out: batches whose pairs, or whose part of an average, would stay."""
        if not self.rule.guarded:
            return False
        return self.second_pass or not self.no_momentum_given or not self.rule.wary

    @property
    def no_momentum_given(self) -> bool:
        return isinstance(self.momentum, (int, float)) and self.momentum == 0

    @property
    def without_momentum(self) -> bool:
        return self.no_momentum_given and self.rule.momentum is as_given

    def precise(self) -> contextlib.AbstractContextManager[Any]:
        """The context of products of the algebra, and of the rule's passes over the model.

        A CPU multiplies at full precision whatever is asked for. But XLA takes products that ask for it for
        others than those of the gradient's pass, and a rule that looks at the same examples would make them
        again: there nothing is asked for.
        """
        if self.precision == "highest" and jax.default_backend() == "cpu":
            return contextlib.nullcontext()
        return jax.default_matmul_precision(self.precision)


def usual_rows(layers: Iterable[Layer]) -> int:
    """Of how many examples statistics are taken, "auto".

    Positions of one example tell nearly as much of A and G as other examples do, and cost as much.
    """
    return max(LEAST_EXAMPLES, ROWS // max((layer.positions for layer in layers), default=1))
