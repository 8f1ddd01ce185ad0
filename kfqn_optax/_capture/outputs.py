"""``outputs``: the mark on what a loss is a function of, which opens its Gauss-Newton matrix.

With z the marked array, J its Jacobian and l the loss as a function of z, that matrix is
J^T (d^2 l / dz^2) J. A mark is an identity except in two passes that this package makes on its own:

* *forms*: the tangent of z is a constant of the next derivative. Under forward over forward the second
  derivative of z then drops out, and what is left is u^T J^T (d^2 l / dz^2) J v.
* *sampling*: z becomes z + t xi, and what is differentiated is psi = dL/dt at t = 0. Its cotangent at z is
  c = (d^2 l / dz^2) xi, in which the loss's own scale, mean, masks and weights are. The mark replaces it by
  a random g with E[g g^T] = d^2 l / dz^2, which flows on into the layers before it.
"""

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kfqn_optax._capture.reached import Reached
from kfqn_optax._numerics import safe_divide, wide_dtype
from kfqn_optax._shown import shown

DISTRIBUTIONS = ("bernoulli", "categorical", "normal")

Rule = Callable[[jax.Array, str | None], jax.Array]


class Mark(NamedTuple):
    """A mark that a loss was found to have: what it names, and the shape of what it marks."""

    distribution: str | None
    shape: tuple[int, ...]


class _Local(threading.local):
    rule: Rule | None = None


_local = _Local()

# Part of JAX's trace-cache key, as in ``linen.py``: a function that is jitted on its own inside a loss is
# traced anew under a mark that does something, and where the mark brings a tracer with it, for that call.
_tracing = jax.make_user_context(None)
_calls = itertools.count()


def outputs(z: Any, distribution: str | None = None) -> jax.Array:
    """``z``, marked as what the loss is a function of: an identity, in value and gradient, anywhere.

    Inside the ``loss_fn`` of :func:`value_and_grad` it lets ``curvature.forms`` be those of the
    Gauss-Newton matrix J^T (d^2 l / dz^2) J, where J is the Jacobian of z and l the loss after the mark,
    any loss. With a distribution named, ``curvature.factor_statistics`` are those of labels drawn from it,
    E[g g^T] = d^2 l / dz^2 for the gradients g at z; mean or sum, weights and masks of the loss are
    found out, not told.

    Several marks in one loss add up. Put it after the model's last layer, on what the loss takes: not
    inside a function that the loss itself differentiates (a PINN marks its residual), and not on
    anything computed from another marked array.

    Args:
      z: an array of floating-point numbers, of any shape.
      distribution: of the labels that the loss is the negative log-likelihood of, given z.
        ``"categorical"``: z are the logits of a softmax over the last axis, and the loss is a weighted sum
        of cross entropies, one a row, with any labels. ``"bernoulli"`` and ``"normal"``: the loss is a sum
        over the elements of z of any convex function of one element, such as sigmoid cross entropies of
        logits, or squared errors. None: of no kind; where another mark of the loss names one, it counts as
        ``"normal"``.

    Returns:
      ``z``.

    Raises:
      ValueError: while tracing, for another distribution, and for z that is no array of floating-point
        numbers.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, kfqn_optax as kfqn
      >>> model, x, labels = nn.Dense(3), jnp.ones((8, 2)), jnp.arange(8) % 3
      >>> variables = model.init(jax.random.key(0), x)
      >>> def loss_fn(params, x, labels):
      ...     logits = kfqn.outputs(model.apply({"params": params}, x), "categorical")
      ...     return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      >>> value_and_grad = kfqn.value_and_grad(loss_fn, kfqn.find_layers(model, variables, x))
      >>> loss, grads, curvature = value_and_grad(variables["params"], x, labels)
      >>> forms = curvature.forms([grads])
      >>> bool(forms.matrix[0, 0] > 0)
      True

    Source: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent",
    for the matrix; Martens, Grosse 2015, section 5, for gradients of sampled labels.
    """
    if distribution is not None and not (isinstance(distribution, str) and distribution in DISTRIBUTIONS):
        raise ValueError(
            f"kfqn.outputs: distribution={shown(distribution)} is none of {str(DISTRIBUTIONS)[1:-1]}."
            " Leave it out where none of them is the one whose negative log-likelihood the loss is."
        )
    dtype = getattr(z, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        given = f"a {type(z).__name__}" if dtype is None else f"an array of {dtype}"
        raise ValueError(
            f"kfqn.outputs: expected an array of floating-point numbers, got {given}. Mark what the loss is"
            " differentiated through, such as the logits; several arrays each by a mark of its own."
        )
    if distribution == "categorical" and jnp.ndim(z) == 0:
        raise ValueError(
            'kfqn.outputs: "categorical" takes logits with the classes on the last axis, got a scalar.'
        )
    return z if _local.rule is None else _local.rule(z, distribution)


@contextlib.contextmanager
def _rule(rule: Rule, key: object) -> Iterator[None]:
    before = _local.rule
    _local.rule = rule
    try:
        with _tracing(key):
            yield
    finally:
        _local.rule = before


@contextlib.contextmanager
def finding() -> Iterator[dict[str, Mark]]:
    """Within this context a loss adds each of its marks, by the name that it has in the loss's program."""
    met: dict[str, Mark] = {}

    def rule(z, distribution):
        name = f"kfqn.outputs {len(met)}"
        met[name] = Mark(distribution, jnp.shape(z))
        return checkpoint_name(z, name)

    with _rule(rule, ("find", next(_calls))):
        yield met


@contextlib.contextmanager
def bending(s: jax.Array, t: jax.Array) -> Iterator[list[tuple[Mark, Reached]]]:
    """Within this context marked arrays move with ``s`` and with ``t``.

    Where dL/dt is differentiated by s, a mark's ``Reached`` is reached unless the derivative of dL/dt in
    its array is zero whatever the numbers are, which JAX knows while tracing.
    """
    met: list[tuple[Mark, Reached]] = []

    def rule(z, distribution):
        reached = Reached()
        met.append((Mark(distribution, jnp.shape(z)), reached))
        return reached.watch(z + s.astype(z.dtype)) + t.astype(z.dtype)

    with _rule(rule, ("bend", next(_calls))):
        yield met


@contextlib.contextmanager
def pulled_back(axis: str) -> Iterator[None]:
    """Within this context, and a ``jax.vmap`` with this axis, marks send cotangents to the first instance.

    What comes back at a mark is summed over the axis and goes on through the model of that instance alone.
    """
    with _rule(lambda z, distribution: _taken_over(axis, z), ("pull back", axis)):
        yield


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _taken_over(axis, z):
    del axis
    return z


def _taken_over_backward(axis, residuals, cotangent):
    del residuals
    try:
        total = jax.lax.psum(cotangent, axis)
    except AssertionError:  # JAX has no collective over the axis of a vmap in a shard_map with checks
        raise NotImplementedError(
            "curvature.forms: loss_fn has a jax.custom_vjp and a mark kfqn.outputs, inside a jax.shard_map"
            " that checks what varies. Give the shard_map check_vma=False and kfqn.value_and_grad the"
            " axis_name=, or take step_rule=kfqn.measured()."
        ) from None
    return (jnp.where(jax.lax.axis_index(axis) == 0, total, jnp.zeros_like(total)),)


_taken_over.defvjp(lambda axis, z: (z, None), _taken_over_backward)


@contextlib.contextmanager
def gauss_newton() -> Iterator[None]:
    """Within this context second derivatives in forward mode have no second derivative of marked arrays."""
    with _rule(lambda z, distribution: _first_order(z), "gauss-newton"):
        yield


@jax.custom_jvp
def _first_order(z):
    return z


@_first_order.defjvp
def _first_order_jvp(primals, tangents):
    return primals[0], jax.lax.stop_gradient(tangents[0])


@contextlib.contextmanager
def sampling(t: jax.Array, key: jax.Array) -> Iterator[None]:
    """Within this context marked arrays are z + t xi, and their cotangents are replaced by samples.

    xi must be the same wherever z is computed again (rematerialisation), to the last bit, so that it
    depends on ``key`` and on the mark's number alone. What is drawn depends on z too: examples
    that are mapped over and steps that are scanned over have draws of their own.
    """
    marks = itertools.count()

    def rule(z, distribution):
        mark = jax.random.fold_in(key, next(marks))
        own = jax.random.fold_in(mark, bits_of(z))
        if distribution == "categorical":
            p = jax.nn.softmax(_wide(z), axis=-1)
            probe, draw = _one_hot(p.argmax(-1), p), p - _one_hot(_sample(own, p), p)
        else:
            probe, draw = _signs(mark, z), _signs(own, z)
        probe, draw = jax.lax.stop_gradient((probe, draw))
        sampled: Any = _sampled(distribution, z, probe, draw)
        return sampled + (t * probe).astype(z.dtype)

    with _rule(rule, ("sample", next(_calls))):
        yield


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sampled(distribution, z, probe, draw):
    del distribution, probe, draw
    return z


def _sampled_forward(distribution, z, probe, draw):
    del distribution
    return z, (z, probe, draw)


def _sampled_backward(distribution, residuals, cotangent):
    z, probe, draw = residuals
    sample = root(distribution, cotangent, z, probe, draw)
    return sample.astype(cotangent.dtype), jnp.zeros_like(probe), jnp.zeros_like(draw)


_sampled.defvjp(_sampled_forward, _sampled_backward)


def root(
    distribution: str | None, action: jax.Array, z: jax.Array, probe: jax.Array, draw: jax.Array
) -> jax.Array:
    """g with E[g g^T] = C, the second derivative of the loss in z, of which C ``probe`` is known.

    C is diagonal unless the distribution is categorical: with random signs for probe and for draw,
    g = draw sqrt(probe * C probe). Categorical: C is w F for each row, F = diag(p) - p p^T; w follows from
    <probe, C probe> = w <probe, F probe>, and g = sqrt(w) draw with draw = p - onehot(y), y drawn from p.
    Negative curvature counts as none, and a row that is certain of its class to rounding as w = 0.
    """
    action = _wide(action)
    if distribution != "categorical":
        return draw * jnp.sqrt(jnp.maximum(probe * action, 0))
    p = jax.nn.softmax(_wide(z), axis=-1)
    mean = (p * probe).sum(-1, keepdims=True)
    spread = (p * (probe - mean) ** 2).sum(-1, keepdims=True)
    known = spread > 8 * jnp.finfo(p.dtype).eps * mean
    weight = safe_divide((probe * action).sum(-1, keepdims=True), jnp.where(known, spread, 0))
    return jnp.sqrt(jnp.maximum(weight, 0)) * draw


ROUNDED = 13  # of the 23 bits of a float32 after its first; 10 tell examples apart


def bits_of(array: jax.Array) -> jax.Array:
    """A number for ``jax.random.fold_in`` that differs where the array does.

    Without the last bits, so that another order of sums, on another device, rarely makes it another number.
    """
    total = _wide(jax.lax.stop_gradient(array)).sum().astype(jnp.float32)
    return jax.lax.bitcast_convert_type(total, jnp.uint32) >> ROUNDED


def as_key(key: Any) -> jax.Array:
    """A key from a seed, or from a key of either kind."""
    if jnp.issubdtype(getattr(key, "dtype", jnp.int32), jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key) if jnp.ndim(key) else jax.random.key(key)


def _wide(array: jax.Array) -> jax.Array:
    return array.astype(wide_dtype(array))


def _one_hot(index: jax.Array, p: jax.Array) -> jax.Array:
    return jax.nn.one_hot(index, p.shape[-1], dtype=p.dtype)


def _sample(key: jax.Array, p: jax.Array) -> jax.Array:
    """One index a row, with the probabilities on the last axis; one random number a row."""
    up_to = p.cumsum(-1)
    level = jax.random.uniform(key, (*p.shape[:-1], 1), p.dtype) * up_to[..., -1:]
    return (up_to > level).argmax(-1)


def _signs(key: jax.Array, z: jax.Array) -> jax.Array:
    """Random signs, 32 from each random word."""
    words = jax.random.bits(key, (-(-z.size // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None, :]) & 1
    signs = 1 - 2 * bits.astype(_wide(z).dtype)
    return signs.reshape(-1)[: z.size].reshape(z.shape)
