"""find_layers runs nothing, finds every dense layer, and accounts for every parameter exactly once."""

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit

FLAT = jax.ShapeDtypeStruct((2, 6), jnp.float32)
SEQUENCE = jax.ShapeDtypeStruct((2, 4, 6), jnp.float32)
IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
IDS = jax.ShapeDtypeStruct((2, 4), jnp.int32)


def shapes_of(model, *args, **kwargs):
    """The variables of a model as shapes."""
    return jax.eval_shape(lambda *args: model.init(jax.random.key(0), *args, **kwargs), *args)


def names(layers):
    return [layer.name for layer in layers]


def reasons(layers):
    return {"/".join(path): reason for path, _, reason in layers.others}


def assert_accounts_for(layers, params):
    """Every leaf is in a layer or in ``others``, once, with its shape."""
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(flax.core.unfreeze(params)))
    expected = {tuple(key.key for key in keys): leaf.shape for keys, leaf in leaves}
    listed = [item for layer in layers for item in layer.parameter_shapes.items()]
    listed += [(path, shape) for path, shape, _ in layers.others]
    assert len(listed) == len(expected)
    assert dict(listed) == expected
    assert all(reason for _, _, reason in layers.others)


# ------------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("name", zoo.CASES)
def test_every_dense_layer_of_the_zoo_is_found_from_shapes_alone(name):
    case = zoo.CASES[name]
    x = jax.ShapeDtypeStruct(case.shape, jnp.float32)
    variables = shapes_of(case.model, x)
    layers = kfqn.find_layers(case.model, variables, x)
    assert_accounts_for(layers, variables["params"])
    assert not layers.others
    params, x = case.example()
    assert kfqn.find_layers(case.model, {"params": params}, x) == layers
    calls = jax.eval_shape(lambda params, x: zoo.probe(case.plain_loss, params, x), params, x)[0]
    copies = {}
    for (layer, copy), ((inputs, outputs), *_) in calls.items():
        copies.setdefault(layer, []).append(copy)
        assert (layers[layer].in_dim, layers[layer].out_dim) == (inputs.shape[-1], outputs.shape[-1])
    for layer, indices in copies.items():
        assert layers[layer].stack == tuple(length + 1 for length in max(indices))


def test_nothing_is_computed():
    """A layer whose kernel would take 4 TB, and a model that would fail if it ran on numbers."""
    ran = []

    class Huge(nn.Module):
        @nn.compact
        def __call__(self, x):
            ran.append(isinstance(x, jax.core.Tracer))
            return nn.Dense(10**6)(x)

    x = jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)
    layers = kfqn.find_layers(Huge(), shapes_of(Huge(), x), x)
    assert (layers["Dense_0"].in_dim, layers["Dense_0"].out_dim) == (10**6, 10**6)
    kfqn.find_layers(zoo.Mlp(), {"params": zoo.MLP.example()[0]}, np.ones((6, 4)))
    assert all(ran)


def test_layers_of_a_model_that_is_one_layer():
    layers = kfqn.find_layers(nn.Dense(3), shapes_of(nn.Dense(3), FLAT), FLAT)
    (layer,) = layers
    assert (layer.name, layer.path, layer.kind, layer.use_bias) == (".", (), "Dense", True)
    assert (layer.in_dim, layer.out_dim, layer.rows, layer.stack) == (6, 3, 7, ())
    assert layer.parameter_shapes == {("kernel",): (6, 3), ("bias",): (3,)}
    assert layers["."] is layer


def test_the_search_changes_nothing_and_finds_the_same_again():
    model = zoo.Setup()
    variables = flax.core.freeze({"params": zoo.CASES["setup"].example()[0]})
    before = jax.tree.leaves(variables)
    layers = kfqn.find_layers(model, variables, jnp.ones((6, 4)))
    assert all(a is b for a, b in zip(jax.tree.leaves(variables), before, strict=True))
    assert kfqn.find_layers(model, flax.core.unfreeze(variables), jnp.ones((6, 4))) == layers
    bound = model.bind(variables)
    assert bound(jnp.ones((6, 4))).shape == (6, 2)


def test_stacked_copies_and_where_they_are():
    case = zoo.CASES["scan in scan, axes 0 and 1"]
    x = jax.ShapeDtypeStruct(case.shape, jnp.float32)
    layer = kfqn.find_layers(case.model, shapes_of(case.model, x), x)["blocks/inner/fc"]
    assert (layer.stack, layer.in_dim, layer.out_dim) == ((3, 2), 4, 4)
    assert layer.kernel_shape == (3, 4, 2, 4)
    assert layer.bias_shape == (3, 4, 2)


# ---------------------------------------------------------------------------------------- what is left over


class Odd(nn.Module):
    """One layer that is found, and every way not to be."""

    @nn.compact
    def __call__(self, x, train=False):
        gain = self.param("gain", nn.initializers.ones, ())
        x = nn.LayerNorm()(x) * gain
        if train:
            x = x + nn.Dense(6, name="only_in_training")(x)
        elif self.is_initializing():
            nn.Dense(6, name="only_in_training")(x)
        return nn.Dense(2, name="head")(OwnDense(6, name="own")(x))


class OwnDense(nn.Dense):
    """Has a kernel, and computes something of its own with it."""

    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))
        return jnp.dot(inputs, 2 * kernel)


def test_leftover_parameters_are_listed_with_the_reason():
    variables = shapes_of(Odd(), FLAT)
    layers = kfqn.find_layers(Odd(), variables, FLAT)
    assert names(layers) == ["head"]
    assert_accounts_for(layers, variables["params"])
    why = reasons(layers)
    assert "LayerNorm" in why["LayerNorm_0/scale"]
    assert "OwnDense" in why["own/kernel"]
    assert "this call" in why["only_in_training/kernel"]
    assert set(why) == {
        "gain",
        "LayerNorm_0/scale",
        "LayerNorm_0/bias",
        "own/kernel",
        "only_in_training/kernel",
        "only_in_training/bias",
    }


def test_the_table_shows_layers_leftovers_and_reasons():
    layers = kfqn.find_layers(Odd(), shapes_of(Odd(), FLAT), FLAT)
    table = str(layers)
    lines = {line.split()[0]: line for line in table.splitlines() if line.split()}
    assert "layers of Odd" in table
    assert lines["head"].split()[1:6] == ["Dense", "6", "+", "1", "2"]
    for path, shape, reason in layers.others:
        assert str(shape) in lines["/".join(path)]
        assert reason in lines["/".join(path)]


def test_the_table_of_a_model_with_nothing_left_over():
    case = zoo.CASES["scan, axis 0, without bias"]
    x = jax.ShapeDtypeStruct(case.shape, jnp.float32)
    layers = kfqn.find_layers(case.model, shapes_of(case.model, x), x)
    table = str(layers)
    assert "diagonal factor" not in table
    row = next(line.split() for line in table.splitlines() if "blocks/fc" in line)
    assert row[:5] == ["blocks/fc", "Dense", "4", "4", "2"]  # no bias, two copies


def test_strict_raises_for_any_leftover():
    variables = shapes_of(Odd(), FLAT)
    with pytest.raises(ValueError, match="strict=True") as raised:
        kfqn.find_layers(Odd(), variables, FLAT, strict=True)
    assert "LayerNorm_0/scale" in str(raised.value)
    assert "kfqn.find_layers" in str(raised.value)
    kfqn.find_layers(zoo.Mlp(), shapes_of(zoo.Mlp(), FLAT), FLAT, strict=True)


@pytest.mark.parametrize(
    ("max_dim", "with_moment"), [(7, ["Dense_0", "Dense_1"]), (6, ["Dense_1"]), (3, [])]
)
def test_max_dim_bounds_the_second_moment_that_is_kept(max_dim, with_moment):
    """By the length of the homogeneous inputs: 7 and 4, with the biases."""
    model = nn.Sequential([nn.Dense(3), nn.Dense(2)])
    variables = shapes_of(model, FLAT)
    layers = kfqn.find_layers(model, variables, FLAT, max_dim=max_dim)
    renamed = {"layers_0": "Dense_0", "layers_1": "Dense_1"}
    assert_accounts_for(layers, variables["params"])
    assert [renamed[layer.name] for layer in layers if layer.has_second_moment] == with_moment


# ------------------------------------------------------------------------------------ arguments of the call


class Picky(nn.Module):
    """Needs what the call is given, by name and by position."""

    def setup(self):
        self.inner = nn.Dense(3)
        self.head = nn.Dense(2)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm()

    def __call__(self, x, scale, *, train):
        x = self.norm(self.inner(scale * x), use_running_average=not train)
        return self.head(self.dropout(x, deterministic=not train))

    def features(self, x):
        return self.inner(x)


def test_arguments_pass_through_to_the_model():
    model = Picky()
    variables = shapes_of(model, FLAT, FLAT, train=False)
    dropout = {"dropout": jax.random.key(0)}
    layers = kfqn.find_layers(model, variables, FLAT, FLAT, train=True, rngs=dropout)
    assert names(layers) == ["head", "inner"] or names(layers) == ["inner", "head"]
    assert_accounts_for(layers, variables["params"])
    for mutable in ("batch_stats", ["batch_stats"], True):
        again = kfqn.find_layers(model, variables, FLAT, FLAT, train=True, rngs=dropout, mutable=mutable)
        assert again == layers
    for scale in (2, 2.0, np.float32(2), jnp.ones(())):  # a number may be static
        assert kfqn.find_layers(model, variables, FLAT, scale, train=False) == layers


@pytest.mark.parametrize("method", ["features", Picky.features])
def test_only_layers_of_the_given_method_are_found(method):
    variables = shapes_of(Picky(), FLAT, FLAT, train=False)
    layers = kfqn.find_layers(Picky(), variables, FLAT, method=method)
    assert names(layers) == ["inner"]
    assert_accounts_for(layers, variables["params"])
    assert "this call" in reasons(layers)["head/kernel"]


def test_a_missing_key_says_that_find_layers_was_tracing():
    variables = shapes_of(Picky(), FLAT, FLAT, train=False)
    with pytest.raises(Exception, match="dropout") as raised:
        kfqn.find_layers(Picky(), variables, FLAT, FLAT, train=True)
    assert any("kfqn.find_layers" in note and "rngs" in note for note in raised.value.__notes__)


# ------------------------------------------------------------------------ layers that cannot be, or may not


class Weighted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.WeightNorm(nn.Dense(3, name="bound"))(x))


class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        bound = nn.SpectralNorm(nn.Dense(3, name="bound"))
        return nn.Dense(2, name="head")(bound(x, update_stats=train))


def twice(variables):
    return jax.tree.map(lambda leaf: 2 * leaf, variables)


def half(variables):
    return jax.tree.map(lambda leaf: leaf / 2, variables)


class Mapped(nn.Module):
    """A layer that sees twice its parameters."""

    @nn.compact
    def __call__(self, x):
        mapped = nn.map_variables(nn.Dense, "params", twice, init=self.is_initializing())
        return nn.Dense(2, name="head")(mapped(3, name="bound")(x))


class MappedBack(nn.Module):
    """The same, with a way back: what the search leaves in its parameters is kept."""

    @nn.compact
    def __call__(self, x):
        mapped = nn.map_variables(nn.Dense, "params", twice, half, init=True, mutable=True)
        return nn.Dense(2, name="head")(mapped(3, name="bound")(x))


class MappedBlock(nn.Module):
    """The layer is deeper inside."""

    @nn.compact
    def __call__(self, x):
        mapped = nn.map_variables(zoo.Block, "params", twice, half, init=True, mutable=True)
        return nn.Dense(2, name="head")(mapped(name="bound")(x))


@pytest.mark.parametrize("model", [Weighted, Spectral, Mapped, MappedBack, MappedBlock])
def test_layers_whose_parameters_are_mapped_are_not_preconditioned(model):
    """Their kernel is a function of the parameter, and a slot would be mapped too."""
    x = jnp.ones((2, 6))
    variables = model().init(jax.random.key(0), x)
    layers = kfqn.find_layers(model(), variables, x)
    assert names(layers) == ["head"]
    assert_accounts_for(layers, variables["params"])
    bound = [reason for path, reason in reasons(layers).items() if path.endswith("kernel")]
    assert bound
    assert all("map_variables" in reason for reason in bound)

    def loss(params):
        return zoo.loss_of(model().apply({**variables, "params": params}, x))

    run = quick_jit(lambda params: kfqn.value_and_grad(loss, layers)(params)[:2])
    value, grads = run(variables["params"])
    reference_value, reference_grads = jax.value_and_grad(loss)(variables["params"])
    np.testing.assert_allclose(value, reference_value, 1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), grads, reference_grads)


class Before(nn.Module):
    """A layer of any kind before an ordinary one."""

    make: object

    @nn.compact
    def __call__(self, x):
        x = self.make()(x)
        return nn.Dense(2, name="head")(x.reshape(2, -1))


OTHERS = {
    "LSTM": (lambda: nn.RNN(nn.LSTMCell(5)), SEQUENCE),
    "OptimizedLSTM": (lambda: nn.RNN(nn.OptimizedLSTMCell(5)), SEQUENCE),
    "GRU": (lambda: nn.RNN(nn.GRUCell(5)), SEQUENCE),
    "both ways": (lambda: nn.Bidirectional(nn.RNN(nn.LSTMCell(5)), nn.RNN(nn.LSTMCell(5))), SEQUENCE),
    "Embed": (lambda: nn.Embed(7, 4), IDS),
    "LayerNorm": (nn.LayerNorm, FLAT),
    "GroupNorm": (lambda: nn.GroupNorm(2), FLAT),
    "PReLU": (nn.PReLU, FLAT),
    "Conv": (lambda: nn.Conv(4, (3, 3)), IMAGE),
    "Conv in groups": (lambda: nn.Conv(6, (3, 3), feature_group_count=3), IMAGE),
    "masked Conv": (lambda: nn.Conv(4, (3, 3), mask=np.ones((3, 3, 3, 4), np.float32)), IMAGE),
    "ConvTranspose": (lambda: nn.ConvTranspose(4, (3, 3)), IMAGE),
    "ConvLocal": (lambda: nn.ConvLocal(4, (3, 3)), IMAGE),
    "attention": (lambda: nn.MultiHeadDotProductAttention(2, qkv_features=4), SEQUENCE),
    "DenseGeneral": (lambda: nn.DenseGeneral((2, 3)), SEQUENCE),
    "DenseGeneral in batches": (lambda: nn.DenseGeneral(3, batch_dims=(0,)), SEQUENCE),
    "Einsum": (lambda: nn.Einsum((6, 4), "...a,ak->...k"), SEQUENCE),
    "batched Einsum": (lambda: nn.Einsum((4, 6, 5), "bta,tak->btk"), SEQUENCE),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_modules_are_found_or_listed(name):
    make, x = OTHERS[name]
    model = Before(make)
    variables = shapes_of(model, x)
    layers = kfqn.find_layers(model, variables, x)
    assert "head" in names(layers)
    assert_accounts_for(layers, variables["params"])

    def loss(params, x):
        return zoo.loss_of(model.apply({**variables, "params": params}, x))

    def run(params, x):
        _, grads, curvature = kfqn.value_and_grad(loss, layers)(params, x)
        return grads, curvature.statistics, curvature.after(grads).statistics

    grads, statistics, _ = jax.eval_shape(run, variables["params"], x)
    assert jax.tree.structure(grads) == jax.tree.structure(variables["params"])
    assert statistics.keys() == set(names(layers))


def test_the_dense_layers_of_an_lstm_are_found():
    model = Before(OTHERS["LSTM"][0])
    layers = kfqn.find_layers(model, shapes_of(model, SEQUENCE), SEQUENCE)
    cell = {name.rsplit("/", 1)[-1] for name in names(layers)} - {"head"}
    assert cell == {"ii", "if", "ig", "io", "hi", "hf", "hg", "ho"}


class Choice(nn.Module):
    """The body of a scan, with the layers of a cond in it."""

    @nn.compact
    def __call__(self, x, _):
        return zoo.Cond(x.shape[-1], name="cond")(x), None


class Chosen(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.scan(Choice, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(2, name="head")(body(name="blocks")(x, None)[0])


def test_a_cond_in_a_scan_is_found_or_listed():
    variables = shapes_of(Chosen(), FLAT)
    layers = kfqn.find_layers(Chosen(), variables, FLAT)
    assert "head" in names(layers)
    assert_accounts_for(layers, variables["params"])


class Functional(nn.Module):
    """A module inside a module that Flax knows nothing of: its parameters are one parameter here."""

    @nn.compact
    def __call__(self, x):
        inner = nn.Dense(3, parent=None)
        params = self.param("inner", lambda key: inner.init(key, x)["params"])
        return nn.Dense(2, name="head")(inner.apply({"params": params}, x))


class Tied(nn.Module):
    """The transposed kernel of a layer, used by hand as a second layer."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(3, name="head")
        return jnp.dot(layer(x), layer.variables["params"]["kernel"].T)


class Adapted(nn.Module):
    """Keeps a parameter of its own in the scope of the layer that it wraps."""

    base: nn.Module

    def setup(self):
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x):
        return self.base(x) * self.param("gain", nn.initializers.ones, ())


class Sharing(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Adapted(nn.Dense(2, parent=None), name="head")(x)


@pytest.mark.parametrize("model", [Functional, Tied, Sharing])
def test_unusual_parameters_are_found_or_listed(model):
    variables = shapes_of(model(), FLAT)
    layers = kfqn.find_layers(model(), variables, FLAT)
    assert_accounts_for(layers, variables["params"])
    assert names(layers) == ["head"]
    loss = zoo.Case(model(), FLAT.shape, None).loss
    run = lambda params, x: kfqn.value_and_grad(loss, layers)(params, x)[1]
    grads = jax.eval_shape(run, variables["params"], FLAT)
    assert jax.tree.structure(grads) == jax.tree.structure(variables["params"])


def test_boxed_parameters_are_looked_into():
    layer = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out")))
    variables = shapes_of(layer, FLAT)
    assert isinstance(variables["params"]["kernel"], nn.Partitioned)
    layers = kfqn.find_layers(layer, variables, FLAT)
    assert layers == kfqn.find_layers(layer, nn.meta.unbox(variables), FLAT)
    assert_accounts_for(layers, variables["params"])


# ------------------------------------------------------------------------------------------------- joining


def test_joined_layers_keep_their_facts_below_their_key():
    first = kfqn.find_layers(Odd(), shapes_of(Odd(), FLAT), FLAT)
    second = kfqn.find_layers(zoo.Mlp(), shapes_of(zoo.Mlp(), FLAT), FLAT)
    joined = kfqn.join_layers({"encoder": first, "decoder": second})
    assert names(joined) == ["encoder/head", "decoder/Dense_0", "decoder/Dense_1"]
    assert [path[0] for path, _, _ in joined.others] == ["encoder"] * len(first.others)
    assert joined["encoder/head"].kernel_shape == first["head"].kernel_shape
    assert names(kfqn.join_layers((first, second))) == ["0/head", "1/Dense_0", "1/Dense_1"]
    nested = kfqn.join_layers({"generator": joined, "critic": second})
    assert "generator/decoder/Dense_0" in names(nested)
    assert "Odd" in str(nested)


def test_layers_are_looked_up_by_name():
    layers = kfqn.find_layers(zoo.Mlp(), shapes_of(zoo.Mlp(), FLAT), FLAT)
    assert len(layers) == 2
    assert layers["Dense_1"].out_dim == 2
    with pytest.raises(KeyError, match="Dense_0"):
        layers["Dense_7"]
