"""Every public transformation behaves as Optax users expect, alone and inside Optax's own wrappers.

``METHODS`` is the list of transformations: a new one is one line. What only concerns trees, shapes and
dtypes is checked for all of them by tracing alone; values inside wrappers are compared for ``kbfgs``.
"""

import functools
import pathlib
import subprocess
import sys
import textwrap
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import kfqn_optax as kfqn
from kfqn_optax._state import map_states
from kfqn_optax.bench._quick import quick_jit
from kfqn_optax.bench._simulated import simulated

METHODS = {
    "kbfgs": kfqn.kbfgs,
    "kbfgs_l": functools.partial(kfqn.kbfgs_l, memory=3),
    "kfqn": kfqn.kfqn,
    "kfac": functools.partial(kfqn.kfac, inverse_every=2),
}
VARIANTS = METHODS | {
    "kbfgs_l inputs": functools.partial(kfqn.kbfgs_l, memory=3, limited_inputs=True),
    "kbfgs quadratic": functools.partial(kfqn.kbfgs, step_rule=kfqn.quadratic(rate=1.0), momentum=0.0),
    "kfac measured": functools.partial(kfqn.kfac, step_rule=kfqn.measured(), momentum=0.9, damping=0.1),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_variant = pytest.mark.parametrize("method", VARIANTS.values(), ids=VARIANTS)

STATIC = {"kbfgs": "groups", "kbfgs_l": "memory", "kfqn": "groups"}  # what must not be traced

IN, HIDDEN, OUT, ROWS = 3, 4, 2, 6
LR = 0.1


@pytest.fixture(autouse=True)
def _float64():
    """Differences of statistics over a small step lose digits: in float64 there are enough of them."""
    with jax.enable_x64(True):
        yield


class Net(nn.Module):
    """Two layers, one without bias, and a parameter that belongs to none."""

    dtype: str
    first_bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(HIDDEN, use_bias=self.first_bias, param_dtype=self.dtype)(x)
        x = nn.tanh(x) * self.param("scale", nn.initializers.ones, (1, HIDDEN), self.dtype)
        return nn.Dense(OUT, use_bias=False, param_dtype=self.dtype)(x)


class Problem(NamedTuple):
    params: dict
    layers: kfqn.Layers
    value_and_grad: object

    def step(self, tx, **extra):
        """``train_step(params, opt_state, batch) -> (params, opt_state, (loss, updates))``."""

        def train_step(params, opt_state, batch):
            loss, grads, curvature = self.value_and_grad(params, batch)
            updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature, **extra)
            return optax.apply_updates(params, updates), opt_state, (loss, updates)

        return train_step


def fit(outputs, x):
    return jnp.mean((outputs - jnp.sin(x[:, :OUT])) ** 2)


@functools.cache
def problem(dtype="float64"):
    model, x = Net(dtype), batch(0, dtype)
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    layers = kfqn.find_layers(model, {"params": params}, x)
    loss_fn = lambda params, x: fit(model.apply({"params": params}, x), x)
    return Problem(params, layers, kfqn.value_and_grad(loss_fn, layers))


def batch(k, dtype="float64"):
    return jnp.asarray(np.random.default_rng(k).normal(size=(ROWS, IN)), dtype)


def run(tx, steps=3, problem=None):
    """Params, state and the updates of each of a few jitted steps."""
    problem = problem or globals()["problem"]()
    params, state, all_updates = problem.params, tx.init(problem.params), []
    train_step = quick_jit(problem.step(tx))
    for k in range(steps):
        params, state, (_, updates) = train_step(params, state, batch(k))
        all_updates.append(updates)
    return params, state, all_updates


def kinds(tree):
    """Structure, shapes, dtypes and weak types: what makes jit trace again."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree)


def assert_close(ours, expected, rtol=1e-9, atol=1e-11):
    """What a state keeps in float32 may have been rounded to the number beside it."""
    assert jax.tree.structure(ours) == jax.tree.structure(expected)

    def close(one, other):
        rounding = 2 * np.finfo(np.float32).eps if jnp.result_type(one) == jnp.float32 else 0.0
        np.testing.assert_allclose(one, other, rtol=max(rtol, rounding), atol=atol)

    jax.tree.map(close, ours, expected)


def assert_same(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def norm(tree):
    return np.sqrt(sum((np.asarray(leaf) ** 2).sum() for leaf in jax.tree.leaves(tree)))


def find_state(opt_state):
    """The only kfqn_optax state in an optimizer state."""
    is_ours = lambda node: isinstance(node, kfqn.ScaleByKfqnState)
    (found,) = [n for n in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(n)]
    return found


# State


def check_state(tx, problem, dtype="float64"):
    """Abstract init is concrete init, and an update returns the state it was given, kind by kind."""
    state = tx.init(problem.params)
    abstract = jax.eval_shape(tx.init, problem.params)
    assert kinds(abstract) == kinds(state)
    params, after, (_, updates) = jax.eval_shape(
        problem.step(tx, value=1.0, foo=None), problem.params, abstract, batch(0, dtype)
    )
    assert kinds(after) == kinds(state)
    assert kinds(params) == kinds(problem.params)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, problem.params)
    return state


def dtypes(tree):
    """Names of the dtypes of all floating-point leaves; flags and counts are bool and int32."""
    found = {leaf.dtype.name for leaf in jax.tree.leaves(tree)}
    return found - {"bool", "int32"}


@every_variant
def test_a_float32_model_has_a_float32_state(method):
    with jax.enable_x64(False):
        state = check_state(method(LR, problem("float32").layers), problem("float32"), "float32")
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
        assert dtypes(state) == {"float32"}


@every_method
def test_a_float32_model_has_a_float32_state_where_x64_is_on(method):
    state = check_state(method(LR, problem("float32").layers), problem("float32"), "float32")
    assert dtypes(state) == {"float32"}


@every_variant
def test_a_float64_model_has_a_float64_state(method):
    state = find_state(check_state(method(LR, problem().layers), problem()))
    assert dtypes((state.momentum, state.inputs, state.outputs, state.others)) == {"float64"}


@every_method
def test_a_bfloat16_model_has_a_float32_state(method):
    with jax.enable_x64(False):
        state = check_state(method(LR, problem("bfloat16").layers), problem("bfloat16"), "float32")
        assert dtypes(state) == {"float32"}


@every_method
def test_the_factors_have_the_dtype_asked_for(method):
    small = problem("float32")
    state = find_state(check_state(method(LR, small.layers, factor_dtype=jnp.float64), small, "float32"))
    assert dtypes((state.inputs, state.outputs)) == {"float64"}
    assert dtypes(state.momentum) == (set() if state.momentum == () else {"float32"})


@every_method
def test_schedules_change_nothing_about_the_state(method):
    schedule = optax.exponential_decay(0.1, 1, 0.5)
    with jax.enable_x64(False):
        small = problem("float32")
        check_state(method(schedule, small.layers, damping=schedule), small, "float32")


def test_bfloat16_parameters_are_trained():
    with jax.enable_x64(False):
        narrow = problem("bfloat16")
        train_step = quick_jit(narrow.step(kfqn.kbfgs(1.0, narrow.layers)))
        params, state = narrow.params, kfqn.kbfgs(1.0, narrow.layers).init(narrow.params)
        losses = []
        for _ in range(40):
            params, state, (loss, _) = train_step(params, state, batch(0, "float32"))
            losses.append(loss)
    assert dtypes(params) == {"bfloat16"}
    assert find_state(state).rejected == 0
    assert losses[-1] < 0.7 * losses[0]


def test_kbfgs_is_a_chain_over_scale_by_kfqn():
    layers = problem().layers
    scale = kfqn.scale_by_kfqn(
        layers,
        input_side=lambda layer: kfqn.hessian_action(decay=0.9),
        output_side=lambda layer: kfqn.secant(kfqn.bfgs, kfqn.double_damping, decay=0.9, mu1=0.2),
        probe_step=LR,
    )
    params, state, _ = run(optax.chain(scale, optax.scale_by_learning_rate(LR)))
    expected, plain, _ = run(kfqn.kbfgs(LR, layers))
    assert_close(params, expected)
    assert_close(find_state(state), find_state(plain))


# One compilation, and the same numbers however it is run


@every_variant
def test_jit_scan_and_no_jit_agree_and_jit_traces_once(method):
    small, tx, steps = problem(), method(LR, problem().layers), 4
    traces, step = [], small.step(tx)

    @quick_jit
    def jitted(*args):
        traces.append(1)
        return step(*args)

    start = (small.params, tx.init(small.params))
    carry, history = start, []
    for k in range(steps):
        *carry, _ = jitted(*carry, batch(k))
        history.append(tuple(carry))
    assert len(traces) == 1
    assert kinds(history[-1]) == kinds(start)

    *eager, _ = step(*start, batch(0))
    assert_close(tuple(eager), history[0])

    ignoring = small.step(tx, value=jnp.ones([]), foo="bar")  # extra arguments for others in a chain

    @quick_jit
    def scan(carry, batches):
        return jax.lax.scan(lambda carry, x: (ignoring(*carry, x)[:2], None), carry, batches)[0]

    scanned = scan(start, jnp.stack([batch(k) for k in range(steps)]))
    assert_close(scanned, history[-1])


# Inside Optax's wrappers


def inject(method, static_args=(), **settings):
    factory = optax.inject_hyperparams(method, static_args=static_args)
    return factory(learning_rate=LR, layers=problem().layers, **settings)


FIRST = {"Dense_0": True, "Dense_1": False, "scale": False}
WITHOUT_BIAS = {"Dense_0": {"kernel": True, "bias": False}, "Dense_1": True, "scale": True}
LABELS = {"Dense_0": "a", "Dense_1": "b", "scale": "b"}
WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked subtree": lambda tx: optax.masked(tx, FIRST),
    "masked bias": lambda tx: optax.masked(tx, WITHOUT_BIAS),
    "partition": lambda tx: optax.partition({"a": tx, "b": optax.adam(1e-3)}, LABELS),
    "two groups": lambda tx: optax.partition({"a": tx, "b": tx}, LABELS),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
}


@every_method
@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_method_keeps_its_state(method, wrapper):
    check_state(wrapper(method(LR, problem().layers)), problem())


@pytest.mark.parametrize("name", METHODS)
def test_inject_hyperparams_needs_no_static_arguments_but_lengths(name):
    check_state(inject(METHODS[name], STATIC.get(name, ())), problem())


@pytest.mark.parametrize(
    ("name", "length", "settings"),
    [
        *((name, length, {}) for name, length in STATIC.items()),
        ("kfac", "statistics_rows", {"statistics_rows": 9}),
    ],
)
def test_inject_hyperparams_without_a_static_length_tells_what_to_write(name, length, settings):
    tx = inject(METHODS[name], **settings)
    with pytest.raises(ValueError, match=f'static_args="{length}"'):
        state = tx.init(problem().params)
        jax.eval_shape(problem().step(tx), problem().params, state, batch(0))


def test_clip_before_kbfgs_clips_what_it_sees():
    tx = kfqn.kbfgs(LR, problem().layers, step_rule=None, others_decay=None)
    _, _, plain = run(tx, steps=1)
    _, _, loose = run(optax.chain(optax.clip_by_global_norm(1e6), tx), steps=1)
    assert_close(loose, plain)
    _, clipped_state, clipped = run(optax.chain(optax.clip_by_global_norm(1e-3), tx), steps=1)
    np.testing.assert_allclose(norm(find_state(clipped_state).momentum), 1e-4)
    ratio = norm(clipped) / norm(plain)
    assert_close(clipped, jax.tree.map(lambda u: ratio * u, plain))


class FrozenNet(nn.Module):
    """``Net`` whose first kernel alone is a parameter."""

    use_bias: bool
    frozen: object

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(HIDDEN, use_bias=self.use_bias, param_dtype=x.dtype)(x)
        if not self.use_bias:
            x = x + self.frozen["Dense_0"]["bias"][None]
        return (nn.tanh(x) * self.frozen["scale"]) @ self.frozen["Dense_1"]["kernel"]


def frozen_problem(use_bias):
    frozen = problem().params
    model = FrozenNet(use_bias, jax.tree.map(np.asarray, frozen))
    given = frozen["Dense_0"]
    params = {"Dense_0": given if use_bias else {"kernel": given["kernel"]}}
    layers = kfqn.find_layers(model, {"params": params}, batch(0))
    loss_fn = lambda params, x: fit(model.apply({"params": params}, x), x)
    return Problem(params, layers, kfqn.value_and_grad(loss_fn, layers))


def freeze_others(tx, trained):
    """``tx`` on the parameters marked True, and no update for the others."""
    rest = jax.tree.map(lambda keep: not keep, trained)
    return optax.chain(optax.masked(tx, trained), optax.masked(optax.set_to_zero(), rest))


@pytest.mark.parametrize("use_bias", [True, False], ids=["subtree", "kernel of a layer with a bias"])
def test_masked_kbfgs_is_kbfgs_of_the_smaller_model(use_bias):
    """Masked leaves are constants to it: no part in the probe, the cap, or a homogeneous input."""
    trained = dict(FIRST, Dense_0={"kernel": True, "bias": use_bias})
    small = frozen_problem(use_bias)
    ours, state, _ = run(freeze_others(kfqn.kbfgs(LR, problem().layers), trained))
    expected, smaller_state, _ = run(kfqn.kbfgs(LR, small.layers), problem=small)
    assert list(find_state(state).inputs) == ["Dense_0"]
    assert_close(find_state(state).outputs, find_state(smaller_state).outputs)
    assert_close(find_state(state).inputs, find_state(smaller_state).inputs)
    for name, value in expected["Dense_0"].items():
        np.testing.assert_allclose(ours["Dense_0"][name], value)
    assert_same(ours["Dense_1"], problem().params["Dense_1"])
    assert_same(ours["scale"], problem().params["scale"])


def test_partition_gives_each_group_its_own_method():
    tx = kfqn.kbfgs(LR, problem().layers)
    _, state, updates = run(WRAPPERS["partition"](tx), steps=1)
    _, _, masked = run(freeze_others(tx, FIRST), steps=1)
    assert_close(updates[0]["Dense_0"], masked[0]["Dense_0"])
    _, grads, _ = problem().value_and_grad(problem().params, batch(0))
    adam = optax.adam(1e-3)
    expected, _ = adam.update(grads, adam.init(problem().params))
    assert_close(updates[0]["Dense_1"], expected["Dense_1"])
    assert_close(updates[0]["scale"], expected["scale"])
    assert list(find_state(state).inputs) == ["Dense_0"]


def test_two_groups_of_kbfgs_are_independent_and_reported_together():
    layers, second = problem().layers, jax.tree.map(lambda keep: not keep, FIRST)
    first_tx, second_tx = kfqn.kbfgs(LR, layers, damping=0.3), kfqn.kbfgs(LR / 2, layers, damping=0.1)
    _, state, updates = run(optax.partition({"a": first_tx, "b": second_tx}, LABELS), steps=1)
    _, _, only_first = run(freeze_others(first_tx, FIRST), steps=1)
    _, _, only_second = run(freeze_others(second_tx, second), steps=1)
    assert_close(updates[0]["Dense_0"], only_first[0]["Dense_0"])
    assert_close(updates[0]["Dense_1"], only_second[0]["Dense_1"])
    assert_close(updates[0]["scale"], only_second[0]["scale"])
    report = jax.jit(kfqn.diagnostics)(state)
    assert list(report["layers"]) == ["Dense_0", "Dense_1"]
    assert report["layers"]["Dense_1"]["output"]["taken"] == 1
    for label, damping in (("a", 0.3), ("b", 0.1)):
        np.testing.assert_allclose(report["rule"][f"{label}/damping"], damping)
        assert 0 < report["rule"][f"{label}/cap"] <= 1
    of_second = lambda own: own._replace(rejected=own.rejected + ("Dense_1" in own.inputs))
    report = kfqn.diagnostics(map_states(of_second, state, "test"))
    assert (report["rejected"], report["rule"]["b/rejected"], report["rule"]["a/rejected"]) == (1, 1, 0)


def test_inject_hyperparams_follows_its_schedules():
    """The probe and the step use the injected value of the same count."""
    schedule = lambda k: LR * 0.5**k
    layers = problem().layers
    factory = optax.inject_hyperparams(kfqn.kbfgs, static_args="groups")
    injected = factory(learning_rate=schedule, layers=layers, damping=schedule)
    params, state, _ = run(injected)
    expected, plain, _ = run(kfqn.kbfgs(schedule, layers, damping=schedule))
    assert_close(params, expected)
    assert_close(find_state(state), find_state(plain))
    np.testing.assert_allclose(state.hyperparams["learning_rate"], schedule(2), rtol=1e-6)


def test_an_injected_learning_rate_can_be_set_between_steps_without_a_new_trace():
    tx = inject(kfqn.kbfgs, "groups")
    small, step, traces = problem(), problem().step(tx), []

    @quick_jit
    def jitted(*args):
        traces.append(1)
        return step(*args)

    state = tx.init(small.params)
    _, _, (_, updates) = jitted(small.params, state, batch(0))
    state.hyperparams["learning_rate"] = jnp.asarray(LR / 2, state.hyperparams["learning_rate"].dtype)
    _, _, (_, halved) = jitted(small.params, state, batch(0))
    assert len(traces) == 1
    assert_close(halved, jax.tree.map(lambda u: u / 2, updates))


def test_apply_if_finite_and_kbfgs_agree_on_finite_steps_and_skip_the_others():
    tx = optax.apply_if_finite(kfqn.kbfgs(LR, problem().layers), 3)
    small, train_step = problem(), quick_jit(problem().step(tx))
    params, state, _ = train_step(small.params, tx.init(small.params), batch(0))
    same, after, _ = train_step(params, state, batch(1) * jnp.nan)
    assert_same(same, params)
    assert_same(after.inner_state, state.inner_state)
    assert after.notfinite_count == 1
    params, after, _ = train_step(same, after, batch(1))
    expected, plain, _ = run(kfqn.kbfgs(LR, small.layers), steps=2)
    assert_close(params, expected)
    assert_close(after.inner_state, plain)


def test_multi_steps_averages_gradients_and_takes_the_last_curvature():
    small, tx = problem(), kfqn.kbfgs(LR, problem().layers)
    _, _, (first, second) = run(WRAPPERS["MultiSteps"](tx), steps=2)
    assert not any(leaf.any() for leaf in jax.tree.leaves(first))

    @quick_jit
    def expected(params):
        _, g0, _ = small.value_and_grad(params, batch(0))
        _, g1, curvature = small.value_and_grad(params, batch(1))
        mean = jax.tree.map(lambda a, b: (a + b) / 2, g0, g1)
        return tx.update(mean, tx.init(params), params, curvature=curvature)[0]

    assert_close(second, expected(small.params), rtol=1e-6)  # MultiSteps divides in float32


def test_weight_decay_is_decoupled_and_masked():
    layers, decay = problem().layers, 0.01
    mask = lambda params: {"Dense_0": {"kernel": True, "bias": False}, "Dense_1": True, "scale": False}
    _, plain_state, plain = run(kfqn.kbfgs(LR, layers), steps=1)
    _, state, decayed = run(kfqn.kbfgs(LR, layers, weight_decay=decay, mask=mask), steps=1)
    assert_close(find_state(state), find_state(plain_state))
    params = problem().params
    expected = jax.tree.map(lambda u: u, plain[0])
    for name in ("Dense_0", "Dense_1"):
        expected[name]["kernel"] = plain[0][name]["kernel"] - LR * decay * params[name]["kernel"]
    assert_close(decayed[0], expected)


# The update interval


def sub_jaxprs(equation):
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def count(jaxpr, name, into_cond=True):
    """How often a primitive occurs, in all that is called from a jaxpr, inside ``cond`` or not."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == name
        if into_cond or equation.primitive.name != "cond":
            total += sum(count(sub, name, into_cond) for sub in sub_jaxprs(equation))
    return total


def conds(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            yield equation
        else:
            for sub in sub_jaxprs(equation):
                yield from conds(sub)


@pytest.mark.parametrize("interval", [3, np.int32(3)], ids=["int", "array, as inject_hyperparams gives"])
def test_between_refreshes_the_second_pass_is_not_run(interval):
    """One forward pass has one tanh: one is outside, the other in one branch of one condition."""
    tx = kfqn.kbfgs(LR, problem().layers, update_every=interval)
    state = jax.eval_shape(tx.init, problem().params)
    jaxpr = jax.make_jaxpr(problem().step(tx))(problem().params, state, batch(0)).jaxpr
    assert count(jaxpr, "tanh", into_cond=False) == 1
    inside = [[count(b.jaxpr, "tanh") for b in cond.params["branches"]] for cond in conds(jaxpr)]
    assert sorted(map(sum, inside)) == [0, 0, 1], "the start, settled scalars, the refresh by a second pass"
    every = kfqn.kbfgs(LR, problem().layers)
    jaxpr = jax.make_jaxpr(problem().step(every))(problem().params, state, batch(0)).jaxpr
    assert count(jaxpr, "tanh", into_cond=False) == 2


@pytest.mark.parametrize("method", [METHODS["kbfgs"], METHODS["kfqn"]], ids=["kbfgs", "kfqn"])
def test_factors_change_every_third_step_only(method):
    tx = method(LR, problem().layers, update_every=3)
    small, train_step = problem(), quick_jit(problem().step(tx))
    params, state = small.params, tx.init(small.params)
    for k in range(7):
        before = find_state(state)
        params, state, (_, updates) = train_step(params, state, batch(k))
        after = find_state(state)
        assert norm(updates) > 0
        for name in before.outputs:
            for side in (after.inputs[name], after.outputs[name]):
                taken, _, skipped = side.pairs.counts
                assert taken + skipped == k // 3 + 1
            if k % 3:
                np.testing.assert_array_equal(after.inputs[name].factor, before.inputs[name].factor)
                assert_same(after.outputs[name], before.outputs[name])
            else:
                assert (after.inputs[name].factor != before.inputs[name].factor).any()
                assert (after.outputs[name].factor != before.outputs[name].factor).any()


# Around the optimizer


def test_orbax_restores_the_state(tmp_path):
    tx = WRAPPERS["partition"](kfqn.kbfgs(LR, problem().layers))
    params, state, _ = run(tx)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(tx.init, problem().params)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert_same(restored, state)
    assert kinds(restored) == kinds(state)
    train_step = quick_jit(problem().step(tx))
    assert_same(train_step(params, restored, batch(9)), train_step(params, state, batch(9)))


DATA_PARALLEL = """
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    import test_conformance as t

    jax.config.update("jax_enable_x64", True)

    def train(batches_on, everything_on):
        small = t.problem()
        tx = METHOD(t.LR, small.layers)
        step = jax.jit(small.step(tx))
        carry = jax.device_put((small.params, tx.init(small.params)), everything_on)
        for k in range(3):
            x = np.concatenate([t.batch(k), t.batch(k + 10)])
            *carry, (loss, _) = step(*carry, jax.device_put(x, batches_on))
        return carry, loss

    assert jax.device_count() == 4
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    ours, loss = train(split, whole)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(ours))
    expected, expected_loss = train(jax.devices()[0], jax.devices()[0])
    np.testing.assert_allclose(loss, expected_loss)
    t.assert_close(*(jax.tree.map(np.asarray, x) for x in (ours, expected)), )
"""


def test_data_parallel_training_is_the_same_as_on_one_device():
    program = textwrap.dedent(DATA_PARALLEL).replace("METHOD", "t.kfqn.kbfgs")
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=pathlib.Path(__file__).parent,
        env=simulated(4),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_train_state_forwards_curvature():
    small, tx = problem(), kfqn.kbfgs(LR, problem().layers)

    @quick_jit
    def train_step(state, x):
        _, grads, curvature = small.value_and_grad(state.params, x)
        return state.apply_gradients(grads=grads, curvature=curvature)

    state = kfqn.TrainState.create(apply_fn=None, params=small.params, tx=tx)
    for k in range(2):
        state = train_step(state, batch(k))
    params, opt_state, _ = run(tx, steps=2)
    assert state.step == 2
    assert_close(state.params, params)
    assert_close(state.opt_state, opt_state)


def test_train_state_works_with_any_other_transformation():
    state = kfqn.TrainState.create(apply_fn=None, params=problem().params, tx=optax.sgd(1.0))
    _, grads, curvature = problem().value_and_grad(state.params, batch(0))
    for extra in ({}, {"curvature": curvature}):
        after = state.apply_gradients(grads=grads, **extra)
        assert_close(after.params, jax.tree.map(lambda p, g: p - g, state.params, grads))


@every_method
def test_diagnostics_under_jit_and_through_nested_states(method):
    tx = optax.chain(
        optax.identity(), optax.apply_if_finite(WRAPPERS["two groups"](method(LR, problem().layers)), 1)
    )
    report = jax.eval_shape(lambda params: kfqn.diagnostics(tx.init(params)), problem().params)
    assert sorted(report) == ["count", "damping", "layers", "outliers", "rejected", "rule", "share"]
    assert all(number.shape == () for number in report["rule"].values())
    for side in (side for layer in report["layers"].values() for side in layer.values()):
        assert {key: value.shape for key, value in side.items()} == dict.fromkeys(
            ("taken", "damped", "skipped", "ratio", "norm"), ()
        )


def test_diagnostics_tell_what_happened():
    _, state, _ = run(kfqn.kbfgs(LR, problem().layers, step_rule=1e-8))
    report = kfqn.diagnostics(state)
    ours = find_state(state)
    assert report["count"] == 3
    assert report["rejected"] == 0
    assert report["share"] == 1
    assert 0 < report["rule"]["cap"] < 1
    np.testing.assert_allclose(report["damping"], 0.1)
    for name, layer in report["layers"].items():
        for side, kept in (("input", ours.inputs[name]), ("output", ours.outputs[name])):
            assert layer[side]["taken"] + layer[side]["skipped"] == 3
            np.testing.assert_allclose(layer[side]["norm"], np.linalg.norm(kept.factor))
            np.testing.assert_array_equal(layer[side]["ratio"], kept.pairs.ratio)


def test_warm_start_finds_the_state_wherever_it_is():
    layers, batches = problem().layers, [batch(k) for k in range(3)]
    expected = np.mean([np.hstack([x, np.ones((ROWS, 1))]).T @ np.hstack([x, np.ones((ROWS, 1))]) / ROWS
                        for x in map(np.asarray, batches)], 0)  # fmt: skip
    tx = kfqn.kbfgs(LR, layers)
    wrapped = {
        "chain": (optax.chain(optax.clip(1.0), optax.chain(tx)), 4),
        "partition": (WRAPPERS["partition"](tx), 4),
        "masked bias": (optax.masked(tx, WITHOUT_BIAS), 3),
        "inject": (inject(kfqn.kbfgs, "groups"), 4),
    }
    for wrapper, dim in wrapped.values():
        state = wrapper.init(problem().params)
        warm = kfqn.warm_start(state, problem().value_and_grad, problem().params, batches)
        assert kinds(warm) == kinds(state)
        side = find_state(warm).inputs["Dense_0"]
        np.testing.assert_allclose(side.second_moment, expected[:dim, :dim], rtol=1e-5, atol=1e-6)
        assert side.phase == 1
        assert find_state(warm).count == 0
