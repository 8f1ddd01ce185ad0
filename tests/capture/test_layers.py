"""Statistics of every kind of layer are those of the rows that its Jacobian shows.

A layer is linear in its parameters, so the Jacobian of its outputs in them holds every row of inputs:
in matrix form, the derivative of output o of group g at one row is that row in column o of matrix g, and
zero elsewhere. A bias tells which g and o an element of the output belongs to.
"""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo

import kfqn_optax as kfqn
from kfqn_optax._capture.parameters import get_matrices, set_matrices
from kfqn_optax.bench._quick import quick_jit

LAYERS = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvTranspose, nn.Embed)
PARAMETERS = ("kernel", "embedding", "bias")


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


# ---------------------------------------------------------------------------------------------- the oracle


@contextlib.contextmanager
def recording(calls, shifts=None):
    """Note inputs and outputs of every layer; add the shifts to the outputs."""

    def interceptor(call, args, kwargs, context):
        outputs, module = call(*args, **kwargs), context.module
        if context.method_name != "__call__" or not isinstance(module, LAYERS):
            return outputs
        mine = calls.setdefault("/".join(module.path) or ".", [])
        if shifts is not None:
            outputs = outputs + shifts["/".join(module.path) or "."][len(mine)]
        mine.append((module.clone(parent=None), args, outputs))
        return outputs

    with nn.intercept_methods(interceptor):
        yield


def jacobian_rows(loss, params, layers):
    """For each layer a list of calls: derivatives in the parameters, as matrices; outputs; dL/dh."""
    calls = {}
    with recording(calls):
        loss(params)

    def shifted(shifts):
        with recording({}, shifts):
            return loss(params)

    zeros = {name: [jnp.zeros_like(h) for *_, h in found] for name, found in calls.items()}
    grads = jax.grad(shifted)(zeros)
    found = {}
    for layer in layers:
        found[layer.name] = []
        for (module, args, h), g in zip(calls[layer.name], grads[layer.name], strict=True):
            if hasattr(module, "use_bias"):
                module = module.clone(use_bias=True)
            shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
            apply = lambda params, module=module, args=args: module.apply({"params": params}, *args)
            zero = {k: jnp.zeros(v.shape, h.dtype) for k, v in shapes.items()}
            derivatives = jax.jacfwd(apply)(zero)
            flat = {
                k: derivatives[k].reshape(h.size, *shapes[k].shape) for k in PARAMETERS if k in derivatives
            }
            as_matrix = jax.vmap(lambda kernel, bias=None, layer=layer: layer.get_matrix(kernel, bias))
            found[layer.name].append((as_matrix(*flat.values()), h, g))
    return found


def rows_of(layer, matrices, h, g):
    """Rows (groups, n, d_in [+ 1]) of inputs, and (groups, n, d_out) of outputs and gradients."""
    groups, out = layer.groups, layer.out_dim
    matrices = np.asarray(matrices).reshape(h.size, groups, -1, out)
    if layer.kind == "Embed":
        place = np.tile(np.eye(out), (h.size // out, 1))[:, None]
    else:
        place = matrices[:, :, -1, :]
    assert ((place == 0) | (place == 1)).all()
    assert (place.sum((1, 2)) == 1).all()
    assert (place.sum(0) == h.size / (groups * out)).all()
    assert (matrices == matrices * place[:, :, None, :]).all()
    pick = lambda array: np.stack(
        [
            np.stack([array(np.flatnonzero(place[:, i, o]), i, o) for o in range(out)], -1)
            for i in range(groups)
        ]
    )
    inputs = pick(lambda e, i, o: matrices[e, i, :, o])
    assert (inputs == inputs[..., :1]).all()
    inputs = inputs[..., 0]
    if layer.kind != "Embed" and not layer.use_bias:
        inputs = inputs[..., :-1]
    flat = lambda x: pick(lambda e, i, o: np.asarray(x).ravel()[e])
    return inputs, flat(h), flat(g)


def expected(layer, calls, vector):
    """The statistics as they should be, by field."""
    rows = [rows_of(layer, *call) for call in calls]
    a, h, g = (np.concatenate(parts, axis=1) for parts in zip(*rows, strict=True))
    n = a.shape[1]
    moment = np.einsum("gni,gnj->gij", a, a) / n
    fields = {
        "rows": np.full(len(a), n),
        "inputs": a.mean(1),
        "squares": (a**2).mean(1),
        "preactivations": h.mean(1),
        "preactivation_grads": g.sum(1),
        "product": np.einsum("gij,gj->gi", moment, np.asarray(vector).reshape(len(a), -1)),
        "grad_moment": np.einsum("gni,gnj->gij", g, g) * n / layer.positions,
        "grad_squares": (g**2).sum(1) * n / layer.positions,
    }
    if layer.has_second_moment or layer.has_patches_moment:
        fields["second_moment"] = moment
    return fields if layer.groups > 1 else {k: v[0] for k, v in fields.items()}


def check(cases):
    """All of a layer's statistics, before and in the second pass, for (loss, params, layers) in one jit."""

    @quick_jit
    def run(all_params, all_vectors):
        results = []
        for (loss, _, layers), params, vectors in zip(cases, all_params, all_vectors, strict=True):
            _, _, curvature = kfqn.value_and_grad(loss, layers)(params)
            after = curvature.after(optax.tree.zeros_like(params), vectors).statistics
            oracle = jacobian_rows(loss, params, layers)
            results.append((curvature.statistics, after, oracle, through_matrices(layers, params)))
        return results

    rng = np.random.default_rng(2)
    all_vectors = [
        {layer.name: jnp.asarray(rng.standard_normal((*layer.copies, layer.rows))) for layer in layers}
        for _, _, layers in cases
    ]
    results = run([params for _, params, _ in cases], all_vectors)
    for (_, params, layers), vectors, result in zip(cases, all_vectors, results, strict=True):
        before, after, calls, same_params = result
        jax.tree.map(np.testing.assert_array_equal, same_params, params)
        assert len(layers) == len(calls)
        for layer in layers:
            wanted = expected(layer, calls[layer.name], vectors[layer.name])
            compare(after[layer.name], wanted, layer.name)
            wanted["product"] = np.zeros_like(wanted["product"])
            compare(before[layer.name], wanted, layer.name)


def through_matrices(layers, params):
    """The parameters put together again from the layers' matrices."""
    rest = {path for path, _, _ in layers.others}
    blank = lambda keys, leaf: (
        leaf if tuple(key.key for key in keys) in rest else jnp.full_like(leaf, np.nan)
    )
    return set_matrices(layers, jax.tree.map_with_path(blank, params), get_matrices(layers, params))


def compare(ours, wanted, name):
    """One layer's statistics, to rounding in float64."""
    for field, reference in wanted.items():
        value = getattr(ours, field)
        assert value.shape == reference.shape, f"{field} of {name}"
        atol = 1e-12 * max(1, np.abs(reference).max())
        np.testing.assert_allclose(value, reference, 0, atol, err_msg=f"{field} of {name}")
    assert (ours.second_moment is None) == ("second_moment" not in wanted)


def made(model, *args, **kwargs):
    """A loss of the parameters alone, parameters drawn at random, and the layers found."""
    params = random_params(model, *args)
    layers = kfqn.find_layers(model, {"params": params}, *args, **kwargs)
    return lambda params: zoo.loss_of(model.apply({"params": params}, *args, **kwargs)), params, layers


def random_params(model, *args):
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return zoo.randomise(jax.eval_shape(model.init, keys, *args), jnp.float64)["params"]


def normal(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape))


# ------------------------------------------------------------------------------------------- single layers

CONVOLUTIONS = {
    "1d": [
        (nn.Conv(2, (3,), padding=padding), (2, 5, 3))
        for padding in ("SAME", "VALID", "CIRCULAR", "CAUSAL", "REFLECT", 2, [(1, 2)])
    ]
    + [
        (nn.Conv(2, 3, strides=2, kernel_dilation=2, padding="CAUSAL", use_bias=False), (2, 7, 3)),
        (nn.Conv(2, 3, kernel_dilation=2, padding="CIRCULAR"), (7, 3)),
    ],
    "2d": [
        (nn.Conv(2, (3, 2)), (2, 4, 3, 2)),
        (nn.Conv(2, (3, 2), strides=(2, 1), padding="VALID", use_bias=False), (2, 5, 4, 2)),
        (nn.Conv(2, (3, 2), strides=2, kernel_dilation=(1, 2), padding="CIRCULAR"), (2, 4, 4, 2)),
        (nn.Conv(2, (2, 2), input_dilation=2, padding=1), (1, 3, 3, 2)),
        (nn.Conv(2, (2, 2), padding=[(0, 1), (2, 0)]), (1, 3, 3, 2)),
        (nn.Conv(2, (2, 2)), (3, 3, 2)),
        (nn.Conv(2, (2, 2), use_bias=False), (2, 1, 2, 3, 3, 2)),
    ],
    "groups": [
        (nn.Conv(6, (3, 2), feature_group_count=2), (2, 4, 3, 4)),
        (nn.Conv(3, (3, 3), feature_group_count=3, use_bias=False), (2, 3, 3, 3)),
        (nn.Conv(6, (2, 2), strides=2, feature_group_count=3), (2, 4, 4, 3)),
        (nn.Conv(4, 3, feature_group_count=2, padding="CIRCULAR"), (2, 2, 5, 2)),
    ],
    "3d": [
        (nn.Conv(2, (2, 3, 2), strides=2), (1, 4, 3, 4, 2)),
        (
            nn.Conv(2, (2, 1, 2), kernel_dilation=(1, 2, 1), padding="VALID", use_bias=False),
            (1, 2, 3, 3, 1),
        ),
    ],
    "transpose": [
        (nn.ConvTranspose(3, (3, 2), strides=(2, 1)), (2, 3, 2, 2)),
        (nn.ConvTranspose(2, (3, 3), strides=(2, 2), padding="VALID", use_bias=False), (1, 2, 2, 3)),
        (nn.ConvTranspose(2, (3, 2), strides=(2, 2), padding="CIRCULAR"), (1, 3, 2, 2)),
        (nn.ConvTranspose(2, (5,), strides=(2,), padding="CIRCULAR", transpose_kernel=True), (2, 2, 3)),
        (nn.ConvTranspose(3, (3,), strides=(2,), transpose_kernel=True), (2, 3, 2)),
        (nn.ConvTranspose(3, (3,), kernel_dilation=(2,), padding=[(1, 2)], transpose_kernel=True), (3, 2)),
    ],
}

GENERAL = [
    (nn.DenseGeneral(3), (2, 4)),
    (nn.DenseGeneral((2, 3)), (2, 3, 4)),
    (nn.DenseGeneral((2, 3), use_bias=False), (4,)),
    (nn.DenseGeneral(3, axis=(-2, -1)), (2, 3, 2, 4)),
    (nn.DenseGeneral((3, 2), axis=(1, -1)), (2, 3, 2, 4)),
    (nn.DenseGeneral((3, 2), axis=(-1, 1)), (2, 3, 2, 4)),
    (nn.DenseGeneral(3, axis=0), (4, 2)),
    (nn.DenseGeneral(3, batch_dims=0), (2, 3, 4)),
    (nn.DenseGeneral((3, 2), axis=(-1, 2), batch_dims=(0,), use_bias=False), (2, 3, 2, 4)),
    (nn.DenseGeneral((3, 2), axis=-1, batch_dims=(0, 1)), (2, 3, 2, 4)),
    (nn.DenseGeneral(2, axis=-2, batch_dims=(1, 0)), (2, 3, 2, 4)),
]

EINSUMS = [
    (nn.Einsum((4, 2, 3), "bta,ahk->bthk"), (2, 3, 4)),
    (nn.Einsum((4, 3), "...a,ak->...k"), (2, 1, 2, 4)),
    (nn.Einsum((4, 3), "... a , a k -> ... k", use_bias=False), (4,)),
    (nn.Einsum((2, 3, 4), "bthk,hkd->btd"), (2, 3, 2, 3)),
    (nn.Einsum((3, 2, 4), "bthk,khd->btd", use_bias=False), (2, 3, 2, 3)),
    (nn.Einsum((2, 3, 4), "bthk,hkd->bthd"), (2, 3, 2, 3)),  # a kernel for every head
    (nn.Einsum((4, 2, 3), "b...hk,dhk->d...bh"), (2, 2, 2, 3)),
    (nn.Einsum((3, 4), "bta,ka->bkt"), (2, 3, 4)),
    (nn.Einsum((3, 2, 4, 2), "btah,khac->chbkt"), (2, 3, 4, 2)),
    (nn.Einsum((2, 3), "gi,gi->g"), (2, 3)),
    (nn.Einsum((2, 3), "big,gi->bg"), (4, 3, 2)),
]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(float64, name):
    check([made(module, normal(*shape)) for module, shape in CONVOLUTIONS[name]])


@pytest.mark.parametrize("name", ["general", "einsum"])
def test_dense_general_and_einsum(float64, name):
    cases = GENERAL if name == "general" else EINSUMS
    check([made(module, normal(*shape)) for module, shape in cases])


# --------------------------------------------------------------------------------- layers made of layers


class Tied(nn.Module):
    """Token and position embeddings; the first one is the head too."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(5, 3, name="tokens")
        x = embed(ids) + nn.Embed(4, 3, name="positions")(jnp.arange(ids.shape[1]))[None]
        return embed.attend(jnp.tanh(nn.Dense(3)(x)))


class Unrolled(nn.Module):
    """What nn.RNN does, in a Python loop."""

    cell: nn.Module

    @nn.compact
    def __call__(self, x):
        carry = self.cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
        outputs = []
        for t in range(x.shape[1]):
            carry, y = self.cell(carry, x[:, t])
            outputs.append(y)
        return jnp.stack(outputs, axis=1)


class SelfAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[..., 0])
        settings = {"num_heads": 2, "qkv_features": 4, "dropout_rate": 0.3, "deterministic": False}
        x = x + nn.MultiHeadDotProductAttention(**settings, name="own")(x, mask=mask)
        settings = {"num_heads": 2, "use_bias": False, "normalize_qk": True}
        return nn.MultiHeadDotProductAttention(**settings, name="cross")(x, x[:, :2])


class Called(nn.Module):
    """One convolution on two images of different sizes, and on its own output."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Conv(2, (2, 2), name="conv")
        return layer(jnp.tanh(layer(x))).mean((1, 2)) + layer(x[:, :1]).mean((1, 2))


IDS = np.array([[0, 1, 1, 4], [3, 1, 0, 0]])


def test_attention_embeddings_and_shared_layers(float64):
    attention = made(SelfAttention(), normal(2, 3, 4), rngs={"dropout": jax.random.key(5)})
    names = [f"{a}/{part}" for a in ("own", "cross") for part in ("query", "key", "value", "out")]
    assert sorted(layer.name for layer in attention[2]) == sorted(names)
    assert {path[:2] for path, _, _ in attention[2].others} == {("cross", "query_ln"), ("cross", "key_ln")}
    tied = made(Tied(), jnp.asarray(IDS))
    assert [layer.name for layer in tied[2]] == ["Dense_0", "positions", "tokens"]
    check([attention, tied, made(Called(), normal(2, 3, 3, 2))])


CELLS = {
    "lstm": (nn.LSTMCell(2, param_dtype="float64"), (2, 2, 3)),
    "gru": (nn.GRUCell(2, param_dtype="float64"), (2, 2, 3)),
}


@pytest.mark.parametrize("name", CELLS)
def test_recurrent_cells(float64, name):
    """By hand against the Jacobians, and nn.RNN against the same by hand."""
    cell, shape = CELLS[name]
    by_hand, x = Unrolled(cell), normal(*shape)
    case = made(by_hand, x)
    check([case])
    loss, params, layers = case
    rnn = nn.RNN(cell)
    assert kfqn.find_layers(rnn, {"params": params}, x).found == layers.found
    rnn_loss = lambda params: zoo.loss_of(rnn.apply({"params": params}, x))
    captured = lambda loss: lambda params: kfqn.value_and_grad(loss, layers)(params)[2].statistics
    assert_close(*quick_jit(lambda p: (captured(rnn_loss)(p), captured(loss)(p)))(params))


def assert_close(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-10, 1e-12), left, right)


# ------------------------------------------------------------------------------- lifted transformations


class Mixed(nn.Module):
    """One layer of every kind, (batch, length, 4) to the same shape, in the form of a scan's body."""

    @nn.compact
    def __call__(self, x, _):
        x = nn.Conv(4, 3, feature_group_count=2, name="grouped")(x)
        x = nn.ConvTranspose(4, (3,), transpose_kernel=True, name="up")(jnp.tanh(x))
        x = nn.DenseGeneral((2, 2), name="split")(jnp.tanh(x))
        x = nn.Einsum((2, 2, 2), "blhi,hij->bljh", use_bias=False, name="mix")(jnp.tanh(x))
        return jnp.tanh(nn.DenseGeneral(4, axis=(-2, -1), name="merge")(x)), None


def one_after_another(axis):
    def unrolled(params, x):
        for i in range(2):
            x, _ = Mixed().apply({"params": zoo.at(params, i, axis)}, x, None)
        return x

    return unrolled


def side_by_side(axis):
    def unrolled(params, x):
        copies = [params if axis is None else zoo.at(params, i, axis) for i in range(2)]
        return jnp.stack([Mixed().apply({"params": copies[i]}, x[i], None)[0] for i in range(2)])

    return unrolled


def scanned(axis, body=Mixed):
    return nn.scan(body, variable_axes={"params": axis}, split_rngs={"params": True}, length=2)()


def mapped(axis):
    split = {"params": axis is not None}
    return nn.vmap(Mixed, in_axes=(0, None), variable_axes={"params": axis}, split_rngs=split)()


LIFTED = {
    "scan, axis 0": (scanned(0), one_after_another(0), (1, 3, 4)),
    "scan, axis 1, remat": (scanned(1, nn.remat(Mixed)), one_after_another(1), (1, 3, 4)),
    "vmap, axis -1": (mapped(-1), side_by_side(-1), (2, 1, 3, 4)),
    "vmap, shared": (mapped(None), side_by_side(None), (2, 1, 3, 4)),
}


@pytest.mark.parametrize("name", LIFTED)
def test_copies_under_lifted_transformations(float64, name):
    model, unrolled, shape = LIFTED[name]
    shared, x = name.endswith("shared"), normal(*shape)
    params = random_params(model, x, None)
    layers = kfqn.find_layers(model, {"params": params}, x, None)
    one = kfqn.find_layers(
        Mixed(), {"params": random_params(Mixed(), normal(1, 3, 4), None)}, normal(1, 3, 4), None
    )
    loss = lambda params: zoo.loss_of(model.apply({"params": params}, x, None)[0])
    rng = np.random.default_rng(2)
    vectors = {
        layer.name: jnp.asarray(rng.standard_normal((*layer.copies, layer.rows))) for layer in layers
    }

    @quick_jit
    def run(params, vectors):
        _, _, curvature = kfqn.value_and_grad(loss, layers)(params)
        oracle = jacobian_rows(lambda params: zoo.loss_of(unrolled(params, x)), params, one)
        return curvature.after(optax.tree.zeros_like(params), vectors).statistics, oracle

    statistics, calls = run(params, vectors)
    for layer in one:
        vector, found = vectors[layer.name], calls[layer.name]
        if shared:
            wanted = expected(layer, found, vector)
        else:
            copies = [expected(layer, [call], v) for call, v in zip(found, vector, strict=True)]
            wanted = {field: np.stack([copy[field] for copy in copies]) for field in copies[0]}
        compare(statistics[layer.name], wanted, layer.name)
    jax.tree.map(np.testing.assert_array_equal, through_matrices(layers, params), params)


# ------------------------------------------------------------------------------------- what has no rule


class Wrapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(2))(x)


MASK = np.ones((2, 4, 2))

UNSUPPORTED = {
    "local": (nn.ConvLocal(2, 2), "ConvLocal has weights of its own at every position"),
    "masked": (nn.Conv(2, 2, mask=MASK), "Conv with a mask over its kernel"),
    "masked transpose": (nn.ConvTranspose(2, (2,), mask=MASK), "ConvTranspose with a mask over its kernel"),
    "weight norm": (Wrapped(), "Dense inside nn.map_variables, nn.WeightNorm or the like"),
    "rows summed": (
        nn.Einsum((4, 2), "abc,cd->ad", use_bias=False),
        "Einsum with the equation 'abc,cd->ad'",
    ),
    "kernel summed": (nn.Einsum((4, 2, 3), "abc,cde->abd", use_bias=False), "Einsum with the equation"),
    "diagonal": (
        nn.Einsum((4, 4), "abc,cc->abc", use_bias=False),
        "Einsum with the equation 'abc,cc->abc'",
    ),
    "ellipsis in the kernel": (nn.Einsum((4, 3), "ab...,...d->abd", use_bias=False), "Einsum with the"),
    "recurrent": (nn.RNN(nn.OptimizedLSTMCell(2)), "no rule for DenseParams"),
}


class WithHead(nn.Module):
    odd: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(self.odd(x).reshape(x.shape[0], -1))


def odd_model(name):
    model, x = (
        WithHead(UNSUPPORTED[name][0]),
        jnp.asarray(np.cos(np.arange(24)).reshape(2, 3, 4), jnp.float32),
    )
    return model, x, jax.eval_shape(model.init, jax.random.key(0), x)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_layer_without_a_rule_is_listed_with_the_reason(name):
    model, x, variables = odd_model(name)
    layers = kfqn.find_layers(model, variables, x)
    assert [layer.name for layer in layers] == ["head"]
    reasons = [why for path, _, why in layers.others if path[-1] == "kernel"]
    assert reasons
    assert all(UNSUPPORTED[name][1] in why for why in reasons), reasons
    assert "diagonal factor" in str(layers)
    with pytest.raises(ValueError, match=r"strict=True[\s\S]*" + reasons[0].split()[0]):
        kfqn.find_layers(model, variables, x, strict=True)


@pytest.mark.parametrize("name", ["masked", "weight norm"])
def test_a_layer_without_a_rule_takes_the_momentum_gradient(name):
    model, x, variables = odd_model(name)
    params = zoo.randomise(variables)["params"]
    layers = kfqn.find_layers(model, variables, x)
    loss = lambda params: zoo.loss_of(model.apply({"params": params}, x))
    tx = kfqn.kbfgs(0.1, layers, step_rule=None, others_decay=None)

    @quick_jit
    def step(params):
        value, grads, curvature = kfqn.value_and_grad(loss, layers)(params)
        updates, _ = tx.update(grads, tx.init(params), params, curvature=curvature)
        return grads, updates, value - loss(optax.apply_updates(params, updates))

    grads, updates, fall = step(params)
    assert fall > 0
    grads, updates = (jax.tree.leaves(tree["odd"]) for tree in (grads, updates))
    for g, u in zip(grads, updates, strict=True):
        np.testing.assert_allclose(u, -0.1 * (1 - 0.9) * g, rtol=1e-5)


# ------------------------------------------------------------------------------------ rows with weights


class Sequence(nn.Module):
    """Embedding, attention, convolution with zeros for what is padded, dense layers, a grouped einsum."""

    @nn.compact
    def __call__(self, ids, mask):
        x = nn.Embed(5, 4)(ids)
        attend = nn.MultiHeadDotProductAttention(2)
        x = attend(x, mask=nn.make_attention_mask(mask, mask))
        x = nn.Conv(4, 3)(jnp.tanh(x) * mask[..., None])
        x = nn.Einsum((2, 2, 3), "blhi,hio->blho")(jnp.tanh(x).reshape(*x.shape[:-1], 2, 2))
        x = nn.DenseGeneral(3, axis=(-2, -1))(jnp.tanh(x))
        pooled = (x * mask[..., None]).sum(1) / mask.sum(1)[:, None]
        return x, nn.Dense(2, name="head")(jnp.tanh(pooled))


def test_padding_does_not_count(float64):
    """Three more tokens and one more sequence, of weight 0, change no statistic."""
    ids = jnp.asarray(IDS)
    padded, weights = (jnp.pad(array, [(0, 1), (0, 3)]) for array in (ids, jnp.ones(ids.shape)))
    mask = weights.at[2].set(1)  # a sequence without tokens would be 0/0
    params = random_params(Sequence(), padded, mask)
    layers = kfqn.find_layers(Sequence(), {"params": params}, padded, mask)
    assert len(layers) == 9

    def loss(params, ids, mask, weights):
        tokens, pooled = Sequence().apply({"params": params}, ids, mask)
        return jnp.sum(jnp.cos(tokens) * weights[..., None]) / weights.sum() + zoo.loss_of(pooled[:2])

    def weighted(*args):
        with kfqn.weights(args[-1]):
            return loss(*args)

    @quick_jit
    def run(params):
        captured = lambda loss, *args: kfqn.value_and_grad(loss, layers)(params, *args)[2].statistics
        short = (ids, jnp.ones(ids.shape), jnp.ones(ids.shape))
        return captured(loss, *short), captured(weighted, *short), captured(weighted, padded, mask, weights)

    without, ones, with_padding = run(params)
    assert without["Embed_0"].rows == 8
    assert without["head"].rows == 2
    assert_close(without, ones)
    assert_close(without, with_padding)


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, 2, feature_group_count=2, name="conv")(x)
        return nn.Dense(2, name="dense")(jnp.tanh(x))


@pytest.mark.parametrize("axes", [1, 2])
def test_a_weight_of_two_is_a_row_seen_twice(float64, axes):
    x, model, counts = normal(3, 4, 2), Small(), np.array([1, 0, 2])
    params = random_params(model, x)
    layers = kfqn.find_layers(model, {"params": params}, x)
    twice = jnp.asarray(np.repeat(x, counts, axis=0))
    weights = jnp.broadcast_to(jnp.asarray(counts)[:, None], (3, 4)) if axes == 2 else jnp.asarray(counts)

    def loss(params, x, counts):
        outputs = jnp.cos(model.apply({"params": params}, x))
        return (outputs * counts[:, None, None]).sum() / 24

    def weighted(*args):
        with kfqn.weights(weights):
            return loss(*args)

    @quick_jit
    def run(params):
        captured = lambda loss, *args: kfqn.value_and_grad(loss, layers)(params, *args)[2].statistics
        return captured(loss, twice, jnp.ones(3)), captured(weighted, x, jnp.asarray(counts))

    left, right = run(params)
    # A gradient has its weight already, so that it is counted once in sums of squares.
    moments = lambda s: {
        name: value._replace(grad_moment=None, grad_squares=None) for name, value in s.items()
    }
    assert_close(moments(left), moments(right))


def test_weights_of_another_shape_raise():
    x, model = jnp.ones((3, 4, 2)), Small()
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables["params"])
    layers = kfqn.find_layers(model, variables, x)

    def loss(params):
        with kfqn.weights(jnp.ones((4, 3))):
            return model.apply({"params": params}, x).sum()

    with pytest.raises(
        ValueError, match=r"weights of shape \(4, 3\) do not fit .* rows have shape \(3, 4\)"
    ):
        kfqn.value_and_grad(loss, layers)(params)
    assert jnp.isfinite(model.apply({"params": params}, x)).all()  # and nothing is left behind


def test_weights_inside_a_mapped_loss_count_every_example():
    model, x = nn.Dense(2), jnp.ones((5, 3, 4))
    params = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    )
    layers = kfqn.find_layers(model, {"params": params}, x)

    def loss(params):
        with kfqn.weights(jnp.array([1.0, 0.0, 1.0])):
            return jax.vmap(lambda x: model.apply({"params": params}, x).sum())(x).mean()

    statistics = quick_jit(lambda p: kfqn.value_and_grad(loss, layers)(p)[2].statistics["."])(params)
    assert statistics.rows == 10
    np.testing.assert_allclose(statistics.inputs, 1)


MASK = np.arange(3)[None] < 1 + np.arange(5)[:, None] % 3


def tokens(wrap):
    """The loss of the tokens that a mask leaves; ``wrap`` changes a function of (params, x)."""
    model, x = nn.Dense(2), jnp.asarray(np.random.default_rng(0).standard_normal((5, 3, 4)), jnp.float32)
    apply = wrap(lambda params, x: model.apply({"params": params}, x))

    def loss(params, mask):
        with kfqn.weights(mask):
            return (mask[..., None] * apply(params, x) ** 2).sum()

    params = model.init(jax.random.key(0), x)["params"]
    return loss, params, kfqn.find_layers(model, {"params": params}, x), x


WRAPPED = {
    "plain": lambda apply: apply,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "vmap": lambda apply: jax.vmap(apply, (None, 0)),
    "vmap of vmap": lambda apply: jax.vmap(jax.vmap(apply, (None, 0)), (None, 0)),
    "vmap of jit": lambda apply: jax.vmap(jax.jit(apply), (None, 0)),
    "jit of vmap of checkpoint": lambda apply: jax.jit(jax.vmap(jax.checkpoint(apply), (None, 0))),
    "cond": lambda apply: lambda params, x: jax.lax.cond(x.sum() < 1e9, apply, apply, params, x),
    "scan": lambda apply: (
        lambda params, x: jax.lax.scan(
            lambda total, _: (total + apply(params, x), None), jnp.zeros((5, 3, 2)), length=1
        )[0]
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_in_every_transformation(name):
    """Twice with the same function, jitted and not: each call has its own mask."""
    loss, params, layers, x = tokens(WRAPPED[name])
    for compiled in (False, True):
        captured = lambda mask: kfqn.value_and_grad(loss, layers)(params, mask)[2].statistics["."]
        for mask in (MASK, MASK[::-1] & (np.arange(5) > 0)[:, None]):
            mask = jnp.asarray(mask, jnp.float32)
            statistics = (quick_jit(captured) if compiled else captured)(mask)
            rows = np.concatenate([np.asarray(x), np.ones((5, 3, 1))], -1)[np.asarray(mask) > 0]
            assert statistics.rows == len(rows)
            np.testing.assert_allclose(statistics.second_moment, rows.T @ rows / len(rows), 1e-5, 1e-6)


def test_weights_of_each_mapped_call():
    loss, params, layers, x = tokens(lambda apply: apply)
    model = nn.Dense(2)

    def mapped(params, mask):
        def one(x, mask):
            with kfqn.weights(mask):
                return (mask[:, None] * model.apply({"params": params}, x) ** 2).sum()

        return jax.vmap(one)(x, mask).sum()

    mask = jnp.asarray(MASK, jnp.float32)
    left, right = (kfqn.value_and_grad(f, layers)(params, mask)[2].statistics["."] for f in (mapped, loss))
    assert left.rows == right.rows == MASK.sum()
    np.testing.assert_allclose(left.second_moment, right.second_moment, 1e-6)


def test_weights_that_may_be_of_either_axis_are_an_error():
    model, x = nn.Dense(2), jnp.ones((3, 3, 4))
    params = model.init(jax.random.key(0), x)["params"]
    layers = kfqn.find_layers(model, {"params": params}, x)

    def loss(params):
        with kfqn.weights(jnp.ones(3)):
            return jax.vmap(lambda x: model.apply({"params": params}, x))(x).sum()

    with pytest.raises(ValueError, match=r"\(3,\) may be those of an axis.*with all axes, \(3, 3\)"):
        kfqn.value_and_grad(loss, layers)(params)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.RNN(nn.GRUCell(4))(x))


def hand_written(params, x):
    """A dense layer in a loop of the loss's own."""
    cell = nn.Dense(4)
    body = lambda carry, row: (jnp.tanh(cell.apply({"params": params}, carry) + row),) * 2
    return jax.lax.scan(body, jnp.zeros((5, 4)), x.swapaxes(0, 1))[1]


@pytest.mark.parametrize("kind", ["flax", "by hand"])
def test_weights_of_steps_that_a_loop_makes_are_an_error(kind):
    x, mask = jnp.ones((5, 3, 4)), jnp.asarray(MASK, jnp.float32)
    model, given = (Recurrent(), x) if kind == "flax" else (nn.Dense(4), x[:, 0])
    params = model.init(jax.random.key(0), given)["params"]
    layers = kfqn.find_layers(model, {"params": params}, given)
    apply = (lambda p, x: model.apply({"params": p}, x)) if kind == "flax" else hand_written

    def loss(params, mask):
        with kfqn.weights(mask):
            return (apply(params, x) ** 2).sum()

    with pytest.raises(ValueError, match=r"\(5, 3\).*in a loop.*recurrent"):
        kfqn.value_and_grad(loss, layers)(params, mask)
    kfqn.value_and_grad(loss, layers)(params, mask[:, 0])  # one weight an example is told apart
