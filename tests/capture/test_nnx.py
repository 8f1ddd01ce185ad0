"""NNX models: the same statistics, methods and promises as for linen, in the two styles NNX is written in.

The oracle is that of ``test_layers.py``: the Jacobian of a layer's outputs in its parameters shows every
row of its inputs. Layers are met by recording subclasses; copies under scan or vmap are written out.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_layers
import zoo
from flax import nnx

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit

LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose, nnx.Embed)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def wide():
    """Arguments of every layer in a float64 test."""
    return {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}


def built(make, seed=7):
    """The model ``make()``, with every parameter (biases too) drawn from a normal distribution."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if isinstance(leaf, nnx.RngKey):
            return jax.random.key(0)
        if isinstance(leaf, nnx.Param):
            return jnp.asarray(0.5 * rng.standard_normal(leaf.shape), leaf.dtype)
        return jnp.full(leaf.shape, isinstance(leaf, nnx.BatchStat), leaf.dtype)

    model = nnx.eval_shape(make)  # without the compilations of Flax's initialisers
    filled = [(path, fill(leaf)) for path, leaf in nnx.to_flat_state(nnx.state(model))]
    nnx.update(model, nnx.from_flat_state(filled))
    return model


def loss_of_call(model, *args):
    return zoo.loss_of(model(*args))


def quickly(function, *args):
    """``function(*args)``, compiled; what it does to the models among them happens to them."""
    nodes = [arg for arg in args if isinstance(arg, nnx.Pytree)]
    graphdef, state = nnx.split(nodes)

    @quick_jit
    def pure(state, arrays):
        copies = nnx.merge(graphdef, state)
        left = iter(copies), iter(arrays)
        outputs = function(*(next(left[not isinstance(arg, nnx.Pytree)]) for arg in args))
        return outputs, nnx.state(copies)

    outputs, state = pure(state, [arg for arg in args if not isinstance(arg, nnx.Pytree)])
    nnx.update(nodes, state)
    return outputs


def captured(model, *args, loss=loss_of_call, layers=None, **options):
    """Value, gradients and statistics, compiled."""
    value_and_grad = kfqn.value_and_grad(loss, layers or kfqn.find_layers(model, *args), **options)

    def capture(model, *args):
        value, grads, curvature = value_and_grad(model, *args)
        return value, grads, curvature.statistics

    return quickly(capture, model, *args)


def assert_equal(left, right):
    left, right = jax.tree.leaves(left), jax.tree.leaves(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def assert_close(left, right, rtol):
    left, right = jax.tree.leaves(left), jax.tree.leaves(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol, rtol)


# ---------------------------------------------------------------------------------------------- the oracle


class Spy:
    """What the recording layers share."""

    def __init__(self, shifts=None):
        self.calls, self.shifts = {}, shifts


def recording(cls):
    """A layer that notes inputs and outputs, and adds the shifts to the outputs."""

    class Recording(cls):
        def __call__(self, *args, **kwargs):
            outputs = super().__call__(*args, **kwargs)
            mine = self.spy.calls.setdefault(self.name, [])
            if self.spy.shifts is not None:
                outputs = outputs + self.spy.shifts[self.name][len(mine)]
            mine.append((args, outputs))
            return outputs

    return Recording


def recorded(model, loss, spy):
    """The loss of a copy of the model, whose layers tell the spy."""
    copy = nnx.clone(model)
    for path, module in nnx.iter_graph(copy):
        if isinstance(module, LAYERS):
            module.name, module.spy = "/".join(map(str, path)) or ".", spy
            module.__class__ = recording(type(module))
    return loss(copy)


def with_bias(module):
    """A function of the parameters alone, with a bias in any case, and their shapes."""
    module = nnx.clone(module)
    if hasattr(module, "bias") and module.bias is None:
        shape = (module.out_features,) if isinstance(module.out_features, int) else module.out_features
        module.bias, module.use_bias = nnx.Param(jnp.zeros(shape)), True
    graphdef, state = nnx.split(module)
    shapes = dict(nnx.to_flat_state(state))

    def apply(params, *args):
        state = nnx.from_flat_state([((name,), value) for name, value in params.items()])
        return nnx.merge(graphdef, state)(*args)

    return apply, {path[0]: leaf.shape for path, leaf in shapes.items()}


def jacobian_rows(model, loss, layers):
    """As ``test_layers.jacobian_rows``."""
    spy = Spy()
    recorded(model, loss, spy)
    zeros = {name: [jnp.zeros_like(h) for _, h in calls] for name, calls in spy.calls.items()}
    grads = jax.grad(lambda shifts: recorded(model, loss, Spy(shifts)))(zeros)
    modules = {"/".join(map(str, path)) or ".": module for path, module in nnx.iter_graph(model)}
    found = {}
    for layer in layers:
        apply, shapes = with_bias(modules[layer.name])
        found[layer.name] = []
        for (args, h), g in zip(spy.calls[layer.name], grads[layer.name], strict=True):
            zero = {k: jnp.zeros(shape, h.dtype) for k, shape in shapes.items()}
            derivatives = jax.jacfwd(apply)(zero, *args)
            flat = [
                derivatives[k].reshape(h.size, *shapes[k])
                for k in ("kernel", "embedding", "bias")
                if k in shapes
            ]
            as_matrix = jax.vmap(lambda kernel, bias=None, layer=layer: layer.get_matrix(kernel, bias))
            found[layer.name].append((as_matrix(*flat), h, g))
    return found


def check(cases, loss=loss_of_call):
    """Statistics of (make, args), before and in the second pass, for all cases in one jit."""
    cases = [(built(make), args) for make, args in cases]
    cases = [(model, args, kfqn.find_layers(model, *args)) for model, args in cases]
    rng = np.random.default_rng(2)
    all_vectors = [
        {layer.name: jnp.asarray(rng.standard_normal((*layer.copies, layer.rows))) for layer in layers}
        for _, _, layers in cases
    ]
    split = [nnx.split(model) for model, _, _ in cases]

    @quick_jit
    def run(states, all_vectors):
        results = []
        for (graphdef, _), state, (_, args, layers), vectors in zip(
            split, states, cases, all_vectors, strict=True
        ):
            model = nnx.merge(graphdef, state)
            _, _, curvature = kfqn.value_and_grad(loss, layers)(model, *args)
            after = curvature.after(optax.tree.zeros_like(curvature.params), vectors).statistics
            oracle = jacobian_rows(model, lambda model, args=args: loss(model, *args), layers)
            results.append((curvature.statistics, after, oracle))
        return results

    results = run([state for _, state in split], all_vectors)
    for (_, _, layers), vectors, (before, after, calls) in zip(cases, all_vectors, results, strict=True):
        assert len(layers) == len(calls)
        for layer in layers:
            wanted = test_layers.expected(layer, calls[layer.name], vectors[layer.name])
            test_layers.compare(after[layer.name], wanted, layer.name)
            wanted["product"] = np.zeros_like(wanted["product"])
            test_layers.compare(before[layer.name], wanted, layer.name)


normal = test_layers.normal


# ------------------------------------------------------------------------------------------- single layers


def test_linear_layers(float64):
    general = lambda *args, **kwargs: lambda: nnx.LinearGeneral(*args, **kwargs, **wide())
    check(
        [
            (lambda: nnx.Linear(4, 3, **wide()), (normal(5, 4),)),
            (lambda: nnx.Linear(4, 3, use_bias=False, **wide()), (normal(2, 3, 4),)),
            (general(4, (2, 3)), (normal(5, 4),)),
            (general((2, 4), 3, axis=(-2, -1), use_bias=False), (normal(5, 2, 4),)),
            (general((3, 4), (2, 2), axis=(-1, 1)), (normal(5, 3, 4),)),
            (general((2, 4), (3,), axis=(1, -1)), (normal(5, 2, 3, 4),)),
            (general(4, 3, batch_axis={0: 2}), (normal(2, 5, 4),)),
        ]
    )


def test_einsums(float64):
    einsum = lambda *args: lambda: nnx.Einsum(*args, **wide())
    check(
        [
            (einsum("bta,ahk->bthk", (4, 2, 3), (2, 3)), (normal(5, 2, 4),)),
            (einsum("...a,ak->...k", (4, 3), (3,)), (normal(5, 2, 4),)),
            (einsum("bthk,hkd->btd", (2, 4, 3), (3,)), (normal(3, 2, 2, 4),)),
            (einsum("b t a,k a->b k t", (3, 4), (3,)), (normal(3, 2, 4),)),
            (einsum("nta,hab->nthb", (2, 4, 3), (2, 3)), (normal(3, 2, 4),)),
            (einsum("bthk,hkd->bthd", (2, 4, 3), (2, 3)), (normal(3, 2, 2, 4),)),
        ]
    )


CONVOLUTIONS = {
    "paddings": [
        ((3, 2, (3,)), {"padding": padding}, (2, 5, 3))
        for padding in ("SAME", "VALID", "CIRCULAR", "CAUSAL", "REFLECT", 2, [(1, 2)])
    ],
    "strides and dilations": [
        ((3, 2, (3, 2)), {"strides": 2}, (2, 5, 4, 3)),
        ((3, 2, (2, 2)), {"kernel_dilation": 2, "padding": "VALID"}, (2, 5, 4, 3)),
        ((3, 2, (2, 2)), {"input_dilation": (2, 1), "padding": [(1, 0), (0, 1)]}, (2, 3, 2, 3)),
    ],
    "groups, batches and ranks": [
        ((4, 6, (3,)), {"feature_group_count": 2}, (2, 5, 4)),
        ((4, 8, (2, 2)), {"feature_group_count": 4, "use_bias": False}, (2, 3, 3, 4)),
        ((3, 2, (2, 2)), {}, (3, 3, 3)),
        ((3, 2, (2,)), {}, (2, 2, 4, 3)),
        ((2, 2, (2, 1, 2)), {}, (1, 3, 2, 3, 2)),
    ],
}
TRANSPOSED = [
    ((3, 2, (3,)), {"strides": 2}, (2, 4, 3)),
    ((3, 2, (3,)), {"strides": 2, "padding": "VALID", "transpose_kernel": True}, (2, 4, 3)),
    ((3, 2, (2, 2)), {"padding": "CIRCULAR", "use_bias": False}, (2, 3, 3, 3)),
    ((3, 2, (3,)), {"kernel_dilation": 2, "padding": [(1, 2)]}, (2, 4, 3)),
]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(float64, name):
    check(
        [
            (lambda a=args, k=kwargs: nnx.Conv(*a, **k, **wide()), (normal(*shape),))
            for args, kwargs, shape in CONVOLUTIONS[name]
        ]
    )


def test_transposed_convolutions(float64):
    check(
        [
            (lambda a=args, k=kwargs: nnx.ConvTranspose(*a, **k, **wide()), (normal(*shape),))
            for args, kwargs, shape in TRANSPOSED
        ]
    )


class Doubled(nnx.Linear):
    """Works on other rows than it is called with, and returns something else than the layer's output."""

    def __call__(self, inputs):
        return 3 * super().__call__(2 * inputs)


class Attending(nnx.Module):
    """Attention over embedded ids, and a layer that is called twice, once through another path."""

    def __init__(self):
        self.embed = nnx.Embed(5, 4, **wide())
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, **wide())
        self.twice = nnx.Linear(4, 4, **wide())
        self.blocks = nnx.List([self.twice, nnx.Linear(4, 3, use_bias=False, **wide())])

    def __call__(self, ids):
        x = self.twice(self.attention(self.embed(ids)))
        for block in self.blocks:
            x = jnp.tanh(block(x))
        return x


def test_attention_embeddings_and_shared_layers(float64):
    ids = jnp.asarray([[0, 1, 4], [4, 4, 2]])
    layers = kfqn.find_layers(nnx.eval_shape(Attending), ids)
    assert [(layer.name, layer.kind) for layer in layers] == [
        ("attention/key", "LinearGeneral"),
        ("attention/out", "LinearGeneral"),
        ("attention/query", "LinearGeneral"),
        ("attention/value", "LinearGeneral"),
        ("blocks/0", "Linear"),
        ("blocks/1", "Linear"),
        ("embed", "Embed"),
    ]
    check([(Attending, (ids,))])


def test_a_subclass_that_calls_super(float64):
    """The rows are those of the built-in layer, not those of the call around it."""
    model, x = built(lambda: Doubled(4, 3, **wide())), normal(5, 4)
    _, grads, statistics = captured(model, x)
    statistics = statistics["."]
    np.testing.assert_allclose(statistics.inputs[:-1], 2 * x.mean(0), 1e-14)
    np.testing.assert_allclose(statistics.preactivation_grads, grads["bias"][...], 1e-14)


# ----------------------------------------------------------------------------------------- transformations

WIDTH = 3


class Block(nnx.Module):
    def __init__(self, rngs, use_bias=True):
        self.fc = nnx.Linear(WIDTH, WIDTH, use_bias=use_bias, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.fc(x))


class Stack(nnx.Module):
    """Copies of a block stacked along an axis of their parameters, before another layer."""

    def __init__(self, run, axis=0, use_bias=True, length=2):
        make = lambda key: Block(nnx.Rngs(key), use_bias)
        self.blocks = nnx.vmap(make, out_axes=axis)(jax.random.split(jax.random.key(0), length))
        self.out = nnx.Linear(WIDTH, 2, **wide())
        self.run, self.axis, self.length = run, axis, length

    def __call__(self, x):
        return self.out(self.run(self.blocks, x, self.axis))


class Unrolled(nnx.Module):
    """The same as a Python loop."""

    def __init__(self, stack, chained=True):
        graphdef, state = nnx.split(stack.blocks)
        take = lambda i: jax.tree.map(lambda leaf: jnp.take(leaf, i, axis=stack.axis), state)
        self.blocks = nnx.List([nnx.merge(graphdef, take(i)) for i in range(stack.length)])
        self.out, self.chained = nnx.clone(stack.out), chained

    def __call__(self, x):
        if not self.chained:
            return self.out(jnp.stack([block(x[i]) for i, block in enumerate(self.blocks)]))
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def scanned(blocks, x, axis):
    return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, axis), out_axes=nnx.Carry)(x, blocks)


def scanned_with_state_axes(blocks, x, axis):
    axes = nnx.StateAxes({nnx.Param: axis, ...: None})
    return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)(x, blocks)


def scanned_rematerialised(blocks, x, axis):
    body = nnx.remat(lambda x, block: block(x))
    return nnx.scan(body, in_axes=(nnx.Carry, axis), out_axes=nnx.Carry)(x, blocks)


def scanned_functionally(blocks, x, axis):
    graphdef, state = nnx.split(blocks)
    state = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, axis, 0), state)
    return jax.lax.scan(lambda x, state: (nnx.merge(graphdef, state)(x), None), x, state)[0]


def mapped(blocks, x, axis):
    return nnx.vmap(lambda block, x: block(x), in_axes=(axis, 0))(blocks, x)


STACKS = {
    "scan": (scanned, 0, True),
    "scan, without bias": (scanned, 0, False),
    "scan, axis 1": (scanned, 1, True),
    "scan, last axis": (scanned, -1, True),
    "scan, StateAxes": (scanned_with_state_axes, 0, True),
    "scan of remat": (scanned_rematerialised, 0, True),
    "jax.lax.scan over the state": (scanned_functionally, 0, True),
    "vmap": (mapped, 0, True),
    "vmap, axis 1, without bias": (mapped, 1, False),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacked_copies(float64, name):
    run, axis, use_bias = STACKS[name]
    chained = run is not mapped
    x = normal(4, WIDTH) if chained else normal(2, 4, WIDTH)
    model = built(lambda: Stack(run, axis, use_bias))
    layers = kfqn.find_layers(model, x)
    assert layers == kfqn.find_layers(model)
    assert layers["blocks/fc"].stack == (2,)
    plain = Unrolled(model, chained)
    plain_layers = kfqn.find_layers(plain, x)
    graphdef, state = nnx.split(model)

    @quick_jit
    def run_both(state):
        model = nnx.merge(graphdef, state)
        value, grads, curvature = kfqn.value_and_grad(loss_of_call, layers)(model, x)
        reference = nnx.value_and_grad(loss_of_call)(model, x)
        calls = jacobian_rows(plain, lambda model: loss_of_call(model, x), plain_layers)
        return value, grads, curvature.statistics, reference, calls

    value, grads, statistics, reference, calls = run_both(state)
    assert_close((value, grads), reference, 1e-14)
    copies = [
        test_layers.expected(layer, calls[layer.name], np.zeros(layer.rows)) for layer in plain_layers
    ]
    *copies, out = copies
    test_layers.compare(statistics["out"], out, "out")
    together = {field: np.stack([copy[field] for copy in copies]) for field in out}
    test_layers.compare(statistics["blocks/fc"], together, "blocks/fc")


def jitted(blocks, x, axis):
    return nnx.jit(lambda block, x: block(x))(blocks, x)


def rematerialised(blocks, x, axis):
    return nnx.remat(lambda block, x: block(x))(blocks, x)


def mapped_shared(blocks, x, axis):
    return nnx.vmap(lambda block, x: block(x), in_axes=(None, 0))(blocks, x)


def chosen(blocks, x, axis):
    return nnx.cond(x.sum() < 100, lambda block, x: block(x), lambda block, x: 2 * x, blocks, x)


def called(blocks, x, axis):
    return blocks(x)


class Single(nnx.Module):
    def __init__(self, run):
        self.blocks, self.out = Block(nnx.Rngs(0)), nnx.Linear(WIDTH, 2, **wide())
        self.run = run

    def __call__(self, x):
        return self.out(self.run(self.blocks, x, 0))


@pytest.mark.parametrize("run", [jitted, rematerialised, mapped_shared, chosen])
def test_transformed_calls(float64, run):
    """The same statistics as without the transformation."""
    model, x = built(lambda: Single(run)), normal(4, WIDTH)
    plain = built(lambda: Single(called))
    before = model(x)  # where a trace is cached, it must not be used for the tapped loss
    for _ in range(1 + (run is jitted)):
        assert kfqn.find_layers(model, x) == kfqn.find_layers(plain, x)
        ours = captured(model, x)
        assert_equal(model(x), before)
    assert_close(ours, captured(plain, x), 1e-13)


class Recurrent(nnx.Module):
    def __init__(self):
        self.rnn = nnx.RNN(nnx.GRUCell(WIDTH, 4, rngs=nnx.Rngs(0)))
        self.out = nnx.Linear(4, 2, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.out(self.rnn(x))


def test_recurrent_cells_sum_over_time():
    model, x = built(Recurrent), jnp.asarray(normal(2, 5, WIDTH), jnp.float32)
    _, grads, statistics = captured(model, x)
    assert len(statistics) == 3
    statistics = statistics["rnn/cell/dense_i"]
    assert statistics.rows == 10
    bias = grads["rnn"]["cell"]["dense_i"]["bias"][...]
    np.testing.assert_allclose(statistics.preactivation_grads, bias, 1e-5, 1e-6)


# ------------------------------------------------------------------------------- what happens to the model


class Noisy(nnx.Module):
    """Batch statistics and a random stream, both changed by every call."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def noisy():
    model, x = built(Noisy), jnp.asarray(normal(6, 4), jnp.float32)
    return model, x, kfqn.find_layers(model, x)


@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit], ids=["inside jax.jit", "inside nnx.jit"])
def test_the_model_changes_as_with_nnx_value_and_grad(jit):
    model, x, layers = noisy()
    other, untouched = nnx.clone(model), nnx.clone(model)
    kfqn.find_layers(model, x)
    assert_equal(nnx.state(model), nnx.state(untouched))
    value_and_grad = kfqn.value_and_grad(loss_of_call, layers)

    @jit
    def ours(model, x):
        value, grads, curvature = value_and_grad(model, x)
        zeros = optax.tree.zeros_like(curvature.params)
        return value, grads, curvature.statistics, curvature.after(zeros).statistics

    run = quickly if jit is not nnx.jit else lambda function, *args: function(*args)
    value, grads, statistics, after = run(ours, model, x)
    expected = run(jit(nnx.value_and_grad(loss_of_call)), other, x)
    assert isinstance(grads, nnx.State)
    assert jax.tree.structure(grads) == jax.tree.structure(expected[1])
    assert_close((value, grads), expected, 1e-6)
    assert_close(nnx.state(model, nnx.BatchStat), nnx.state(other, nnx.BatchStat), 1e-6)
    assert_equal(nnx.state(model, nnx.RngState), nnx.state(other, nnx.RngState))
    assert nnx.split(model)[0] == nnx.split(untouched)[0]
    assert model.dropout.rngs.count[...] == 1
    # The second pass draws what the first one drew, though the counts have moved on.
    assert_close(statistics, after, 1e-5)


@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="this Flax has the graph mode only")
def test_the_tree_mode_of_nnx():
    model, x, layers = noisy()
    other = nnx.clone(model)
    expected = captured(model, x)
    with nnx.set_graph_mode(False):
        assert kfqn.find_layers(other, x) == layers
        assert_equal(captured(other, x), expected)
    assert_equal(nnx.state(other), nnx.state(model))


def test_random_streams_and_metrics_among_the_arguments():
    """They go on once, by the first pass, and share streams with the model where the user shares them."""
    model, x, _ = noisy()
    rngs = nnx.Rngs(dropout=3)
    metric = nnx.metrics.Average()

    def loss(model, x, *, rngs, metric, scale):
        value = scale * zoo.loss_of(model.last(nnx.Dropout(0.5)(model.first(x), rngs=rngs)))
        metric.update(values=value)
        return value, "not an array"

    model.eval()
    value_and_grad = kfqn.value_and_grad(loss, kfqn.find_layers(model, x), has_aux=True)

    def both(model, x, rngs, metric):
        (value, aux), _, curvature = value_and_grad(model, x, rngs=rngs, metric=metric, scale=2.0)
        assert aux == "not an array"
        return (
            value,
            curvature.statistics,
            curvature.after(optax.tree.zeros_like(curvature.params)).statistics,
        )

    value, statistics, after = quickly(both, model, x, rngs, metric)
    assert_close(after, statistics, 1e-6)
    assert rngs.dropout.count[...] == 1
    np.testing.assert_allclose(metric.compute(), value, 1e-6)


def test_arguments_of_the_loss_may_be_anything():
    model, x, layers = noisy()
    model.eval()
    loss = lambda model, batch, name, function, nothing: function(model(batch[0]["x"]))
    value_and_grad = kfqn.value_and_grad(loss, layers)

    def both(model, x):
        value, _, curvature = value_and_grad(model, [{"x": x}], "name", jnp.sum, None)
        return value, curvature.after(optax.tree.zeros_like(curvature.params)).statistics

    value, _ = quickly(both, model, x)
    np.testing.assert_allclose(value, model(x).sum(), 1e-5)


def test_a_loss_that_fails_leaves_the_model_as_it_was():
    model, x, layers = noisy()
    before = nnx.split(nnx.clone(model))

    def loss(model, x):
        model(x)
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        nnx.jit(kfqn.value_and_grad(loss, layers))(model, x)
    assert nnx.split(model)[0] == before[0]
    assert_equal(nnx.state(model), before[1])


# ------------------------------------------------------------------------------------------------ training

METHODS = {
    "kbfgs": lambda layers: kfqn.kbfgs(0.1, layers),
    "kbfgs_l": lambda layers: kfqn.kbfgs_l(0.1, layers, memory=3),
    "kfqn": lambda layers: kfqn.kfqn(0.1, layers),
    "kfac": lambda layers: kfqn.kfac(0.1, layers, inverse_every=2),
}


class Net(nnx.Module):
    """A convolution, scanned blocks and a head; the same as ``LinenNet``."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 3, (3,), rngs=rngs)
        self.fc = nnx.Linear(3, 4, rngs=rngs)
        self.head = nnx.LinearGeneral((5, 4), 2, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.fc(jnp.tanh(self.conv(x)))))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(3, (3,), name="conv")(x))
        x = jnp.tanh(nn.Dense(4, name="fc")(x))
        return nn.DenseGeneral(2, axis=(-2, -1), name="head")(x)


def net():
    model, x = built(lambda: Net(nnx.Rngs(0))), jnp.asarray(normal(6, 5, 1), jnp.float32)
    return model, x, kfqn.find_layers(model, x)


def regression(outputs, x):
    return jnp.mean((outputs - x.sum((1, 2))[:, None]) ** 2)


def step(tx, value_and_grad, params, opt_state, *args):
    loss, grads, curvature = value_and_grad(params, *args)
    updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
    return optax.apply_updates(params, updates), opt_state, loss


@pytest.mark.parametrize("method", METHODS)
def test_training_in_both_styles_is_the_same(method):
    model, x, layers = net()
    tx = METHODS[method](layers)
    graphdef, params, rest = nnx.split(nnx.clone(model), nnx.Param, ...)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    of_model = kfqn.value_and_grad(lambda model, x: regression(model(x), x), layers)
    of_params = kfqn.value_and_grad(
        lambda params, rest, x: regression(kfqn.merge(graphdef, params, rest)(x), x), layers
    )
    nodes, state = nnx.split((model, optimizer))

    @quick_jit
    def train(state, params, opt_state):
        model, optimizer = nnx.merge(nodes, state)
        loss, grads, curvature = of_model(model, x)
        optimizer.update(model, grads, curvature=curvature)
        after, state = nnx.split((model, optimizer))
        assert after == nodes
        params, opt_state, other_loss = step(tx, of_params, params, opt_state, rest, x)
        return (state, params, opt_state), (loss, other_loss)

    carry, losses = (state, params, tx.init(params)), []
    for _ in range(25):
        carry, both = train(*carry)
        np.testing.assert_allclose(both[1], both[0], 1e-4)
        losses.append(both[0])
    assert losses[-1] < 0.9 * losses[0]
    assert train._cache_size() == 1
    state, params, _ = carry
    assert_close(nnx.state(nnx.merge(nodes, state)[0], nnx.Param), params, 1e-3)


def test_updates_are_those_of_the_same_model_in_linen(float64):
    model, linen, x = built(lambda: Net(nnx.Rngs(0))), LinenNet(), jnp.asarray(normal(6, 5, 1))
    nnx.update(model, jax.tree.map(jnp.float64, nnx.state(model)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    layers, linen_layers = kfqn.find_layers(model, x), kfqn.find_layers(linen, {"params": params}, x)
    of_model = kfqn.value_and_grad(lambda model, x: regression(model(x), x), layers)
    apply = lambda params, x: linen.apply({"params": params}, x)
    of_params = kfqn.value_and_grad(lambda params, x: regression(apply(params, x), x), linen_layers)
    tx, linen_tx = kfqn.kfqn(0.1, layers), kfqn.kfqn(0.1, linen_layers)
    graphdef, state = nnx.split(model)

    @quick_jit
    def update(state, opt_state):
        model = nnx.merge(graphdef, state)
        _, grads, curvature = of_model(model, x)
        state = nnx.state(model)
        return curvature.statistics, *tx.update(grads, opt_state, state, curvature=curvature)

    @quick_jit
    def update_linen(params, opt_state):
        _, grads, curvature = of_params(params, x)
        return curvature.statistics, *linen_tx.update(grads, opt_state, params, curvature=curvature)

    opt_state, linen_state = tx.init(state), linen_tx.init(params)
    for _ in range(2):
        statistics, updates, opt_state = update(state, opt_state)
        linen_statistics, linen_updates, linen_state = update_linen(params, linen_state)
        assert_close(statistics, linen_statistics, 1e-12)
        assert_close(updates, linen_updates, 1e-9)
        state, params = optax.apply_updates(state, updates), optax.apply_updates(params, linen_updates)


def test_one_compilation_of_a_step_in_nnx_jit():
    model, x = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), jnp.ones((6, 4))
    layers, traces = kfqn.find_layers(model), []
    value_and_grad = kfqn.value_and_grad(loss_of_call, layers)
    optimizer = nnx.Optimizer(model, kfqn.kbfgs(0.1, layers), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer, x):
        traces.append("")
        loss, grads, curvature = value_and_grad(model, x)
        optimizer.update(model, grads, curvature=curvature)
        return loss

    losses = [train(model, optimizer, x) for _ in range(3)]
    assert len(traces) == 1
    assert losses[2] < losses[0]


def test_optimizer_state_goes_through_the_package_functions():
    model, x = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), jnp.asarray(normal(6, 4), jnp.float32)
    layers = kfqn.find_layers(model)
    value_and_grad = kfqn.value_and_grad(loss_of_call, layers)
    tx = optax.chain(optax.clip_by_global_norm(1.0), kfqn.kbfgs(0.1, layers))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = jax.tree.map(jnp.array, nnx.state(model, nnx.Param))
    warm = kfqn.warm_start(optimizer.opt_state, value_and_grad, model, [x, 2 * x])
    assert warm is optimizer.opt_state
    assert_equal(nnx.state(model, nnx.Param), params)
    moment = optimizer.opt_state[1][0].inputs["."].second_moment[...]
    np.testing.assert_allclose(moment[:4, :4], 2.5 * x.T @ x / 6, 1e-5, 1e-5)
    of_params = kfqn.warm_start(tx.init(params), value_and_grad, model, [x, 2 * x])
    assert jax.tree.structure(of_params) == jax.tree.structure(tx.init(params))
    assert_close(warm, of_params, 1e-6)

    def train(model, optimizer, x):
        _, grads, curvature = value_and_grad(model, x)
        optimizer.update(model, grads, curvature=curvature)

    quickly(train, model, optimizer, x)
    diagnostics = kfqn.diagnostics(optimizer.opt_state)
    assert isinstance(diagnostics["count"], jax.Array)
    assert diagnostics["count"] == 1
    assert diagnostics["layers"]["."]["output"]["taken"] == 1


def test_an_optimizer_for_some_of_the_layers():
    model, x, layers = noisy()
    value_and_grad = kfqn.value_and_grad(loss_of_call, layers)
    mask = jax.tree.map_with_path(lambda path, _: path[0].key == "last", nnx.state(model, nnx.Param))
    tx = optax.masked(kfqn.kbfgs(0.1, layers), mask)

    def train(model, x):
        params = nnx.state(model, nnx.Param)
        _, grads, curvature = value_and_grad(model, x)
        return grads, *tx.update(grads, tx.init(params), params, curvature=curvature)

    grads, updates, state = quickly(train, model, x)
    assert list(kfqn.diagnostics(state)["layers"]) == ["last"]
    assert_equal(updates["first"], grads["first"])


# ------------------------------------------------------------------------------------ the functional style


def test_the_functional_style_through_transformations_of_the_loss(float64):
    model, x = built(lambda: Single(called)), normal(4, WIDTH)
    layers = kfqn.find_layers(model, x)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, x):
        return loss_of_call(kfqn.merge(graphdef, params, rest), x)

    def per_example(params, rest, x):
        one = lambda x: jax.checkpoint(jax.jit(loss))(params, rest, x[None])
        return jax.vmap(one)(x).mean()

    def capture(loss, params, *args):
        value, grads, curvature = kfqn.value_and_grad(loss, layers)(params, *args)
        moved = curvature.after(optax.tree.ones_like(curvature.params)).statistics
        return value, grads, curvature.statistics, moved

    @quick_jit
    def run(params, rest, x):
        model = nnx.merge(graphdef, params, rest)
        reference = capture(loss_of_call, model, x)
        return capture(loss, params, rest, x), capture(per_example, params, rest, x), reference

    functional, mapped, reference = run(params, rest, x)
    assert isinstance(functional[1], nnx.State)
    assert jax.tree.structure(functional[1]) == jax.tree.structure(params)
    assert_close(functional, reference, 1e-13)
    assert_close(mapped, reference, 1e-13)


def test_states_of_several_models():
    rngs = nnx.Rngs(0)
    encoder, decoder = nnx.Linear(3, 2, rngs=rngs), nnx.Sequential(nnx.Linear(2, 3, rngs=rngs))
    layers = kfqn.join_layers({"in": kfqn.find_layers(encoder), "out": kfqn.find_layers(decoder)})
    first, second = nnx.split(encoder), nnx.split(decoder)

    def loss(params, x):
        code = kfqn.merge(first[0], params["in"])(x)
        return zoo.loss_of(kfqn.merge(second[0], params["out"])(code))

    params = {"in": first[1], "out": second[1]}
    value_and_grad = kfqn.value_and_grad(loss, layers)
    statistics = quick_jit(lambda params: value_and_grad(params, jnp.ones((5, 3)))[2].statistics)(params)
    assert [(name, one.rows) for name, one in statistics.items()] == [("in", 5), ("out/layers/0", 5)]


def test_new_batch_statistics_in_the_functional_style():
    model, x, layers = noisy()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, x):
        model = kfqn.merge(graphdef, params, rest)
        return loss_of_call(model, x), nnx.state(model, nnx.Not(nnx.Param))

    value_and_grad = kfqn.value_and_grad(loss, layers, has_aux=True)
    new = quick_jit(lambda params, rest: value_and_grad(params, rest, x)[0][1])(params, rest)
    quickly(nnx.grad(loss_of_call), model, x)
    assert_close(nnx.state(new, nnx.BatchStat), nnx.state(model, nnx.BatchStat), 1e-6)
    assert new["dropout"]["rngs"]["count"][...] == 1
    assert nnx.split(kfqn.merge(graphdef, params, rest))[0] == graphdef


def test_plain_merge_captures_nothing():
    x = noisy()[1]
    graphdef, params, rest = nnx.split(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Param, ...)
    layers = kfqn.find_layers(nnx.merge(graphdef, params, rest), x)
    loss = lambda params, x: loss_of_call(nnx.merge(graphdef, params, rest), x)
    with pytest.raises(ValueError, match=r"no call of the layers \['.'\].*kfqn.merge"):
        kfqn.value_and_grad(loss, layers)(params, x)


# ------------------------------------------------------------------------------- options of value_and_grad


def test_options(float64):
    """forward and weights, against the plain capture."""
    model, x = built(lambda: Single(called)), normal(4, WIDTH)
    _, grads, plain = captured(model, x)
    forward = lambda model, x: model(x)
    _, other_grads, other = captured(model, x, forward=forward)
    assert_close(other_grads, grads, 1e-13)
    for field in ("inputs", "preactivation_grads", "second_moment"):
        of_field = lambda all_layers, field=field: [getattr(one, field) for one in all_layers.values()]
        assert_close(of_field(other), of_field(plain), 1e-13)

    def tangent_loss(model, x):
        graphdef, state = nnx.split(model)
        apply = lambda x: nnx.merge(graphdef, state)(x)
        return zoo.loss_of(jax.jvp(apply, (x,), (x,))[1])

    value, grads, _ = captured(model, x, loss=tangent_loss, forward=forward)
    assert_close((value, grads), quickly(nnx.value_and_grad(tangent_loss), model, x), 1e-13)
    with pytest.raises((TypeError, NotImplementedError)) as caught:
        captured(model, x, loss=tangent_loss)
    assert "forward=" in "".join(caught.value.__notes__)

    def weighted(model, x):
        with kfqn.weights(jnp.asarray([1.0, 0.0, 1.0, 1.0])):
            return zoo.loss_of(model(x)[jnp.asarray([0, 2, 3])])

    *_, padded = captured(model, x, loss=weighted)
    assert_close(padded, captured(model, x[jnp.asarray([0, 2, 3])])[2], 1e-13)


def test_bfloat16_modules_have_float32_statistics():
    rngs, dtype = nnx.Rngs(0), jnp.bfloat16
    model = nnx.Sequential(
        nnx.Conv(1, 2, (3,), dtype=dtype, rngs=rngs),
        nnx.LinearGeneral(2, (2, 2), dtype=dtype, rngs=rngs),
        nnx.Linear(2, 3, dtype=dtype, param_dtype=dtype, rngs=rngs),
    )
    x = jnp.ones((600, 2, 1))
    loss = lambda model, x: model(x).astype(jnp.float32).sum()
    _, grads, statistics = captured(model, x, loss=loss)
    assert {leaf.dtype for leaf in jax.tree.leaves(statistics)} == {jnp.dtype(jnp.float32)}
    assert statistics["layers/0"].rows == 1200
    assert_equal(statistics["layers/2"].preactivation_grads, 2400 * jnp.ones(3))
    assert grads["layers"][2]["kernel"][...].dtype == dtype


# --------------------------------------------------------------------------------------------- find_layers


class Holding(nnx.Module):
    """A layer that has a rule, and ``odd``."""

    def __init__(self, odd):
        self.odd, self.fc = odd, nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.fc(self.odd(x))


class OwnParameter(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(4))

    def __call__(self, x):
        return x * self.scale[...][None]


class Uncalled(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return x


class OwnCall(nnx.Linear):
    def __call__(self, inputs):
        return jnp.dot(inputs, self.kernel[...])


def frozen():
    layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Variable(layer.kernel[...])
    return layer


def tied():
    first, second = (nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(i)) for i in range(2))
    second.kernel = first.kernel
    return nnx.Sequential(first, second)


def reequated(x):
    class Model(nnx.Module):
        def __init__(self):
            self.einsum = nnx.Einsum("bi,ij->bj", (4, 4), rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.einsum(x, "bi,ji->bj")

    return Model()


ODD = {
    "norm": (lambda: nnx.LayerNorm(4, rngs=nnx.Rngs(0)), "no rule for LayerNorm", 2),
    "parameter": (OwnParameter, "no rule for OwnParameter", 1),
    "LoRA": (lambda: nnx.LoRA(4, 2, 4, rngs=nnx.Rngs(0)), "no rule for LoRA", 2),
    "mask": (
        lambda: nnx.Conv(4, 4, (1,), mask=np.ones((1, 4, 4)), rngs=nnx.Rngs(0)),
        "Conv with a mask over its kernel",
        2,
    ),
    "not called": (Uncalled, "belongs to no layer that this call runs", 2),
    "own call": (lambda: OwnCall(4, 4, rngs=nnx.Rngs(0)), "belongs to no layer that this call runs", 2),
    "frozen kernel": (frozen, "Linear whose kernel is no nnx.Param of its own", 1),
    "tied kernels": (tied, "Linear sharing its kernel with odd/layers/1", 1),
    "another equation": (lambda: reequated(None), "Einsum called with another equation, 'bi,ji->bj'", 1),
    "ellipsis in the kernel": (
        lambda: nnx.Einsum("b...,...d->bd", (4, 4), rngs=nnx.Rngs(0)),
        "Einsum with the equation 'b...,...d->bd'",
        1,
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_has_no_rule_is_listed_and_takes_the_momentum_gradient(name):
    make, reason, count = ODD[name]
    # The mask is an array, but no variable.
    model = Holding(make()) if name == "mask" else built(lambda: Holding(make()))
    x = jnp.asarray(normal(5, 4), jnp.float32)
    if name == "ellipsis in the kernel":
        model.odd.bias = None
    layers = kfqn.find_layers(model, x)
    assert [layer.name for layer in layers] == ["fc"]
    assert [why for _, _, why in layers.others] == [reason] * count
    assert reason.split()[0] in str(layers)
    with pytest.raises(ValueError, match="strict=True"):
        kfqn.find_layers(model, x, strict=True)
    tx = kfqn.kbfgs(0.1, layers, step_rule=None, others_decay=None)
    value_and_grad = kfqn.value_and_grad(loss_of_call, layers)

    def train(model, x):
        params = nnx.state(model, nnx.Param)
        _, grads, curvature = value_and_grad(model, x)
        updates, state = tx.update(grads, tx.init(params), params, curvature=curvature)
        return grads["odd"], updates["odd"], state

    if name not in ("norm", "not called", "tied kernels"):  # the same computation for all
        graphdef, state = nnx.split(model)
        jax.eval_shape(lambda state: train(nnx.merge(graphdef, state), x), state)
        return
    grads, updates, state = quickly(train, model, x)
    assert kfqn.diagnostics(state)["rejected"] == 0
    assert_close(updates, jax.tree.map(lambda g: -0.1 * 0.1 * g, grads), 1e-6)


def test_lora_beside_a_linear_layer():
    model, x = nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0)), jnp.ones((5, 4))
    layers = kfqn.find_layers(model, x)
    assert [layer.name for layer in layers] == ["."]
    assert {why for _, _, why in layers.others} == {"no rule for LoRA"}
    assert captured(model, x)[2]["."].rows == 5


@pytest.mark.skipif(not hasattr(nnx, "WeightNorm"), reason="this Flax has no WeightNorm")
def test_layers_inside_weight_norm_are_listed():
    inner = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    model = Holding(nnx.WeightNorm(inner, rngs=nnx.Rngs(0)))
    layers = kfqn.find_layers(model, jnp.ones((5, 4)))
    assert [layer.name for layer in layers] == ["fc"]
    assert "Linear inside nnx.WeightNorm" in {why for _, _, why in layers.others}


def test_a_bias_that_is_not_trained_is_left_alone():
    layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    layer.bias = nnx.Variable(layer.bias[...])
    layers = kfqn.find_layers(layer, jnp.ones((5, 4)))
    assert not layers["."].use_bias


def test_shapes_and_methods_will_do():
    """Nothing is computed: shapes for the example, and for the model too."""
    make = lambda: Net(nnx.Rngs(0))
    shape = jax.ShapeDtypeStruct((6, 5, 1), jnp.float32)
    model, x, layers = net()
    assert kfqn.find_layers(model, shape) == layers
    assert kfqn.find_layers(nnx.eval_shape(make), shape) == layers
    assert layers["conv"].positions == 5
    rows = jnp.ones((2, 3))
    assert [layer.name for layer in kfqn.find_layers(model, rows, method=lambda m, x: m.fc(x))] == ["fc"]
    embed = nnx.Embed(5, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no layer that can be preconditioned"):
        kfqn.find_layers(embed, jnp.ones((2, 4)), method="attend")
    before = nnx.split(model)
    kfqn.find_layers(model, x)
    assert nnx.split(model)[0] == before[0]
    assert_equal(nnx.split(model)[1], before[1])


def test_errors_of_find_layers():
    model, x, _ = net()
    with pytest.raises(ValueError, match=r"convolutions \['conv'\].*find_layers\(model, images\)"):
        kfqn.find_layers(model)
    with pytest.raises(TypeError, match=r"flax.linen.Module or a flax.nnx.Module, got the class"):
        kfqn.find_layers(Net, x)
    with pytest.raises(TypeError) as caught:
        kfqn.find_layers(model, x, train=True)
    assert "as your loss does" in "".join(caught.value.__notes__)
    with pytest.raises(ValueError, match="no layer that can be preconditioned"):
        kfqn.find_layers(OwnParameter(), jnp.ones((5, 4)))
    other = kfqn.find_layers(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((5, 4)))
    with pytest.raises(ValueError, match="has a parameter 'kernel'"):
        kfqn.value_and_grad(loss_of_call, other)(model, x)
