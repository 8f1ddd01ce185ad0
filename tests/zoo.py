"""A small zoo of linen models, each with the same computation written out in plain JAX.

The written-out version sends every dense layer through a :class:`Probe`, which records what goes in and
what comes out, and can shift what comes out: the gradient of the loss in that shift is dL/dh, row by row.
That is the brute-force oracle of the captured statistics. Python loops stand where a model has a lifted
transformation, and nothing of kfqn_optax or of the model's code is used.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kfqn_optax.bench._quick import quick_jit

WIDTH = 3


class Probe:
    """Dense layers in plain JAX; a key of ``calls`` and ``shifts`` is (layer name, index of the copy)."""

    def __init__(self, shifts=None):
        self.shifts = shifts
        self.calls = {}

    def dense(self, name, params, x, copy=()):
        h = jnp.tensordot(x, params["kernel"], 1)
        if "bias" in params:
            h = h + jnp.broadcast_to(params["bias"], h.shape)
        calls = self.calls.setdefault((name, copy), [])
        if self.shifts is not None:
            h = h + self.shifts[name, copy][len(calls)]
        calls.append((x, h))
        return h


class Expected(NamedTuple):
    """What the statistics of one layer should be, in float64; stacked copies in front."""

    rows: Any
    inputs: Any
    preactivations: Any
    preactivation_grads: Any
    second_moment: Any


def essentials(statistics: dict[str, Any]) -> dict[str, Expected]:
    """The captured statistics that the oracle knows; under jit the others are then not computed."""
    return {
        name: Expected(*(getattr(statistics_of_one, field) for field in Expected._fields))
        for name, statistics_of_one in statistics.items()
    }


def probe(plain: Callable[..., Any], params: Any, *args: Any) -> Any:
    """Inputs and outputs of every call of a dense layer, and dL/dh; to be traced."""
    first = Probe()
    plain(first, params, *args)
    shifts = {key: [jnp.zeros_like(h) for _, h in calls] for key, calls in first.calls.items()}
    return first.calls, jax.grad(lambda shifts: plain(Probe(shifts), params, *args))(shifts)


@functools.cache
def _jitted_probe(plain: Callable[..., Any]) -> Callable[..., Any]:
    return quick_jit(functools.partial(probe, plain))


def brute_force(plain: Callable[..., Any], params: Any, *args: Any) -> dict[str, Expected]:
    """Expected statistics by layer name, for a scalar ``plain(probe, params, *args)``."""
    return expected_from(*_jitted_probe(plain)(params, *args), params)


def expected_from(calls: Any, grads: Any, params: Any) -> dict[str, Expected]:
    """The same from what ``probe`` returned, in NumPy."""
    biased = {name: "bias" in leaves for name, leaves in _layers_of(params).items()}
    single = {key: _expected(calls[key], grads[key], biased[key[0]]) for key in calls}
    return {name: _stack([(c, e) for (n, c), e in single.items() if n == name]) for name, _ in single}


def _layers_of(params, path=()):
    """The dictionaries that hold a kernel, by layer name."""
    if "kernel" in params:
        return {"/".join(path) or ".": params}
    inner = [_layers_of(value, (*path, key)) for key, value in params.items() if hasattr(value, "items")]
    return {name: leaves for part in inner for name, leaves in part.items()}


def _expected(calls, grads, biased):
    a, h = (np.concatenate([_rows(array) for array in arrays]) for arrays in zip(*calls, strict=True))
    g = np.concatenate([_rows(array) for array in grads])
    if biased:
        a = np.concatenate([a, np.ones((len(a), 1))], axis=1)
    second_moment = np.mean([np.outer(row, row) for row in a], axis=0)
    return Expected(np.asarray(len(a)), a.mean(0), h.mean(0), g.sum(0), second_moment)


def _rows(array):
    return np.asarray(array, np.float64).reshape(-1, array.shape[-1])


def _stack(copies):
    copies = sorted(copies, key=lambda item: item[0])
    shape = tuple(length + 1 for length in copies[-1][0])
    stacked = [np.stack(field) for field in zip(*(expected for _, expected in copies), strict=True)]
    return Expected(*(field.reshape(shape + field.shape[1:]) for field in stacked))


def loss_of(outputs: jax.Array) -> jax.Array:
    """A scalar with a different gradient in every element."""
    return jnp.mean(jnp.cos(2 * outputs) + 0.5 * outputs**2)


def randomise(variables: Any, dtype: Any = None, seed: int = 7) -> Any:
    """The same variables with every parameter (biases too) drawn from a normal distribution."""
    leaves, structure = jax.tree.flatten(variables["params"])
    rng = np.random.default_rng(seed)
    drawn = [jnp.asarray(0.5 * rng.standard_normal(leaf.shape), dtype or leaf.dtype) for leaf in leaves]
    return {**variables, "params": jax.tree.unflatten(structure, drawn)}


def at(params: Any, index: int, axis: int) -> Any:
    """One of the copies stacked along ``axis``."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=axis), params)


# --------------------------------------------------------------------------------------------- the models


class Mlp(nn.Module):
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = jnp.tanh(nn.Dense(WIDTH, use_bias=False, **options)(x))
        return nn.Dense(2, **options)(x)


def plain_mlp(probe, params, x):
    x = jnp.tanh(probe.dense("Dense_0", params["Dense_0"], x))
    return probe.dense("Dense_1", params["Dense_1"], x)


class Setup(nn.Module):
    def setup(self):
        self.blocks = [nn.Dense(WIDTH), nn.Dense(WIDTH, use_bias=False)]
        self.out = nn.Dense(2)

    def __call__(self, x):
        for block in self.blocks:
            x = jnp.tanh(block(x))
        return self.out(x)

    def features(self, x):
        return self.blocks[0](x)


def plain_setup(probe, params, x):
    for name in ("blocks_0", "blocks_1"):
        x = jnp.tanh(probe.dense(name, params[name], x))
    return probe.dense("out", params["out"], x)


def plain_sequential(probe, params, x):
    x = jnp.tanh(probe.dense("layers_0", params["layers_0"], x))
    return probe.dense("layers_2", params["layers_2"], x)


class ScaledDense(nn.Dense):
    """Works on other rows than it is called with, and returns something else than the layer's output."""

    @nn.compact
    def __call__(self, inputs):
        return 3 * super().__call__(2 * inputs)


class Subclassed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(jnp.tanh(ScaledDense(WIDTH)(x)))


def plain_subclassed(probe, params, x):
    x = 3 * probe.dense("ScaledDense_0", params["ScaledDense_0"], 2 * x)
    return probe.dense("Dense_0", params["Dense_0"], jnp.tanh(x))


class Keyword(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH)(inputs=x)


def plain_keyword(probe, params, x):
    return probe.dense("Dense_0", params["Dense_0"], x)


class Twice(nn.Module):
    """One layer, two calls, with different numbers of rows."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(x.shape[-1], name="fc")
        return layer(jnp.tanh(layer(x))[:2])


def plain_twice(probe, params, x):
    x = jnp.tanh(probe.dense("fc", params["fc"], x))
    return probe.dense("fc", params["fc"], x[:2])


class Block(nn.Module):
    """What the lifted transformations are put around."""

    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(WIDTH, use_bias=self.use_bias, name="fc")(x))


class ScanBlock(nn.Module):
    """The same as the body of a scan: it carries ``x``, and scans over nothing."""

    use_bias: bool = True

    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(x.shape[-1], use_bias=self.use_bias, name="fc")(x)), None


class Lifted(nn.Module):
    """``make(name="blocks")``, the lifted block, before an ordinary layer."""

    make: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="out")(self.make(name="blocks")(x))


class LiftedScan(nn.Module):
    """The same for a scan."""

    make: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="out")(self.make(name="blocks")(x, None)[0])


def lifted(blocks):
    """The plain version of ``Lifted`` and ``LiftedScan``, from that of their blocks."""

    def plain(probe, params, x):
        return probe.dense("out", params["out"], blocks(probe, params["blocks"], x))

    return plain


def plain_block(probe, params, x):
    return jnp.tanh(probe.dense("blocks/fc", params["fc"], x))


JitBlock = nn.jit(Block)  # its trace cache outlives any one test


def scan(axis, *, use_bias=True, length=2, body=ScanBlock):
    stacked = nn.scan(body, variable_axes={"params": axis}, split_rngs={"params": True}, length=length)
    return LiftedScan(lambda name: stacked(use_bias, name=name))


def plain_scan(axis, length=2):
    def blocks(probe, params, x):
        for i in range(length):
            x = jnp.tanh(probe.dense("blocks/fc", at(params["fc"], i, axis), x, (i,)))
        return x

    return lifted(blocks)


def nested_scan(outer, inner):
    """Three times two copies."""

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            body = nn.scan(
                ScanBlock, variable_axes={"params": inner}, split_rngs={"params": True}, length=2
            )
            return body(name="inner")(x, None)

    body = nn.scan(Inner, variable_axes={"params": outer}, split_rngs={"params": True}, length=3)
    return LiftedScan(lambda name: body(name=name))


def plain_nested_scan(outer, inner, outer_first):
    def blocks(probe, params, x):
        for o in range(3):
            for i in range(2):
                fc = at(at(params["inner"]["fc"], o, outer), i, inner)
                x = jnp.tanh(probe.dense("blocks/inner/fc", fc, x, (o, i) if outer_first else (i, o)))
        return x

    return lifted(blocks)


def broadcast_scan():
    body = nn.scan(ScanBlock, variable_broadcast="params", split_rngs={"params": False}, length=3)
    return LiftedScan(lambda name: body(name=name))


@lifted
def plain_broadcast_scan(probe, params, x):
    for _ in range(3):
        x = jnp.tanh(probe.dense("blocks/fc", params["fc"], x))
    return x


def vmap(axis, *, in_axes=0, use_bias=True, length=2):
    stacked = nn.vmap(
        Block,
        variable_axes={"params": axis},
        split_rngs={"params": axis is not None},
        in_axes=in_axes,
        axis_size=length,
    )
    return Lifted(lambda name: stacked(use_bias, name=name))


def plain_vmap(axis, *, in_axes=0, length=2):
    def blocks(probe, params, x):
        outputs = []
        for i in range(length):
            rows = x if in_axes is None else x[i]
            fc = params["fc"] if axis is None else at(params["fc"], i, axis)
            h = probe.dense("blocks/fc", fc, rows, () if axis is None else (i,))
            outputs.append(jnp.tanh(h))
        return jnp.stack(outputs)

    return lifted(blocks)


class Cond(nn.Module):
    """Two layers, of which the data choose one."""

    features: int = 2

    @nn.compact
    def __call__(self, x):
        taken, other = (nn.Dense(self.features, name=name) for name in ("taken", "other"))
        if self.is_initializing():
            return taken(x) + other(x)
        return nn.cond(
            jnp.sum(x**2) > 0,
            lambda module, taken, other, x: taken(x),
            lambda module, taken, other, x: other(x),
            self,
            taken,
            other,
            x,
        )


def plain_cond(probe, params, x):
    return probe.dense("taken", params["taken"], x)


class Rnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.SimpleCell(WIDTH, param_dtype=x.dtype, name="cell"))(x)


def plain_rnn(probe, params, x):
    cell, outputs, h = params["cell"], [], jnp.zeros((x.shape[0], WIDTH), x.dtype)
    for t in range(x.shape[1]):
        h = jnp.tanh(probe.dense("cell/i", cell["i"], x[:, t]) + probe.dense("cell/h", cell["h"], h))
        outputs.append(h)
    return jnp.stack(outputs, axis=1)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, the shape of what it is applied to, and the same computation in plain JAX."""

    model: nn.Module
    shape: tuple[int, ...]
    plain: Callable[..., jax.Array]

    def loss(self, params, x):
        return loss_of(self.model.apply({"params": params}, x))

    def plain_loss(self, probe, params, x):
        return loss_of(self.plain(probe, params, x))

    def example(self, dtype=jnp.float32):
        """Parameters and a batch, both drawn at random."""
        x = jnp.asarray(np.random.default_rng(3).standard_normal(self.shape), dtype)
        variables = jax.eval_shape(self.model.init, jax.random.key(0), x)
        return randomise(variables, dtype)["params"], x


def _dense(probe, params, x):
    return probe.dense(".", params, x)


MLP = Case(Mlp(), (6, 4), plain_mlp)

CASES = {
    "dense": Case(nn.Dense(WIDTH), (6, 4), _dense),
    "dense without bias": Case(nn.Dense(WIDTH, use_bias=False), (6, 4), _dense),
    "dense, one vector": Case(nn.Dense(WIDTH), (4,), _dense),
    "dense, two leading axes": Case(nn.Dense(WIDTH), (2, 6, 4), _dense),
    "dense without bias, three leading axes": Case(nn.Dense(WIDTH, use_bias=False), (1, 2, 6, 4), _dense),
    "compact": MLP,
    "setup": Case(Setup(), (6, 4), plain_setup),
    "sequential": Case(nn.Sequential([nn.Dense(WIDTH), nn.tanh, nn.Dense(2)]), (6, 4), plain_sequential),
    "subclass": Case(Subclassed(), (6, 4), plain_subclassed),
    "keyword": Case(Keyword(), (6, 4), plain_keyword),
    "called twice": Case(Twice(), (6, 4), plain_twice),
    "jit": Case(Lifted(JitBlock), (6, 4), lifted(plain_block)),
    "remat": Case(Lifted(nn.remat(Block)), (6, 4), lifted(plain_block)),
    "cond": Case(Cond(), (6, 4), plain_cond),
    "rnn": Case(Rnn(), (2, 6, 4), plain_rnn),
    "scan, axis 0": Case(scan(0), (6, 4), plain_scan(0)),
    "scan, axis 0, without bias": Case(scan(0, use_bias=False), (6, 4), plain_scan(0)),
    "scan, axis 1": Case(scan(1), (6, 4), plain_scan(1)),
    "scan, axis 1, without bias": Case(scan(1, use_bias=False), (6, 4), plain_scan(1)),
    "scan, axis -1": Case(scan(-1), (6, 4), plain_scan(-1)),
    "scan of length 1": Case(scan(0, length=1), (6, 4), plain_scan(0, length=1)),
    "scan of remat": Case(scan(0, body=nn.remat(ScanBlock)), (6, 4), plain_scan(0)),
    "scan, shared": Case(broadcast_scan(), (6, 4), plain_broadcast_scan),
    "scan in scan, axes 0 and 1": Case(nested_scan(0, 1), (6, 4), plain_nested_scan(0, 1, True)),
    "scan in scan, axes 1 and 0": Case(nested_scan(1, 0), (6, 4), plain_nested_scan(1, 0, False)),
    "vmap, axis 0": Case(vmap(0), (2, 6, 4), plain_vmap(0)),
    "vmap, axis 0, without bias": Case(vmap(0, use_bias=False), (2, 6, 4), plain_vmap(0)),
    "vmap, axis 1, same inputs": Case(vmap(1, in_axes=None), (6, 4), plain_vmap(1, in_axes=None)),
    "vmap, shared": Case(vmap(None), (2, 6, 4), plain_vmap(None)),
}
