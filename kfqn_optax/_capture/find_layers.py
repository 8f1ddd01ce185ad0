"""``find_layers``, one name for the models of Flax linen and NNX."""

from typing import Any

from kfqn_optax._capture.layers import MAX_DIM, Layers
from kfqn_optax._capture.linen import find_layers as find_linen_layers
from kfqn_optax._capture.nnx import is_model
from kfqn_optax._capture.nnx_found import find_layers as find_nnx_layers
from kfqn_optax._constants import check_constants


def find_layers(
    model: Any, *args: Any, max_dim: int = MAX_DIM, strict: bool = False, **kwargs: Any
) -> Layers:
    """Find the layers of a Flax model that can be preconditioned. Nothing is computed, only shapes.

    * ``find_layers(model, variables, *args)`` for a ``flax.linen.Module``;
    * ``find_layers(model, *args)`` for a ``flax.nnx.Module``, which stays as it is.

    Args:
      model: the model.
      variables: of a linen model, ``{"params": ..., ...}``, as arrays or ``jax.ShapeDtypeStruct``.
      *args, **kwargs: what ``model.apply`` takes after the variables, or what an NNX model is called with,
        as in the loss (an example batch, ``train=True``, ``rngs=...``, ``method=...``). Arrays may be
        shapes here too. Layers that this call does not reach get a diagonal factor. Without any, an
        NNX model is not called and all its layers are found, unless there are convolutions.
      max_dim: the full second moment A of the inputs is captured for inputs up to this long, and G of the
        gradients for outputs up to this long. Each method takes a cheaper factor for longer sides.
      strict: raise if any parameter belongs to no preconditioned layer.

    Returns:
      The layers; ``print`` them for a table of what is preconditioned and what is not, and why.

    Raises:
      TypeError: if ``model`` is no Flax module.
      ValueError: if there is no ``"params"`` in ``variables``, if no supported layer is met, or, when
        ``strict``, if any parameter is left over; for convolutions of an NNX model without a call.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, kfqn_optax as kfqn
      >>> model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2), nn.LayerNorm()])
      >>> variables = model.init(jax.random.key(0), jnp.ones((8, 3)))
      >>> layers = kfqn.find_layers(model, variables, jnp.ones((8, 3)))
      >>> [(layer.name, layer.in_dim, layer.out_dim) for layer in layers]
      [('layers_0', 3, 4), ('layers_2', 4, 2)]

      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.tanh, nnx.Linear(4, 2, rngs=rngs))
      >>> [(layer.name, layer.in_dim) for layer in kfqn.find_layers(model, jnp.ones((8, 3)))]
      [('layers/0', 3), ('layers/2', 4)]
    """
    if not is_model(model):
        return find_linen_layers(model, *args, max_dim=max_dim, strict=strict, **kwargs)
    check_constants(call="kfqn.find_layers", max_dim=max_dim)
    return find_nnx_layers(model, args, kwargs, max_dim, strict)
