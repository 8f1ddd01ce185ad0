"""What tracing a loss tells of its marks, and advice where they do not help."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax._capture.dependence import dependence
from kfqn_optax._capture.layers import Layer
from kfqn_optax._capture.outputs import Mark, bending, finding
from kfqn_optax._capture.parameters import leaves_by_path
from kfqn_optax._capture.quadratic import has_loop


class Program(NamedTuple):
    """What tracing a loss tells.

    Attributes:
      marks: the marks that it called, in their order.
      looped: whether it runs something more than once.
      reverse_only: whether it has a ``jax.custom_vjp`` on the way from the parameters, which does not allow
        forward mode.
      idle: the marks of which none of the same shape and distribution reaches the loss. A model with a
        mark inside may be called again for a metric or a target.
      nested: pairs of marks of which the second is computed from the first.
      around: the paths of the parameters that reach the loss, and on no way through a mark.
    """

    marks: list[Mark]
    looped: bool
    reverse_only: bool
    idle: list[Mark]
    nested: list[tuple[Mark, Mark]]
    around: set[tuple[str, ...]]


def trace(loss: Callable[[Any], jax.Array], params: Any) -> Program:
    """The loss is traced, and not run."""
    with finding() as met:
        program = jax.make_jaxpr(loss)(params)
    marks = list(met.values())
    found = dependence(program, {name: i for i, name in enumerate(met)})
    paths = list(leaves_by_path(params)[0])
    return Program(
        marks=marks,
        looped=has_loop(program),
        reverse_only=found.reverse_only,
        idle=[mark for mark in dict.fromkeys(marks) if mark not in {marks[i] for i in found.loss.marks}],
        nested=[(marks[i], marks[j]) for i, j in sorted(found.nested) if j in found.loss.marks],
        around={paths[i] for i in found.loss.around - found.loss.through},
    )


def straight(loss: Callable[[], jax.Array]) -> list[Mark] | None:
    """The marks in which the loss has no second derivative, whatever the numbers are.

    None where the loss can be differentiated once only. One abstract pass, and one back through what comes
    after the marks.
    """
    found = []

    def slope(s):
        def moved(t):
            with bending(s, t) as met:
                value = loss()
            found[:] = met
            return value

        return jax.grad(moved)(jnp.zeros([]))

    try:
        jax.eval_shape(jax.grad(slope), jax.ShapeDtypeStruct((), jnp.float32))
    except Exception:  # the loss has been differentiated once before: a kernel's rule may raise anything
        return None
    bent = {mark for mark, reached in found if reached.any}
    return list(dict.fromkeys(mark for mark, _ in found if mark not in bent))


def advice(program: Program, straight: list[Mark], layers: Sequence[Layer]) -> list[str]:
    """What to say of these marks to one who trains these layers."""
    if not program.marks:
        return [_UNMARKED]
    said = [_IDLE.format(_shown(mark)) for mark in program.idle]
    if all(mark in program.idle for mark in program.marks):
        return said
    said += [_STRAIGHT.format(_shown(mark)) for mark in straight if mark not in program.idle]
    said += [_NESTED.format(*map(_shown, pair)) for pair in dict.fromkeys(program.nested)]
    around = [layer.name for layer in layers if (*layer.path, layer.kernel_name) in program.around]
    return said + ([_AROUND.format(around[:8])] if around else [])


def _shown(mark: Mark) -> str:
    named = "" if mark.distribution is None else f', "{mark.distribution}"'
    return f"kfqn.outputs(z{named}) with z of shape {mark.shape}"


_SILENCE = 'To silence this: warnings.filterwarnings("ignore", "{}", kfqn.KfqnWarning).'
_UNMARKED = (
    "kfqn.outputs: the loss has no mark. The factors are then those of the data's own gradients, and the"
    " quadratic model has the loss's own second derivatives, which may be of either sign: steps are mostly"
    ' worse. Mark what the loss takes of the model: z = kfqn.outputs(model.apply(...), "normal") before a'
    ' squared error, "categorical" for the logits of a softmax, "bernoulli" for those of a sigmoid; the'
    " residual of a differential equation. Where the loss has nothing to mark (a policy's, a wave"
    " function's), see docs/surrogate_losses.md. " + _SILENCE.format("kfqn.outputs: the loss has no mark")
)
_IDLE = (
    "kfqn.outputs: the result of {} does not reach the loss, so the mark does nothing. Go on with what it"
    " returns: z = kfqn.outputs(z). " + _SILENCE.format("kfqn.outputs: the result")
)
_STRAIGHT = (
    "kfqn.outputs: the loss has no second derivative in the array of {}: its Gauss-Newton matrix there is"
    " 0. The mark belongs before the curved part of the loss: on logits, not on log-probabilities; on"
    " predictions or residuals, not on their squares or the losses of examples. A loss that bends nowhere"
    " (absolute values, a policy gradient) has no such matrix: leave the mark out, and take"
    " step_rule=kfqn.measured(). " + _SILENCE.format("kfqn.outputs: the loss has no second")
)
_NESTED = (
    "kfqn.outputs: the array of the second of two marks is computed from that of the first ({}; {}), so"
    " that the factors count some second derivatives twice. Give the model the array itself and the loss"
    " the marked one, or keep the mark that is nearer to the loss. "
    + _SILENCE.format("kfqn.outputs: the array of the second")
)
_AROUND = (
    "kfqn.outputs: the layers {} reach the loss on no way through a mark, so that they have no part in the"
    " Gauss-Newton matrix: a hidden layer is marked, or one of several outputs is not. Mark what comes out"
    " of the model's last layer, each output by a mark of its own. "
    + _SILENCE.format("kfqn.outputs: the layers")
)
