"""A loss with what the capture has to know of it: its layers, its arguments, the axis of its devices."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfqn_optax._capture.call import Call, TreeCall, slots_of
from kfqn_optax._capture.examples import count_examples
from kfqn_optax._capture.layers import Layers
from kfqn_optax._capture.linen import tapping as linen_tapping
from kfqn_optax._capture.nnx import is_model
from kfqn_optax._capture.nnx_call import ModelCall
from kfqn_optax._capture.nnx_tap import tapping as nnx_tapping
from kfqn_optax._capture.parameters import check_parameters
from kfqn_optax._capture.routes import whole_pass
from kfqn_optax._capture.slot import SLOT
from kfqn_optax._shown import shown


@dataclasses.dataclass(frozen=True, eq=False)  # hashable, as a static argument of a jitted function
class Loss:
    """A loss of a model whose layers are known; the fields are the arguments of :func:`value_and_grad`."""

    loss_fn: Callable[..., Any]
    layers: Layers
    has_aux: bool = False
    forward: Callable[..., Any] | None = None
    batch_argnums: tuple[int, ...] = ()
    axis_name: str | tuple[str, ...] | None = None

    def mean(self, tree: Any) -> Any:
        """The mean over ``axis_name``, if there is one."""
        return jax.lax.pmean(tree, self.axis_name) if self.devices > 1 else tree

    @property
    def devices(self) -> int:
        """How many parts ``axis_name`` has."""
        if self.axis_name is None:
            return 1
        try:
            return jax.lax.psum(1, self.axis_name)
        except NameError:
            raise ValueError(
                f"kfqn.value_and_grad: axis_name={self.axis_name!r}, but there is no such axis where it is"
                " called. Call it inside the jax.pmap, jax.vmap or jax.shard_map that names the axis."
            ) from None

    def call(self, params: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        make = ModelCall if is_model(params) else TreeCall
        call = make(self.layers, params, args, kwargs)
        check_parameters(self.layers, call.params, "kfqn.value_and_grad")
        count_examples(self.batch_argnums, args)
        return call

    def with_inputs(self, sums, call, params, vectors):
        """The sums, those of inputs replaced by what the plain forward pass gives, if there is one."""
        if self.forward is None:
            return sums
        forward = self.forward

        def total(params, *args, **kwargs):
            return sum(leaf.sum() for leaf in jax.tree.leaves(forward(params, *args, **kwargs)))

        with self.tapping(bias_only=False):
            _, plain = call.slot_grads(self.noted(total), params, slots_of(self.layers, vectors), False)
        for name, sum_of in plain.items():
            for key in (
                "grad_squares",
                "grad_moment",
            ):  # of the forward pass's own outputs, not of the loss
                sum_of.pop(key, None)
            sum_of["grads"] = sums[name]["grads"]
        return plain

    def scalar(self, *args: Any, **kwargs: Any) -> Any:
        """What the loss returns, which is what ``has_aux`` says, or there is an error."""
        returned = value = self.loss_fn(*args, **kwargs)
        if self.has_aux and not (isinstance(returned, (tuple, list)) and len(returned) == 2):
            raise TypeError(
                f"kfqn.value_and_grad: loss_fn returned {shown(returned)}, but with has_aux=True it must"
                " return a pair, (loss, aux). Return one, or leave out has_aux."
            )
        if self.has_aux:
            value = returned[0]
        elif isinstance(value, (tuple, list)):
            raise TypeError(
                f"kfqn.value_and_grad: loss_fn returned {shown(value)}. For a loss with auxiliary data"
                " give value_and_grad has_aux=True."
            )
        is_number = isinstance(value, (float, np.ndarray, np.generic, jax.Array))
        if not is_number or jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise TypeError(
                f"kfqn.value_and_grad: loss_fn returned {shown(value)} for its loss, which must be one real"
                " floating-point number. Take a mean over the examples."
            )
        return returned

    @contextlib.contextmanager
    def tapping(self, bias_only: bool | None = None) -> Iterator[None]:
        """The context of a pass with slots: of its backward part too, where a rule may call layers."""
        bias_only = self.forward is not None if bias_only is None else bias_only
        with linen_tapping(bias_only), nnx_tapping(bias_only), whole_pass():
            yield

    def noted(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """``loss_fn``, with notes on those of its errors that a remedy is known for."""

        def loss(*args, **kwargs):
            try:
                return loss_fn(*args, **kwargs)
            except (TypeError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
                if "'State' object" in str(error):
                    error.add_note(_STATE_NOTE)
                elif SLOT in str(error):
                    error.add_note(_SLOT_NOTE)
                elif is_forward_mode(error):
                    error.add_note(_FORWARD_NOTE)
                elif is_taylor_mode(error):
                    raise ValueError(_TAYLOR) from error
                raise

        return loss


def is_forward_mode(error: Exception) -> bool:
    """Whether the error is that of forward mode through a rule of reverse mode."""
    text = str(error)
    return ("forward-mode" in text and "custom_vjp" in text) or "custom_lin" in text


def is_taylor_mode(error: Exception) -> bool:
    """Whether the error is that of ``jax.experimental.jet``, which met the operation of a tap."""
    text = str(error)
    return "JetTracer" in text or (isinstance(error, KeyError) and "custom_vmap" in text)


_STATE_NOTE = (
    "kfqn.value_and_grad was called with an nnx.State, which loss_fn uses as a model. Call it with the"
    " model itself, or let loss_fn make one: model = kfqn.merge(graphdef, params, rest)."
)
_FORWARD_NOTE = (
    "kfqn.value_and_grad: loss_fn differentiates the model in forward mode (jax.jvp, jax.hessian,"
    " jax.jacfwd). Tell it how to apply the model plainly, on the inputs whose statistics matter:"
    " kfqn.value_and_grad(loss_fn, layers, forward=lambda params, *args: model.apply(...))."
)
_TAYLOR = (
    "kfqn.value_and_grad: loss_fn differentiates the model in Taylor mode (jax.experimental.jet), in which"
    " the statistics of its layers are lost. Differentiate in reverse mode (jax.grad of jax.grad), or tell"
    " value_and_grad how to apply the model plainly, on the inputs whose statistics matter:"
    " kfqn.value_and_grad(loss_fn, layers, forward=lambda params, *args: model.apply(...))."
)
_SLOT_NOTE = (
    "kfqn.value_and_grad hands loss_fn the parameters with an entry 'kfqn_slot' of zeros beside the kernel"
    " of each stacked layer, since the stack is in no module that the model calls. Put the lifted module"
    " (nn.scan, nn.vmap) inside a module, or combine parameters with another tree only after"
    " params = kfqn.without_slots(params)."
)
