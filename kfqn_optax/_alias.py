"""The optimizers that users name: short chains over ``scale_by_kfqn``."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from kfqn_optax._capture.layers import Layers
from kfqn_optax._constants import check_constants
from kfqn_optax._sides.bfgs import bfgs
from kfqn_optax._sides.chosen import fisher_sides, hessian_action_side, minibatch_action_side, secant_side
from kfqn_optax._sides.damping import double_damping, dp_dlm
from kfqn_optax._sides.lbfgs import lbfgs
from kfqn_optax._state import other_state
from kfqn_optax._steps.gain import LEAST
from kfqn_optax._steps.measured import MEASURED
from kfqn_optax._steps.quadratic import QUADRATIC, is_quadratic
from kfqn_optax._steps.rule import StepRule
from kfqn_optax._transform import scale_by_kfqn
from kfqn_optax._warnings import warn_once

ADAMS = 1e-3  # the default learning rate of Adam in most libraries


def kbfgs(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    *,
    damping: optax.ScalarOrSchedule = 0.1,
    step_rule: StepRule | float | None = MEASURED,
    momentum: float = 0.9,
    decay: float = 0.9,
    mu1: float = 0.2,
    weight_decay: float = 0.0,
    mask: optax.Params | Callable[[Any], Any] | None = None,
    update_every: int = 1,
    others_decay: float | None = 0.95,
    groups: int = 1,
    start: str = "identity",
    max_dim: int | None = None,
    factor_dtype: Any = None,
    factor_mesh: jax.sharding.Mesh | None = None,
    precision: str = "highest",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """K-BFGS: Kronecker-factored BFGS with Hessian-action and double damping.

    For each layer with matrix W (kernel over bias) and averaged gradient M,
    W <- W - learning_rate nu H_a M H_g, where H_a follows the inverse of A + sqrt(damping) I, A the
    second moment of the layer's inputs, and H_g the inverse Hessian of the loss in its
    pre-activations. All other parameters take nu M over the diagonal of the Gauss-Newton matrix plus
    damping.

    With ``damping=0.3, step_rule=None, others_decay=None`` and :func:`warm_start` this is the algorithm of
    the paper to the letter.

    Args:
      learning_rate: a number or a schedule.
      layers: what :func:`find_layers` returned.
      damping: lambda > 0, with l_A = l_G = mu2 = sqrt(lambda). A number or a schedule. In units of
        the loss per squared unit of input; below 1 for the guarantees of double damping.
      step_rule: what nu is, or another step altogether. By default :func:`measured`: no step goes beyond
        the minimum of its batch's loss along it, as found by the second pass. A number is kappa, in units
        of the loss, for nu = min(1, sqrt(kappa / (learning_rate^2 <M, H_a M H_g>))). None is nu = 1.
      momentum: rate of M, an average of gradients from 0 without bias correction. The step length is
        that of one gradient: about a tenth of what momentum as a sum of gradients would make it.
      decay: rate of the averages of A, s and y. The paper uses 0 for full-batch training.
      mu1: first constant of double damping, in (0, 1).
      weight_decay: decoupled weight decay, as in ``optax.adamw``.
      mask: which parameters are decayed, as in ``optax.add_decayed_weights``.
      update_every: make the second pass and update both factors every this many steps.
      others_decay: rate of the diagonal factor of parameters that belong to no layer; None leaves them the
        averaged gradient, as in the papers.
      groups: how many pairs H_g takes a step, one of each of as many equal parts of the batch; give
        ``value_and_grad`` the same number. The paper takes one, of the whole batch. H_g of limited
        memory keeps to one.
      start: where H_g starts. ``"identity"``: at I, as in the paper. ``"gradients"``: at
        (G + l_G I)^-1, G the second moment of the first batch's per-example pre-activation gradients;
        limited memory starts at I.
      max_dim: a side longer than this gets a factor of limited memory instead of a square one; None for
        8192.
      factor_dtype: dtype of the factors; None for that of the parameters, and float32 at least.
      factor_mesh: each device of this mesh holds, and updates, its share of the factors; None for all on
        every device. A ``jax.sharding.Mesh``.
      precision: of products of the factor algebra and of the step rule's passes over the model, as in
        ``jax.default_matmul_precision``.
      seed: of all that is drawn, kept as a key in the state: labels of sampled gradients, and the examples
        of parts of the batch.

    Returns:
      A transformation whose ``update`` takes ``curvature=``.

    Raises:
      ValueError: for a constant out of its range, and while tracing ``update`` without ``curvature``.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, kfqn_optax as kfqn, optax
      >>> model, x = nn.Dense(1), jax.random.normal(jax.random.key(0), (64, 3))
      >>> variables = model.init(jax.random.key(1), x)
      >>> params, layers = variables["params"], kfqn.find_layers(model, variables, x)
      >>> def loss_fn(params, x):
      ...     return jnp.mean((model.apply({"params": params}, x)[:, 0] - x.sum(1)) ** 2)
      >>> value_and_grad = kfqn.value_and_grad(loss_fn, layers)
      >>> tx = kfqn.kbfgs(learning_rate=1.0, layers=layers)
      >>> opt_state = tx.init(params)
      >>> @jax.jit
      ... def train_step(params, opt_state, x):
      ...     loss, grads, curvature = value_and_grad(params, x)
      ...     updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
      ...     return optax.apply_updates(params, updates), opt_state, loss
      >>> for _ in range(100):
      ...     params, opt_state, loss = train_step(params, opt_state, x)
      >>> bool(loss < 1e-3)
      True

    Source: Goldfarb, Ren, Bahamou, "Practical Quasi-Newton Methods for Training Deep Neural Networks",
    NeurIPS 2020, Algorithm 3. The step rule is not in the paper.
    """
    return _chain(
        learning_rate,
        layers,
        input_side=hessian_action_side(decay, max_dim),
        output_side=secant_side(bfgs, double_damping, decay, mu1, max_dim, groups, start),
        weight_decay=weight_decay,
        mask=mask,
        damping=damping,
        step_rule=step_rule,
        momentum=momentum,
        update_every=update_every,
        others_decay=others_decay,
        factor_dtype=factor_dtype,
        factor_mesh=factor_mesh,
        precision=precision,
        seed=seed,
    )


def kbfgs_l(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    *,
    memory: int = 100,
    limited_inputs: bool = False,
    damping: optax.ScalarOrSchedule = 0.1,
    step_rule: StepRule | float | None = MEASURED,
    momentum: float = 0.9,
    decay: float = 0.9,
    mu1: float = 0.2,
    weight_decay: float = 0.0,
    mask: optax.Params | Callable[[Any], Any] | None = None,
    update_every: int = 1,
    others_decay: float | None = 0.95,
    max_dim: int | None = None,
    factor_dtype: Any = None,
    factor_mesh: jax.sharding.Mesh | None = None,
    precision: str = "highest",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """K-BFGS(L): :func:`kbfgs` with a limited-memory H_g, from the last ``memory`` damped pairs.

    Args:
      learning_rate: a number or a schedule.
      layers: what :func:`find_layers` returned.
      memory: how many pairs H_g is made of. Meant to be below the layers' widths: beyond, a square H_g
        is smaller and faster.
      limited_inputs: make H_a of limited memory too, with the minibatch action of :func:`kfqn`, so that
        no square factor is stored at all.
      damping, step_rule, momentum, decay, mu1, weight_decay, mask, update_every, others_decay,
        max_dim, factor_dtype, factor_mesh, precision, seed: as for :func:`kbfgs`.

    Returns:
      A transformation whose ``update`` takes ``curvature=``.

    Raises:
      ValueError: for a constant out of its range, and while tracing ``update`` without ``curvature``.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, kfqn_optax as kfqn
      >>> model, x = nn.Dense(2), jnp.ones((8, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> tx = kfqn.kbfgs_l(0.3, kfqn.find_layers(model, variables, x), memory=5)
      >>> tx.init(variables["params"])[0].outputs["."].factor.s.shape
      (5, 2)

    Source: Goldfarb, Ren, Bahamou 2020, K-BFGS(L). ``limited_inputs`` is not in the paper.
    """
    limited = lbfgs(memory)
    if limited_inputs:
        input_side = minibatch_action_side(limited, decay, max_dim)
    else:
        input_side = hessian_action_side(decay, max_dim)
    return _chain(
        learning_rate,
        layers,
        input_side=input_side,
        output_side=secant_side(limited, double_damping, decay, mu1, max_dim),
        weight_decay=weight_decay,
        mask=mask,
        damping=damping,
        step_rule=step_rule,
        momentum=momentum,
        update_every=update_every,
        others_decay=others_decay,
        factor_dtype=factor_dtype,
        factor_mesh=factor_mesh,
        precision=precision,
        seed=seed,
    )


def kfqn(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    *,
    damping: optax.ScalarOrSchedule = 0.1,
    step_rule: StepRule | float | None = MEASURED,
    momentum: float = 0.9,
    decay: float = 0.9,
    mu1: float = 0.2,
    weight_decay: float = 0.0,
    mask: optax.Params | Callable[[Any], Any] | None = None,
    update_every: int = 1,
    others_decay: float | None = 0.95,
    groups: int = 1,
    start: str = "identity",
    max_dim: int | None = None,
    factor_dtype: Any = None,
    factor_mesh: jax.sharding.Mesh | None = None,
    precision: str = "highest",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """KF-QN: the cheaper variant, for convolutions and wide layers; no A is formed or stored.

    As :func:`kbfgs`, with the minibatch Hessian-action for H_a, and D_P D_LM damping for H_g. For a
    convolution with T positions the damping is split as l_A = sqrt(damping T), l_G = sqrt(damping / T),
    with A summed and the gradient averaged over positions as in the paper.

    Args:
      learning_rate: a number or a schedule.
      layers: what :func:`find_layers` returned.
      damping: lambda > 0, without an upper limit here. A number or a schedule.
      step_rule, momentum, decay, mu1, weight_decay, mask, update_every, others_decay, groups,
        start, max_dim, factor_dtype, factor_mesh, precision, seed: as for :func:`kbfgs`.

    Returns:
      A transformation whose ``update`` takes ``curvature=``.

    Raises:
      ValueError: for a constant out of its range, and while tracing ``update`` without ``curvature``.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, kfqn_optax as kfqn
      >>> model, x = nn.Conv(2, (3, 3)), jnp.ones((8, 6, 6, 1))
      >>> variables = model.init(jax.random.key(0), x)
      >>> tx = kfqn.kfqn(0.1, kfqn.find_layers(model, variables, x), update_every=5)
      >>> tx.init(variables["params"])[0].inputs["."].factor.shape
      (10, 10)

    Source: Ren, Bahamou, Goldfarb 2021, arXiv 2102.06737. The step rule is not in the paper.
    """
    return _chain(
        learning_rate,
        layers,
        input_side=minibatch_action_side(bfgs, decay, max_dim),
        output_side=secant_side(bfgs, dp_dlm, decay, mu1, max_dim, groups, start),
        weight_decay=weight_decay,
        mask=mask,
        damping=damping,
        step_rule=step_rule,
        momentum=momentum,
        update_every=update_every,
        others_decay=others_decay,
        factor_dtype=factor_dtype,
        factor_mesh=factor_mesh,
        precision=precision,
        seed=seed,
    )


def kfac(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    *,
    damping: optax.ScalarOrSchedule = 1.0,
    step_rule: StepRule | float | None = QUADRATIC,
    momentum: float = 0.0,
    decay: float = 0.85,
    inverse_every: int = 4,
    statistics_rows: int | Literal["auto"] | None = "auto",
    weight_decay: float = 0.0,
    mask: optax.Params | Callable[[Any], Any] | None = None,
    max_dim: int | None = None,
    factor_dtype: Any = None,
    factor_mesh: jax.sharding.Mesh | None = None,
    precision: str = "highest",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Kronecker factors of the Gauss-Newton matrix, and the step of a quadratic model: the default method.

    For each layer with matrix W (kernel over bias) and gradient g, the direction is H_a g H_g with
    H_a = (A + l_A I)^-1 and H_g = (G + l_G I)^-1; A is the second moment of the inputs, G that of the
    pre-activation gradients. All other parameters take their gradient over the diagonal of the Gauss-Newton
    matrix. How far the step goes, and the damping, are the business of :func:`quadratic`.

    Mark what the loss is a function of, ``z = kfqn.outputs(model.apply(...), "categorical")``: G is then
    that of labels drawn from the model, not of the data's own gradients, and the quadratic model is Gauss
    and Newton's. Both are better, and dearer by a backward pass over ``statistics_rows`` examples.

    Args:
      learning_rate: multiplies the step of the quadratic model: 1, or a schedule that falls from 1 to
        lessen the noise of small batches at the end. With another ``step_rule``, a length along the
        direction.
      layers: what :func:`find_layers` returned.
      damping: lambda > 0 at the start. With :func:`quadratic` a number without units, which the rule
        multiplies by what has them. A number or a schedule.
      step_rule: :func:`quadratic`, or as for :func:`kbfgs`.
      momentum: rate of an average of gradients, at least; :func:`quadratic` has one of its own.
      decay: rate of the averages of A and G.
      inverse_every: steps from one update of A and G and of their inverses to the next; the first 30
        steps, in which they change most, make one each.
      statistics_rows: of how many examples A and G are taken in such a step, drawn across the batch,
        if ``value_and_grad`` has ``batch_argnums``; None for all. "auto" for 250, and fewer where
        convolutions give each example many rows: so many that the one with the most positions has 250
        rows, and 32 at least.
      weight_decay: decoupled weight decay, as in ``optax.adamw``: multiplied by the learning rate, which is
        a thousand times Adam's here.
      mask, factor_dtype, factor_mesh, precision, seed: as for :func:`kbfgs`.
      max_dim: a side longer than this, or than the ``max_dim`` of :func:`find_layers`, gets the diagonal of
        A or of G. None for 8192.

    Returns:
      A transformation whose ``update`` takes ``curvature=``.

    Raises:
      ValueError: for a constant out of its range, and while tracing ``update`` without ``curvature``.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, kfqn_optax as kfqn, optax
      >>> model, x = nn.Dense(1), jax.random.normal(jax.random.key(0), (64, 3))
      >>> variables = model.init(jax.random.key(1), x)
      >>> params, layers = variables["params"], kfqn.find_layers(model, variables, x)
      >>> def loss_fn(params, x):
      ...     z = kfqn.outputs(model.apply({"params": params}, x)[:, 0], "normal")
      ...     return jnp.mean((z - x.sum(1)) ** 2)
      >>> value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=1)
      >>> tx = kfqn.kfac(1.0, layers)
      >>> opt_state = tx.init(params)
      >>> @jax.jit
      ... def train_step(params, opt_state, x):
      ...     loss, grads, curvature = value_and_grad(params, x)
      ...     updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
      ...     return optax.apply_updates(params, updates), opt_state, loss
      >>> for _ in range(20):
      ...     params, opt_state, loss = train_step(params, opt_state, x)
      >>> bool(loss < 1e-6)
      True

    Source: Martens, Grosse 2015, arXiv 1503.05671; Grosse, Martens 2016, arXiv 1602.01407 for convolutions.
    """
    check_constants(inverse_every=inverse_every)
    input_side, output_side = fisher_sides(decay, max_dim)
    return _chain(
        learning_rate,
        layers,
        input_side=input_side,
        output_side=output_side,
        weight_decay=weight_decay,
        mask=mask,
        damping=damping,
        step_rule=step_rule,
        momentum=momentum,
        update_every=1,
        learn_every=inverse_every,
        statistics_rows=statistics_rows,
        factor_dtype=factor_dtype,
        factor_mesh=factor_mesh,
        precision=precision,
        seed=seed,
    )


def _chain(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    *,
    weight_decay: float,
    mask: optax.Params | Callable[[Any], Any] | None,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    if isinstance(learning_rate, Layers):
        raise TypeError(
            "kfqn: learning_rate is a Layers, but it must be a float or a schedule; the layers that"
            " kfqn.find_layers returns come second."
        )
    check_constants(learning_rate=learning_rate, weight_decay=weight_decay)
    _advise(learning_rate, weight_decay, settings["step_rule"])
    links: Any = (
        scale_by_kfqn(layers, probe_step=learning_rate, **settings),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    chain: Any = optax.chain(*links)

    def update(updates, state, params=None, **extra_args):
        """A rejected step changes no parameter: the weights do not decay either."""
        is_sequence = isinstance(state, (tuple, list))
        if not is_sequence or len(state) != len(links):
            parts = f" of {len(state)}" if is_sequence else ""
            raise other_state(
                f"that is a {type(state).__name__}{parts}, not a tuple of {len(links)} states"
            )
        if params is None:
            raise ValueError(
                "kfqn: update was called with params=None. Write tx.update(grads, opt_state, params,"
                " curvature=curvature)."
            )
        updates, state = chain.update(updates, state, params, **extra_args)
        made = state[0].share > 0
        return jax.tree.map(lambda u: jnp.where(made, u, 0), updates), state

    return optax.GradientTransformationExtraArgs(chain.init, update)


def _advise(learning_rate: Any, weight_decay: Any, step_rule: Any) -> None:
    """Warn of the habits of Adam with a rule that chooses the length of its steps itself."""
    known = all(isinstance(x, (int, float)) for x in (learning_rate, weight_decay))
    if not known or not is_quadratic(step_rule):
        return
    # The rule itself, where the losses of new batches rise, goes down to this part of its steps.
    if 0 < learning_rate < LEAST:
        warn_once(
            f"kfqn: learning_rate={learning_rate!r} with kfqn.quadratic(), which chooses the length of its"
            f" steps: {learning_rate:.2%} of each is made, and next to nothing is learnt. Give 1.0, or a"
            " schedule that falls from 1.0."
        )
    # What Adam loses a step at its default with a weight decay of 1, ten times the largest in common use.
    if learning_rate * weight_decay > ADAMS:
        alike = f"{ADAMS * weight_decay / learning_rate:.1g}"
        warn_once(
            f"kfqn: weight_decay={weight_decay!r} is multiplied by learning_rate={learning_rate!r}, so each"
            f" step takes {learning_rate * weight_decay:.2%} of the weights. To decay as Adam does with"
            f" weight_decay={weight_decay!r} and a learning rate of {ADAMS}, give weight_decay={alike}."
        )
