"""The curvature of one batch: statistics of its layers, and what else a step may ask of it."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfqn_optax._capture.batch import Batch
from kfqn_optax._capture.examples import check_rows
from kfqn_optax._capture.layers import Layers
from kfqn_optax._capture.nnx import as_arrays
from kfqn_optax._capture.outputs import as_key, gauss_newton
from kfqn_optax._capture.parameters import check_like, is_masked, leaves_by_path, trained
from kfqn_optax._capture.parts import Parts
from kfqn_optax._capture.quadratic import Forms, forms_by_differences, forms_of
from kfqn_optax._capture.statistics import Statistics, signed
from kfqn_optax._numerics import inner, wide_dtype
from kfqn_optax._shown import shown
from kfqn_optax._warnings import warn_once

LEAST = 0.01
LABELS = 5  # folded into the key of a step; less than that is for its parts


class Curvature:
    """The statistics of one batch at one point, and the means to take them again at another point.

    What ``update`` of a kfqn_optax transformation takes as ``curvature=``. It belongs to the traced
    train step that made it, like Optax's ``value_fn``: make it and use it inside the same ``jax.jit``.

    Attributes:
      value: the loss.
      params: the parameters at which the statistics were taken.
      statistics: for each layer name its :class:`Statistics`.
      grads: the gradient as it was returned, whatever is done to it before ``update``; None after
        :meth:`after`.
      examples: how many examples the batch has, on this device, by ``batch_argnums``; None without.
      devices: over how many devices ``axis_name`` goes; 1 without.
    """

    def __init__(
        self,
        value: jax.Array,
        params: optax.Params,
        statistics: dict[str, Statistics],
        batch: Batch,
        grads: optax.Updates | None = None,
        key: int | jax.Array = 0,
        own: optax.Updates | None = None,
    ):
        self.value = value
        self.params = params
        self.statistics = statistics
        self.grads = grads
        self.examples = batch.examples
        self.devices = batch.owner.devices
        self._batch = batch
        self._key = key
        self._own = params if own is None else own

    @property
    def __jax_array__(self):
        """What JAX asks of a value of a type that it does not know; for all others there is none.

        It asks where a value leaves or enters a traced function, and its own error would name no remedy.
        """
        frame = inspect.currentframe()
        asking = None if frame is None else frame.f_back
        if asking is not None and not asking.f_globals.get("__name__", "").startswith("jax."):
            raise AttributeError("__jax_array__")
        raise ValueError(
            "kfqn: a Curvature cannot be an argument or a result of jax.jit, nor be carried by a loop: it"
            " belongs to the traced step that made it. Call kfqn.value_and_grad(...) and tx.update(...,"
            " curvature=curvature) in one jitted function, and return the loss and the gradients alone."
        )

    def __repr__(self) -> str:
        return f"Curvature of the layers {list(self.statistics)}"

    def after(self, updates: optax.Updates, vectors: Mapping[str, jax.Array] | None = None) -> "Curvature":
        """The curvature of the same batch, with the same keys, at ``params + updates``.

        This is the second pass: a forward and a backward pass without weight gradients.

        Args:
          updates: shaped like the parameters; where it holds an ``optax.MaskedNode``, the parameters
            stay as they are.
          vectors: for layer names, a vector v (*copies, d_in [+ 1]) whose ``product`` A v is wanted.
        """
        moved = self._moved(updates, "curvature.after")
        vectors = vectors or {}
        _check_vectors(vectors, self._batch.layers)
        value, statistics = self._batch.statistics(moved, vectors)
        return Curvature(value, moved, statistics, self._batch, key=self._key, own=self._own)

    def with_parts(self, key: int | jax.Array, factor_rows: int | None) -> "Curvature":
        """The same curvature, with parts of the batch, and labels, drawn by this seed or key.

        So parts of a batch that is the same in every step are not always the same part.

        Args:
          key: of the draws. Without this call it is the seed 0.
          factor_rows: how many examples the factors are made of, for which :meth:`forms` and
            :meth:`value_at` then take others, as far as there are others; None for all.
        """
        batch = dataclasses.replace(self._batch, parts=Parts(key, factor_rows))
        labels = jax.random.fold_in(as_key(key), LABELS)
        return Curvature(self.value, self.params, self.statistics, batch, self.grads, labels, self._own)

    def within(self, updates: optax.Updates, layers: Layers) -> "Curvature":
        """The same curvature for an optimizer of some of the parameters, and of those layers.

        What the others are, and what their layers see, changes nothing then.

        Args:
          updates: a tree of the optimizer's parameters: shaped like all of them with an
            ``optax.MaskedNode`` for each of the others, or without the others.
          layers: its layers.
        """
        statistics = {layer.name: self.statistics[layer.name] for layer in layers}
        return Curvature(self.value, self.params, statistics, self._batch, self.grads, self._key, updates)

    def of_objective(self, sign: jax.Array, added: Callable[[optax.Params], jax.Array]) -> "Curvature":
        """The curvature of ``sign`` times the loss, plus what ``added`` is at the own parameters.

        Args:
          sign: 1 or -1. ().
          added: takes parameters shaped as ``within`` was told. Its second derivatives are in ``forms``,
            not in the statistics of layers.
        """
        objective = lambda value, params: jnp.asarray(
            sign * value + added(self.of_own(params)), jnp.result_type(value)
        )
        batch = dataclasses.replace(self._batch, sign=sign, objective=objective)
        value = objective(self.value, self.params)
        statistics = {name: signed(one, sign) for name, one in self.statistics.items()}
        return Curvature(value, self.params, statistics, batch, self.grads, self._key, self._own)

    def of_own(self, tree: optax.Updates) -> optax.Updates:
        """A tree shaped like all parameters, such as ``grads``, as the optimizer's own are shaped."""
        leaves, _ = leaves_by_path(tree)
        own, structure = leaves_by_path(self._own)
        chosen = [leaf if is_masked(leaf) else leaves[path] for path, leaf in own.items()]
        return jax.tree.unflatten(structure, chosen)

    def _of_all(self, tree: optax.Updates) -> optax.Updates:
        """A tree shaped like the optimizer's own parameters, masked where there are others."""
        given, structure = leaves_by_path(as_arrays(tree))
        if structure != jax.tree.structure(as_arrays(self._own), is_leaf=is_masked):
            return tree  # shaped like all parameters, or an error
        leaves, structure = leaves_by_path(as_arrays(self.params))
        whole = [given.get(path, optax.MaskedNode()) for path in leaves]
        return jax.tree.unflatten(structure, whole)

    @property
    def outputs(self) -> int:
        """How many numbers of an example the loss marks as its :func:`outputs`; 0 without a mark.

        Only an array whose leading axis counts the examples of ``batch_argnums`` is one of all of them.
        """
        shapes = [mark.shape for mark in self._batch.program.marks]
        return sum(math.prod(shape[shape[:1] == (self.examples,) :]) for shape in shapes)

    def count_examples(self) -> int | jax.Array:
        """How many examples the batch has on all devices; the most rows of a layer if nothing tells."""
        if self.examples is not None:
            return self.examples * self.devices
        rows = [statistics.rows.max() for statistics in self.statistics.values()]
        return jnp.stack(rows).max() if rows else jnp.zeros([])

    @property
    def distributions(self) -> tuple[str | None, ...]:
        """What the marks of the loss name."""
        return tuple(mark.distribution for mark in self._batch.program.marks)

    def check_marks(self, updates: optax.Updates) -> None:
        """Warn once of marks that do not help one who trains the parameters not masked in ``updates``."""
        for message in self._batch.advice(trained(self._batch.layers, updates)):
            warn_once(message)

    @property
    def squared_norm(self) -> jax.Array:
        """The sum of squares of all parameters of the optimizer that asks, in float32 or wider.

        At least a hundredth of that of layers whose kernels have variance 1 / d_in, d_out a layer, so
        that parameters which start at zero have a length too.
        """
        own = jax.tree.leaves(as_arrays(self.of_own(self.params)))
        wide = [p.astype(wide_dtype(p)) for p in own]
        layers = [layer for layer in self._batch.layers if layer.name in self.statistics]
        usual = sum(math.prod(layer.copies) * layer.out_dim for layer in layers)
        return jnp.maximum(inner(wide, wide), LEAST * usual)

    def value_at(self, updates: optax.Updates, rows: int | None = None) -> jax.Array:
        """The loss at ``params + updates``, of the same batch with the same keys: one forward pass.

        Args:
          updates: as for :meth:`after`.
          rows: of so many examples only, where ``batch_argnums`` tells what an example is: those of
            :meth:`forms` with as many.
        """
        check_rows(rows, "curvature.value_at")
        return self._batch.owner.mean(self._batch.loss(rows)(self._moved(updates, "curvature.value_at")))

    def forms(self, directions: Sequence[optax.Updates], rows: int | None = None) -> Forms:
        """The loss along K directions to second order: phi(c) = L(params + sum_i c_i u_i) around c = 0.

        The second derivatives are those of the Gauss-Newton matrix where the loss marks its
        :func:`outputs`, and the loss's own where it does not; parts of the loss that do not go through a
        mark (a penalty on the parameters) always have their own. With a mark it costs a forward pass and
        2 K products a layer (4 K where layers are scanned over).

        A loss that has no forward mode, because of a ``jax.custom_vjp`` in it, gets the same forms by
        differences of gradients, to about the square root of the parameters' precision, in 1 + 2 K
        gradients (1 + K without a mark), and a warning.

        Args:
          directions: K trees u_i shaped like the parameters, in whose dtype they are taken; an
            ``optax.MaskedNode`` counts as zero.
          rows: of the loss on so many examples only, where ``batch_argnums`` tells what an example is.
            They are drawn across the batch, and are others than those of the optimizer's factors, as far
            as there are others.

        Returns:
          :class:`Forms`: ``value``, ``slopes`` (K,) and ``matrix`` (K, K), float32 or wider, all of the
          loss on those rows.

        Raises:
          ValueError: for no directions, or ones of another shape than the parameters.

        Source: Martens, Grosse 2015, section 7.
        """
        check_rows(rows, "curvature.forms")
        if not isinstance(directions, (list, tuple)) or not directions:
            raise ValueError(
                f"curvature.forms: directions is a {type(directions).__name__}, or empty. Give a list of"
                " trees shaped like the parameters, one tree at least."
            )
        directions = [self._of_all(direction) for direction in directions]
        for direction in directions:
            check_like(self.params, direction, "curvature.forms")
        program, loss = self._batch.program, self._batch.loss(rows)
        if not program.reverse_only:
            try:
                with gauss_newton():
                    stacked = program.looped and bool(program.marks)
                    return self._batch.owner.mean(forms_of(loss, self.params, directions, stacked))
            except (TypeError, ValueError, NotImplementedError):
                pass  # no second derivative in forward mode; whatever else was wrong is raised again below
        length = jnp.sqrt(self.squared_norm)
        forms = forms_by_differences(loss, self.params, directions, length, bool(program.marks))
        warn_once(_DIFFERENCES)
        return self._batch.owner.mean(forms)

    def factor_statistics(
        self, rows: int | None = None, key: int | jax.Array | None = None
    ) -> dict[str, Statistics]:
        """The statistics of which a Fisher side makes its factors, for each layer name.

        Where a mark :func:`outputs` names a distribution: those of one pass with sampled labels, forward
        and backward without weight gradients. ``second_moment`` is the mean over rows as ever;
        ``grad_moment`` is the sum over rows of the outer products of the sampled gradients at the layer's
        output, nothing divided or multiplied: its expectation is the sum over rows of the Gauss-Newton
        matrix of L with respect to that row of the output. For a loss that is a mean over examples it is
        the mean over examples, summed over positions, of outer products of the gradients of one example's
        sampled loss, as ``grad_moment`` is elsewhere. With ``forward``, ``grad_moment`` is the mean over
        8 samples of the outer product of the summed gradients, which has the same expectation.

        Elsewhere: those of the pass that was made, without another one, where ``grad_moment`` is the
        centred one, G - S S^T / T with G and S the ``grad_moment`` and ``preactivation_grads`` and T
        the layer's positions. ``grad_squares`` is the diagonal of either.

        Args:
          rows: sample on so many examples only, drawn across the batch, where ``batch_argnums`` tells
            what an example is.
          key: a seed or a key for the samples. None takes the one of the step where an optimizer asks, and
            the seed 0 elsewhere: fold the step's number into a key of your own for other draws in each
            step. Draws differ in examples that are mapped or scanned over as far as the marked arrays
            differ there.
        """
        return self.factors(rows, key)[0]

    def factors(
        self, rows: int | None = None, key: int | jax.Array | None = None
    ) -> tuple[dict[str, Statistics], optax.Updates | None]:
        """:meth:`factor_statistics`, and the gradient that parameters of no layer make their factor of.

        Returns:
          The statistics, and the gradient of the sampled loss, shaped like the parameters, whose square has
          the diagonal of the Gauss-Newton matrix for its expectation; None where nothing is sampled, and
          with ``forward``.
        """
        check_rows(rows, "curvature.factor_statistics")
        sampled = any(self.distributions)
        if sampled and self._batch.straight is None:
            warn_once(_ONCE)
            sampled = False
        if sampled:
            return self._batch.sampled(self.params, rows, as_key(self._key if key is None else key))
        positions = {layer.name: layer.positions for layer in self._batch.layers}
        return {name: _centred(value, positions[name]) for name, value in self.statistics.items()}, None

    def slope(self, updates: optax.Updates, grads: optax.Updates) -> jax.Array:
        """<grads, -updates>, what the loss falls by along the updates to first order.

        With the parameters as they are, rounded to their dtype; without those masked in ``grads``.
        """
        grads = as_arrays(self._of_all(grads))
        moved = jax.tree.map(
            lambda g, p, q: g if is_masked(g) else jnp.asarray(p - q, g.dtype),
            grads,
            as_arrays(self.params),
            as_arrays(self._moved(updates, "curvature.slope")),
            is_leaf=is_masked,
        )
        return inner(grads, moved)

    def _moved(self, updates: optax.Updates, call: str) -> optax.Updates:
        updates = self._of_all(updates)
        check_like(self.params, updates, call)
        moved = jax.tree.map(
            lambda u, p: p if is_masked(u) else jnp.asarray(p + u, jnp.result_type(p)),
            as_arrays(updates),
            as_arrays(self.params),
            is_leaf=is_masked,
        )
        return jax.tree.unflatten(jax.tree.structure(self.params), jax.tree.leaves(moved))


def _check_vectors(vectors: Mapping[str, jax.Array], layers: Layers) -> None:
    wanted = {layer.name: (*layer.copies, layer.rows) for layer in layers}
    for name, vector in vectors.items():
        if jnp.shape(vector) != wanted.get(name):
            raise ValueError(
                f"curvature.after: vectors has {shown(vector)} for {name!r}, but the layers take vectors of"
                f" the shapes {wanted}."
            )


def _centred(statistics: Statistics, positions: int) -> Statistics:
    moment, squares, total = statistics.grad_moment, statistics.grad_squares, statistics.preactivation_grads
    if moment is not None:
        moment = moment - total[..., :, None] * total[..., None, :] / positions
    if squares is not None:
        squares = squares - total * total / positions
    return statistics._replace(grad_moment=moment, grad_squares=squares)


def check_curvature(curvature: Any, layers: Layers) -> Curvature:
    """What ``update`` was given as curvature, or an error that says how to pass it."""
    if curvature is None:
        raise ValueError(
            "kfqn: update was called without curvature. A train step makes it and passes it on:\n"
            "  value_and_grad = kfqn.value_and_grad(loss_fn, layers)\n"
            "  loss, grads, curvature = value_and_grad(params, batch)\n"
            "  updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)\n"
            "If you do pass it, a wrapper drops it. Take kfqn.TrainState, whose"
            " apply_gradients(grads=grads, curvature=curvature) passes it on, in the place of"
            " flax.training.train_state.TrainState. A plain optax.GradientTransformation around this one"
            " must be an optax.GradientTransformationExtraArgs."
        )
    if not isinstance(curvature, Curvature):
        raise ValueError(
            f"kfqn: update was called with curvature={type(curvature).__name__}. Pass the third of the"
            " values that kfqn.value_and_grad(loss_fn, layers)(params, ...) returns."
        )
    missing = [layer.name for layer in layers if layer.name not in curvature.statistics]
    if missing:
        raise ValueError(
            f"kfqn: the curvature has no statistics of {missing}, only of"
            f" {list(curvature.statistics)}. Give kfqn.value_and_grad the same layers as the optimizer."
        )
    return curvature


_DIFFERENCES = (
    "curvature.forms: loss_fn has a function with a jax.custom_vjp, or another rule without forward mode"
    " (odeint, a kernel). The second derivatives along the step are then differences of"
    " gradients, good to about three digits in float32, which take five gradients for two directions. Exact"
    " and cheaper are functions with jax.custom_jvp, or step_rule=kfqn.measured(), which needs no second"
    ' derivatives. To silence this: warnings.filterwarnings("ignore", "curvature.forms", kfqn.KfqnWarning).'
)
_ONCE = (
    "curvature.factors: loss_fn has a function that can be differentiated once only, after a mark"
    " kfqn.outputs (a kernel whose backward pass has no derivative), so no labels can be sampled there. The"
    " factors are those of the data's own gradients. Write that part of the loss in plain JAX. To silence"
    ' this: warnings.filterwarnings("ignore", "curvature.factors", kfqn.KfqnWarning).'
)
