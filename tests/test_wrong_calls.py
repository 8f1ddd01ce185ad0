"""Wrong calls get an error that names the call, shows the value it got, and says what to do.

A table: for each wrong call the type of its error and what its message, or a note on it, must hold. All are
raised while tracing: nothing is compiled.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from flax import nnx

import kfqn_optax as kfqn

PARAMS, X = zoo.MLP.example()
MODEL, LOSS = zoo.MLP.model, zoo.MLP.loss
LAYERS = kfqn.find_layers(MODEL, {"params": PARAMS}, X)
VALUE_AND_GRAD = kfqn.value_and_grad(LOSS, LAYERS)
OPTIMIZERS = [kfqn.kbfgs, kfqn.kbfgs_l, kfqn.kfqn, kfqn.kfac]
KBFGS, KFAC = kfqn.kbfgs(0.1, LAYERS), kfqn.kfac(1.0, LAYERS)

SETUP = zoo.CASES["setup"]
SETUP_PARAMS, SETUP_X = SETUP.example()
MORE = kfqn.find_layers(SETUP.model, {"params": SETUP_PARAMS}, SETUP_X)
FEWER = kfqn.find_layers(SETUP.model, {"params": SETUP_PARAMS}, SETUP_X, method="features")

NNX = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1)))
NNX_LAYERS = kfqn.find_layers(NNX, X)
GRAPHDEF, STATE = nnx.split(NNX, nnx.Param)


class Other(nn.Module):
    """Has other paths than ``MODEL``."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(x)


class Wider(nn.Module):
    """Has the same paths as ``MODEL``, and other shapes."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(9, use_bias=False)(x)
        return nn.Dense(2)(x)


class Complex(nn.Module):
    """Its first layer has complex parameters, its second a complex input."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, dtype=jnp.complex64, param_dtype=jnp.complex64, name="first")(x)
        return nn.Dense(2, name="last")(nn.Dense(3, dtype=jnp.complex64, name="second")(x).real)


def init(model):
    return jax.tree.map(jnp.zeros_like, jax.eval_shape(model.init, jax.random.key(0), X))["params"]


def find(model=MODEL, *args, **kwargs):
    return lambda: kfqn.find_layers(model, *args, **kwargs)


def trace(function, *args):
    return jax.eval_shape(function, *args)


def call(loss=LOSS, params=PARAMS, *args, layers=LAYERS, **settings):
    """``value_and_grad`` of the loss, called on the parameters."""
    batch = args or (X,)
    return lambda: trace(
        lambda p, *b: kfqn.value_and_grad(loss, layers, **settings)(p, *b)[:2], params, *batch
    )


def update(tx=KBFGS, *, state=None, grads=None, pick=None):
    """An update with something in the place of what belongs there."""

    def step(p):
        loss, own, curvature = VALUE_AND_GRAD(p, X)
        given = curvature if pick is None else pick(loss, own, curvature)
        before = tx.init(p) if state is None else state()
        return tx.update(own if grads is None else grads, before, p, curvature=given)

    return lambda: trace(step, PARAMS)


def ask(question):
    """Something asked of a curvature."""
    return lambda: trace(lambda params: question(VALUE_AND_GRAD(params, X)[2]), PARAMS)


def carried():
    def body(curvature, _):
        return VALUE_AND_GRAD(PARAMS, X)[2], None

    return jax.lax.scan(body, VALUE_AND_GRAD(PARAMS, X)[2], None, 2)


def warm(tx=KBFGS, value_and_grad=VALUE_AND_GRAD, params=PARAMS, batches=(X,)):
    return lambda: kfqn.warm_start(tx.init(PARAMS), value_and_grad, params, batches)


def constant(name, value, make=kfqn.kbfgs):
    return lambda: make(**{"learning_rate": 0.1, "layers": LAYERS, name: value})


def entered(context):
    def enter():
        with context:
            pass

    return enter


def plain(tx):
    """A wrapper that drops the curvature."""
    return optax.chain(optax.GradientTransformation(tx.init, lambda g, s, p=None: tx.update(g, s, p)))


def without_curvature(make):
    return lambda: trace(lambda p: make(0.1, LAYERS).update(p, make(0.1, LAYERS).init(p), p), PARAMS)


def initialised(params, make=kfqn.kbfgs, layers=LAYERS):
    return lambda: trace(make(0.1, layers).init, params)


def complex_update():
    params = init(Complex())
    return kfqn.kfac(1.0, kfqn.find_layers(Complex(), {"params": params}, X)).init(params)


def two_layers_of_one_name():
    params, x = zoo.CASES["jit"].example()
    lifted = kfqn.find_layers(zoo.CASES["jit"].model, {"params": params}, x)  # blocks/fc and out
    block = kfqn.find_layers(zoo.Block(), {"params": params["blocks"]}, x)  # fc
    return kfqn.join_layers({"a": lifted, "a/blocks": block})


def fewer_in_update():
    tx = kfqn.kbfgs(0.1, MORE)

    def step(params):
        _, grads, curvature = kfqn.value_and_grad(SETUP.loss, FEWER)(params, SETUP_X)
        return tx.update(grads, tx.init(params), params, curvature=curvature)

    return trace(step, SETUP_PARAMS)


def fewer_in_warm_start():
    state = kfqn.kbfgs(0.1, MORE).init(SETUP_PARAMS)
    return kfqn.warm_start(state, kfqn.value_and_grad(SETUP.loss, FEWER), SETUP_PARAMS, [SETUP_X])


def wide_state():
    layers = kfqn.find_layers(Wider(), {"params": init(Wider())}, X)
    return kfqn.kfac(0.1, layers).init(init(Wider()))


def train_state():
    state = kfqn.TrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=KBFGS)
    return state.apply_gradients(grads=PARAMS)


def nnx_call(loss, model):
    return lambda: kfqn.value_and_grad(loss, NNX_LAYERS)(model, X)


TREE = {"w": jnp.ones(3)}
INTEGER = {**PARAMS, "steps": jnp.arange(3)}
NUMBERS = "must be a number"
STATED = "kfqn: update was given a state"
AGAIN = "Pass what this transformation's init(params) returned"
VARIABLES = {"params": PARAMS}
BOTH = {"encoder": PARAMS, "decoder": init(Other())}

FIND = {
    "a class": (find(zoo.Mlp, VARIABLES, X), TypeError, "the class Mlp", "Pass the model itself"),
    "parameters": (find(PARAMS, VARIABLES, X), TypeError, "got a dict", "Pass the model itself"),
    "apply": (find(MODEL.apply, VARIABLES, X), TypeError, "got a method", "Pass the model itself"),
    "a state": (find(STATE, X), TypeError, "got a State", "Pass the model itself"),
    "params alone": (find(MODEL, PARAMS, X), ValueError, '"params"', "Dense_0", '{"params": params}'),
    "no params": (find(MODEL, {"batch_stats": {}}, X), ValueError, "batch_stats", '{"params": params}'),
    "None": (find(MODEL, None, X), ValueError, "got None", '{"params": params}'),
    "empty": (find(MODEL, {}, X), ValueError, "got []", '{"params": params}'),
    "inputs first": (find(MODEL, X, VARIABLES), ValueError, "float32[6, 4]", '{"params": params}'),
    "no inputs": (find(MODEL, VARIABLES), TypeError, "with (), {}", "arguments that your loss gives"),
    "narrow": (find(MODEL, VARIABLES, X[:, :2]), Exception, "(float32[6, 2],)", "arguments that your loss"),
    "a string": (find(MODEL, VARIABLES, "x"), Exception, "with ('x',)", "arguments that your loss gives"),
    "nnx narrow": (find(NNX, X[:, :2]), TypeError, "(float32[6, 2],)", "arguments as your loss does"),
    "no layer": (
        find(nn.LayerNorm(), {"params": init(nn.LayerNorm())}, X),
        ValueError,
        "LayerNorm",
        "scale",
    ),
    **{
        f"max_dim {bad}": (
            find(MODEL, VARIABLES, X, max_dim=bad),
            ValueError,
            f"max_dim={bad}",
            "at least 1",
        )
        for bad in (0, -1, 2.5)
    },
}
JOIN = {
    "parameters": (
        lambda: kfqn.join_layers({"encoder": PARAMS}),
        TypeError,
        "'encoder'",
        "kfqn.find_layers",
    ),
    "a model": (lambda: kfqn.join_layers([LAYERS, MODEL]), TypeError, "at 1", "kfqn.find_layers"),
    "layers": (lambda: kfqn.join_layers(LAYERS), TypeError, "got a Layers", "kfqn.find_layers"),
    "a number": (lambda: kfqn.join_layers(3), TypeError, "got a int", "kfqn.find_layers"),
    "nothing": (lambda: kfqn.join_layers({}), ValueError, "no layers", "Give those of each model"),
    "one name": (two_layers_of_one_name, ValueError, "'a/blocks'", "'a/blocks/fc'", "without a slash"),
}
MAKE = {
    "a model": (call(layers=MODEL), TypeError, "Mlp", "kfqn.find_layers(model, variables"),
    "parameters": (call(layers=PARAMS), TypeError, "dict", "kfqn.find_layers(model, variables"),
    "None": (call(layers=None), TypeError, "NoneType", "kfqn.find_layers(model, variables"),
    "no function": (call(3), TypeError, "loss_fn=3", "(params, *args)"),
    "no forward": (call(forward=3), TypeError, "forward=3", "(params, *args)"),
    "argument 0": (call(batch_argnums=0), ValueError, "batch_argnums=0", "from 1 on"),
    "a name": (call(batch_argnums="x"), ValueError, "batch_argnums='x'", "from 1 on"),
    "argument 5": (call(batch_argnums=5), ValueError, "argument 5", "Pass the batch by position"),
    "groups": (call(groups=4), ValueError, "groups=4", "a multiple of groups"),
    "no groups": (call(groups=0), ValueError, "groups=0", "at least 1"),
    "no axis": (call(axis_name="d"), ValueError, "axis_name='d'", "jax.pmap"),
}
CALL = {
    "other paths": (call(LOSS, init(Other())), ValueError, "Dense_0/kernel", "head/kernel", "find_layers"),
    "other shapes": (call(LOSS, init(Wider())), ValueError, "(4, 9)", "(4, 3)", "Call find_layers again"),
    "variables": (call(LOSS, VARIABLES), ValueError, "variables['params']"),
    "two models": (call(LOSS, BOTH), ValueError, "Dense_0/kernel", "kfqn.join_layers", "'encoder'"),
    "a tuple": (call(LOSS, (init(Other()), PARAMS)), ValueError, "kfqn.join_layers", "'1'"),
    "nested": (call(LOSS, {"both": PARAMS}), ValueError, "kfqn.join_layers", "'both'"),
    "batch first": (call(LOSS, X, PARAMS), ValueError, "(6, 4)", "the parameters first"),
    "None": (call(LOSS, None), ValueError, "hold []", "Call find_layers"),
    "integers": (call(LOSS, INTEGER), ValueError, "'steps' is of int32", "Keep it out of the parameters"),
    "a vector": (
        call(lambda p, x: MODEL.apply({"params": p}, x)[0]),
        TypeError,
        "float32[2]",
        "Take a mean",
    ),
    "an integer": (call(lambda p, x: 3), TypeError, "returned 3", "one real floating-point number"),
    "nothing": (call(lambda p, x: None), TypeError, "returned None", "one real floating-point number"),
    "complex": (call(lambda p, x: 1j * LOSS(p, x)), TypeError, "complex64[]", "one real floating-point"),
    "no aux": (call(has_aux=True), TypeError, "returned float32[]", "has_aux=True", "leave out has_aux"),
    "aux": (call(lambda p, x: (LOSS(p, x), {})), TypeError, "(float32[], {})", "has_aux=True"),
    "three": (
        call(lambda p, x: (LOSS(p, x), 1, 2), has_aux=True),
        TypeError,
        "(float32[], 1, 2)",
        "a pair",
    ),
    "constant": (
        call(lambda p, x: x.mean()),
        ValueError,
        "no call of the layers",
        "'Dense_0'",
        "Let loss_fn",
    ),
    "closed over": (
        call(lambda p, x: LOSS(PARAMS, x)),
        ValueError,
        "no call of the layers",
        "Let loss_fn apply",
    ),
    "nnx, a state": (
        nnx_call(lambda model, x: model(x).mean(), STATE),
        TypeError,
        "nnx.State",
        "kfqn.merge",
    ),
    "nnx, a model": (
        nnx_call(lambda state, x: kfqn.merge(GRAPHDEF, state)(x).mean(), NNX),
        TypeError,
        "kfqn.merge",
        "got a Sequential",
        "the State of the parameters",
    ),
    "nnx.merge": (
        nnx_call(lambda state, x: nnx.merge(GRAPHDEF, state)(x).mean(), STATE),
        ValueError,
        "depends on no call",
        "kfqn.merge(graphdef, params, rest)",
    ),
}
OTHERS = {
    "diagnostics": (
        lambda: kfqn.diagnostics(optax.adam(0.1).init(PARAMS)),
        ValueError,
        "kfqn.diagnostics",
        "no kfqn_optax state",
        "tx.init(params)",
    ),
    "weights, text": (entered(kfqn.weights("x")), TypeError, "kfqn.weights", "'x'", "an array of numbers"),
    "weights, None": (
        entered(kfqn.weights(None)),
        TypeError,
        "kfqn.weights",
        "None",
        "an array of numbers",
    ),
    "outputs, poisson": (
        lambda: kfqn.outputs(X, "poisson"),
        ValueError,
        "kfqn.outputs",
        "'poisson'",
        "Leave it",
    ),
    "outputs, reversed": (lambda: kfqn.outputs("normal", X), ValueError, "float32[6, 4]", "Leave it out"),
    "outputs, a pair": (
        lambda: kfqn.outputs((X, X)),
        ValueError,
        "kfqn.outputs",
        "a tuple",
        "each by a mark",
    ),
    "outputs, a float": (lambda: kfqn.outputs(3.0), ValueError, "kfqn.outputs", "a float", "Mark what"),
    "merge, numbers": (lambda: kfqn.merge(1, 2), TypeError, "kfqn.merge: got 1", "nnx.split"),
    "merge, a model": (
        lambda: kfqn.merge(NNX, STATE),
        TypeError,
        "kfqn.merge: got Sequential",
        "nnx.split",
    ),
    "merge, reversed": (lambda: kfqn.merge(STATE, GRAPHDEF), TypeError, "got State", "in its order"),
    "merge, no state": (lambda: kfqn.merge(GRAPHDEF), TypeError, "0 states", "kfqn.merge(graphdef, params"),
}
ASKED = {
    "returned": (ask(lambda c: c), ValueError, "a Curvature cannot be", "in one jitted function"),
    "jitted": (
        lambda: jax.jit(VALUE_AND_GRAD)(PARAMS, X),
        ValueError,
        "a Curvature",
        "one jitted function",
    ),
    "an argument": (ask(jax.jit(lambda c: c.value)), ValueError, "a Curvature", "in one jitted function"),
    "carried": (lambda: trace(carried), ValueError, "nor be carried by a loop", "in one jitted function"),
    "forms": (ask(lambda c: c.forms([TREE])), ValueError, "curvature.forms", "(3,) at 'w'", "shaped like"),
    "forms, one": (
        ask(lambda c: c.forms(PARAMS)),
        ValueError,
        "curvature.forms",
        "dict",
        "a list of trees",
    ),
    "value_at": (ask(lambda c: c.value_at(TREE)), ValueError, "curvature.value_at", "'w'", "shaped like"),
    "value_at, None": (ask(lambda c: c.value_at(None)), ValueError, "has no array at", "shaped like"),
    "value_at, number": (
        ask(lambda c: c.value_at(jax.tree.map(jnp.sum, PARAMS))),
        ValueError,
        "curvature.value_at: the tree given has an array of shape () at 'Dense_0/kernel'",
        "shaped like the parameters",
    ),
    "after": (ask(lambda c: c.after(TREE).value), ValueError, "curvature.after", "'w'", "shaped like"),
    "slope": (ask(lambda c: c.slope(TREE, PARAMS)), ValueError, "curvature.slope", "'w'", "shaped like"),
    "vectors": (
        ask(lambda c: c.after(PARAMS, {"Dense_0": jnp.ones(7)}).value),
        ValueError,
        "curvature.after: vectors has float32[7] for 'Dense_0'",
        "'Dense_0': (4,)",
    ),
    "rows": (ask(lambda c: c.factor_statistics(rows=1.5)), ValueError, "rows=1.5", "Give an int from 1"),
}
UPDATE = {
    **{
        f"no curvature, {make.__name__}": (
            without_curvature(make),
            ValueError,
            "update was called without curvature",
            "value_and_grad = kfqn.value_and_grad(loss_fn, layers)",
            "loss, grads, curvature = value_and_grad(params, batch)",
            "tx.update(grads, opt_state, params, curvature=curvature)",
        )
        for make in OPTIMIZERS
    },
    "a wrapper": (
        update(plain(KBFGS)),
        ValueError,
        "a wrapper drops it",
        "GradientTransformationExtraArgs",
    ),
    "TrainState": (lambda: trace(train_state), ValueError, "without curvature", "kfqn.value_and_grad"),
    "statistics": (
        update(pick=lambda *r: r[2].statistics),
        ValueError,
        "curvature=dict",
        "kfqn.value_and_grad(",
    ),
    "all three": (update(pick=lambda *r: r), ValueError, "curvature=tuple", "kfqn.value_and_grad("),
    "True": (update(pick=lambda *r: True), ValueError, "curvature=bool", "kfqn.value_and_grad("),
    "fewer layers": (fewer_in_update, ValueError, "blocks_1", "['blocks_0']", "the same layers"),
    "other gradients": (update(grads=init(Other())), ValueError, "update", "head/kernel", "find_layers"),
    "no params": (
        lambda: trace(
            lambda p: KBFGS.update(p, KBFGS.init(p), None, curvature=VALUE_AND_GRAD(p, X)[2]), PARAMS
        ),
        ValueError,
        "params=None",
        "tx.update(grads, opt_state, params, curvature=curvature)",
    ),
    "a schedule of None": (
        update(kfqn.kbfgs(lambda count: None, LAYERS)),
        TypeError,
        "the schedule of the learning rate returned None",
        NUMBERS,
    ),
    "a schedule of several": (
        update(kfqn.kbfgs(0.1, LAYERS, damping=lambda count: jnp.ones(3))),
        TypeError,
        "the schedule of the damping returned float32[3]",
        NUMBERS,
    ),
    "of kfac": (update(state=lambda: KFAC.init(PARAMS)), ValueError, STATED, "QuadraticState", AGAIN),
    "of kbfgs_l": (
        update(state=lambda: kfqn.kbfgs_l(0.1, LAYERS, memory=3).init(PARAMS)),
        ValueError,
        "output side of",
        "(3,",
    ),
    "of no momentum": (
        update(state=lambda: kfqn.kbfgs(0.1, LAYERS, momentum=0.0).init(PARAMS)),
        ValueError,
        "momentum",
        "empty",
    ),
    "of no rule": (
        update(state=lambda: kfqn.kbfgs(0.1, LAYERS, step_rule=None).init(PARAMS)),
        ValueError,
        STATED,
        "step rule",
    ),
    "of another memory": (
        update(
            kfqn.kbfgs_l(0.1, LAYERS, memory=5),
            state=lambda: kfqn.kbfgs_l(0.1, LAYERS, memory=4).init(PARAMS),
        ),
        ValueError,
        STATED,
        "(4,",
        "(5,",
    ),
    "of another width": (update(KFAC, state=wide_state), ValueError, STATED, "(9, 2)", "(3, 2)", AGAIN),
    "of adam": (
        update(state=lambda: optax.adam(0.1).init(PARAMS)),
        ValueError,
        STATED,
        "a tuple of 2",
        "3 states",
        AGAIN,
    ),
    "of adamw": (
        update(state=lambda: optax.adamw(0.1).init(PARAMS)),
        ValueError,
        STATED,
        "ScaleByAdamState",
        AGAIN,
    ),
    "a part of it": (
        update(state=lambda: KBFGS.init(PARAMS)[0]),
        ValueError,
        "ScaleByKfqnState of",
        AGAIN,
    ),
    "parameters for it": (update(state=lambda: PARAMS), ValueError, STATED, "a dict", AGAIN),
}


class Lasting(NamedTuple):
    steps: jax.Array


def ruled(**functions):
    """An update with a step rule of one's own, some functions of which are wrong."""
    rule = kfqn.StepRule(
        init=lambda params: Lasting(jnp.zeros([])),
        propose=lambda state, proposal: (proposal.direction, state),
        review=lambda state, outcome: (1.0, state),
    )
    return update(kfqn.kfac(1.0, LAYERS, step_rule=rule._replace(**functions)))


def sided(**functions):
    """An update with an output side of one's own, some functions of which are wrong."""
    own = kfqn.secant(kfqn.bfgs, kfqn.dp_dlm, decay=0.9, mu1=0.2)._replace(**functions)
    inputs = kfqn.hessian_action(decay=0.9)
    tx = kfqn.scale_by_kfqn(
        LAYERS, input_side=lambda layer: inputs, output_side=lambda layer: own, probe_step=0.1
    )
    return update(tx)


def factored(rule=kfqn.dp_dlm, **functions):
    """An update with an inverse factor or a damping rule of one's own that is wrong."""
    side = kfqn.secant(kfqn.bfgs._replace(**functions), rule, decay=0.9, mu1=0.2)
    return sided(**side._asdict())


PARTS = {
    "one value of two": (
        ruled(propose=lambda state, proposal: state),
        TypeError,
        "StepRule.propose",
        "(step, state)",
    ),
    "a step of another tree": (
        ruled(propose=lambda state, proposal: (jax.tree.leaves(proposal.direction), state)),
        TypeError,
        "StepRule.propose returned ([float32[",
        "(step, state)",
    ),
    "a step of another shape": (
        ruled(propose=lambda state, proposal: (jax.tree.map(jnp.sum, proposal.direction), state)),
        TypeError,
        "StepRule.propose returned float32[] at [0]['",
        "must return (step, state)",
    ),
    "a state of another kind": (
        ruled(review=lambda state, outcome: (1.0, tuple(state))),
        TypeError,
        "StepRule.review returned (1.0, (float32[],))",
        "(share, state)",
        "Lasting(steps=float32[])",
    ),
    "no state": (ruled(review=lambda state, outcome: 1.0), TypeError, "StepRule.review returned 1.0"),
    "a share of each layer": (
        ruled(review=lambda state, outcome: (jnp.ones(2), state)),
        TypeError,
        "StepRule.review returned float32[2] at [0]",
    ),
    "a damping of each layer": (
        ruled(damping=lambda state, given, curvature: jnp.ones(2)),
        TypeError,
        "StepRule.damping returned float32[2], but it must return one number",
    ),
    "a momentum of each layer": (
        ruled(momentum=lambda state, given: jnp.ones(2)),
        TypeError,
        "StepRule.momentum returned float32[2], but it must return one number",
    ),
    "H x of another shape": (
        sided(apply=lambda state, x: x[0]),
        TypeError,
        "Side.apply returned float32[",
        "H x",
    ),
    "a side's state": (
        sided(update=lambda state, before, after, damping: state.factor),
        TypeError,
        "Side.update returned float32[",
        "the state",
        "SecantState(",
    ),
    "a factor's state": (
        factored(update=lambda state, s, y: state[0]),
        TypeError,
        "InverseFactor.update returned float32[",
        "the state",
    ),
    "a factor's H x": (
        factored(apply=lambda state, x: x.sum(0)),
        TypeError,
        "returned float32[",
        "H x",
    ),
    "one vector of a damping rule": (
        factored(rule=lambda s, y, hy, mu1, mu2: y),
        TypeError,
        "the damping rule returned float32[",
        "(s, y)",
    ),
}
INIT = {
    **{
        f"{text}, {make.__name__}": (
            initialised(params, make),
            ValueError,
            "kfqn: init",
            "Dense_0/kernel",
            *parts,
        )
        for make in OPTIMIZERS
        for text, params, parts in (
            ("other paths", init(Other()), ("head/kernel", "find_layers")),
            ("other shapes", init(Wider()), ("(4, 9)", "(4, 3)", "find_layers")),
        )
    },
    "two models": (initialised(BOTH), ValueError, "kfqn: init", "kfqn.join_layers"),
    "variables": (initialised(VARIABLES), ValueError, "kfqn: init", "variables['params']"),
    "flattened": (
        lambda: optax.flatten(KBFGS).init(PARAMS),
        ValueError,
        "optax.flatten",
        "(20,)",
        "inside the chain",
    ),
    "integers": (initialised(INTEGER), ValueError, "'steps' is of int32", "Keep it out of the parameters"),
    "complex": (complex_update, ValueError, "'first/bias' is of complex64", "optax.partition"),
}
RANGES = {
    "learning_rate": ([-0.1, float("nan"), float("inf")], "at least 0"),
    "damping": ([0, 0.0, -0.3, float("nan"), float("inf"), np.float32(0), jnp.zeros(())], "positive"),
    "weight_decay": ([-0.1, float("nan"), float("inf")], "at least 0"),
    "step_rule": ([0, -1.0, float("nan")], "None for the papers' step"),
    "momentum": ([1, 1.5, -0.1], "in [0, 1)"),
    "decay": ([1, -0.1], "in [0, 1)"),
    "mu1": ([0, 1, -0.5], "in (0, 1)"),
    "update_every": ([0, -1, 1.5, float("inf")], "a whole number of at least 1"),
    "max_dim": ([0, 1.5], "a whole number of at least 1"),
}
CONSTANTS = {
    **{
        f"{name}={value!r}": (constant(name, value), ValueError, f"kfqn: {name}={value!r}", wanted)
        for name, (values, wanted) in RANGES.items()
        for value in values
    },
    **{
        f"{name}={value!r}": (constant(name, value), TypeError, f"kfqn: {name}={value!r}", NUMBERS)
        for name in ("learning_rate", "damping", "weight_decay")
        for value in (None, "0.3", 1j)
    },
    **{
        f"{name}, a schedule": (
            constant(name, lambda count: 0.5),
            TypeError,
            f"kfqn: {name} is the function",
            "Schedules are for damping",
        )
        for name in ("momentum", "decay", "mu1", "update_every", "weight_decay")
    },
    **{
        f"{rule.__name__}, uncalled": (
            constant("step_rule", rule, kfqn.kfac),
            TypeError,
            f"the function {rule.__name__}",
            "kfqn.quadratic()",
        )
        for rule in (kfqn.measured, kfqn.quadratic, kfqn.StepRule)
    },
    **{
        f"factor_dtype={dtype!r}": (
            constant("factor_dtype", dtype, kfqn.kfac),
            ValueError,
            f"factor_dtype={dtype!r}",
            "need float32",
        )
        for dtype in (jnp.int32, jnp.bfloat16, "float16", bool, "float8x")
    },
    **{
        f"layers, {make.__name__}": (
            lambda make=make: make(0.1, MODEL),
            TypeError,
            "Mlp",
            "kfqn.find_layers",
        )
        for make in OPTIMIZERS
    },
    "layers first": (
        lambda: kfqn.kbfgs(LAYERS, 0.1),
        TypeError,
        "learning_rate is a Layers",
        "come second",
    ),
    "several rates": (
        constant("learning_rate", jnp.ones(3)),
        TypeError,
        "learning_rate=float32[3]",
        NUMBERS,
    ),
    "inverse_every": (constant("inverse_every", 0, kfqn.kfac), ValueError, "inverse_every=0", "at least 1"),
    "statistics_rows": (
        constant("statistics_rows", "half", kfqn.kfac),
        TypeError,
        "statistics_rows='half'",
        "None for all, or 'auto'",
    ),
    "memory": (constant("memory", 0, kfqn.kbfgs_l), ValueError, "memory=0", "at least 1"),
    "damping of kfqn": (constant("damping", -1.0, kfqn.kfqn), ValueError, "damping=-1.0", "positive"),
    "rule": (constant("step_rule", "quadratic"), TypeError, "step_rule='quadratic'", "kfqn.quadratic()"),
    "precision": (constant("precision", "best"), ValueError, "precision='best'", "'highest'"),
    "start": (constant("start", "zero"), ValueError, "start='zero'", "'identity' or 'gradients'"),
    "floor": (
        lambda: kfqn.quadratic(floor=2, ceiling=1),
        ValueError,
        "floor=2",
        "ceiling=1",
        "Lower the floor",
    ),
    "rows": (lambda: kfqn.quadratic(rows=0), ValueError, "rows=0", "None for all"),
}
WARM = {
    "no batch": (warm(batches=[]), ValueError, "kfqn.warm_start", "batches is empty", "at least one"),
    "no more": (warm(batches=iter(())), ValueError, "kfqn.warm_start", "batches is empty", "at least one"),
    "None": (warm(batches=None), TypeError, "kfqn.warm_start: batches is None", "[batch] for one"),
    "one array": (warm(batches=X), TypeError, "batches is float32[6, 4]", "[batch] for one"),
    "one batch": (warm(batches={"x": X}), TypeError, "batches is {'x': float32[6, 4]}", "[batch] for one"),
    "dictionaries": (
        warm(batches=[{"x": X}]),
        Exception,
        "the batch ({'x': float32[6, 4]},)",
        "a tuple of them",
    ),
    "two arguments": (
        warm(batches=[(X, X)]),
        TypeError,
        "(float32[6, 4], float32[6, 4])",
        "a tuple of them",
    ),
    "narrow": (warm(batches=[X[:, :2]]), Exception, "the batch (float32[6, 2],)", "the one argument that"),
    "a loss": (
        warm(KBFGS, LOSS),
        TypeError,
        "kfqn.warm_start",
        "method",
        "kfqn.value_and_grad(loss_fn, layers)",
    ),
    "of kfac": (
        warm(KFAC),
        ValueError,
        "kfqn.warm_start",
        "no layer of this optimizer",
        "Leave warm_start out",
    ),
    "of kfqn": (
        warm(kfqn.kfqn(0.1, LAYERS)),
        ValueError,
        "no layer of this optimizer",
        "Leave warm_start out",
    ),
    "of adam": (
        warm(optax.adam(0.1)),
        ValueError,
        "kfqn.warm_start",
        "no kfqn_optax state",
        "tx.init(params)",
    ),
    "other model": (warm(params=init(Other())), ValueError, "Dense_0/kernel", "head/kernel", "find_layers"),
    "fewer layers": (fewer_in_warm_start, ValueError, "kfqn.warm_start", "blocks_1", "the same layers"),
}
TABLES = [  # what all the messages of a table hold, and the table
    ("kfqn.find_layers", FIND),
    ("kfqn.join_layers", JOIN),
    ("kfqn.value_and_grad", MAKE),
    ("kfqn.value_and_grad", CALL),
    ("kfqn.", OTHERS),
    ("curvature", ASKED),
    ("kfqn: ", UPDATE),
    ("kfqn: ", PARTS),
    ("init", INIT),
    ("kfqn", CONSTANTS),
    ("kfqn.warm_start", WARM),
]
ROWS = [
    pytest.param(thunk, error, (caller, *parts), id=f"{caller}, {name}")
    for caller, table in TABLES
    for name, (thunk, error, *parts) in table.items()
]


@pytest.mark.parametrize(("thunk", "error", "parts"), ROWS)
def test_a_wrong_call(thunk, error, parts):
    with pytest.raises(error) as raised:
        thunk()
    told = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    for part in parts:
        assert part in told
