"""How a loss grows with the number of examples, read off its program: a mean does not, a sum does.

The program is traced for N and for 2 N examples. What differs between the two are lengths of axes and the
numbers that were made of them, such as the N by which a mean divides. Along the program each array has an
exponent g: with twice as many examples of the same kind its elements are 2^g times as large.

Nothing is claimed that is not certain: None is the exponent of whatever these rules do not know, and of
most that is made of it.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Exponent = float | None

# Operations by what they do to an element's size: nothing, or nothing to that of the first argument; they
# return something of no size; they take powers.
_SAME = {
    *("add", "add_any", "sub", "max", "concatenate", "pad", "neg", "abs", "real", "imag", "reshape"),
    *("transpose", "broadcast_in_dim", "squeeze", "expand_dims", "convert_element_type", "reduce_max"),
    *("reduce_min", "slice", "rev", "copy", "copy_p", "reduce_precision", "sharding_constraint", "clamp"),
    *("reshard", "mesh_cast", "split", "psum", "psum_invariant", "pvary", "pcast", "optimization_barrier"),
}
_OF_FIRST = {"gather", "dynamic_slice"}  # the others are indices
_NO_SIZE = {"eq", "ne", "lt", "le", "gt", "ge", "is_finite", "sign", "not", "and", "or", "argmax", "argmin"}
_POWERS = {"sqrt": 0.5, "rsqrt": -0.5, "cbrt": 1 / 3, "square": 2.0}
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_OVER_EXAMPLES = ("cum", "scatter", "reduce", "select_and", "fft", "custom", "ffi", "pallas", "pure", "io_")
_FEW = 4096  # constants longer than this are data, which are not compared


def growth(once: Any, twice: Any) -> Exponent:
    """The exponent of the first result of a program, of which ``twice`` is that for twice the examples."""
    return _closed(once, twice, [0.0] * len(once.jaxpr.invars))[0]


def _closed(once: Any, twice: Any, given: Sequence[Exponent]) -> list[Exponent]:
    """The exponents of the results of two programs of one shape, which may have constants."""
    ours, theirs = getattr(once, "consts", ()), getattr(twice, "consts", ())
    one, two = getattr(once, "jaxpr", once), getattr(twice, "jaxpr", twice)
    unknown: list[Exponent] = [None] * len(one.outvars)
    if len(ours) != len(theirs) or len(one.eqns) != len(two.eqns) or len(given) != len(one.invars):
        return unknown
    known: dict[Any, Exponent] = dict(zip(one.invars, given, strict=True))
    known |= zip(one.constvars, map(_of_numbers, ours, theirs), strict=True)
    twin = dict(zip((*one.invars, *one.constvars), (*two.invars, *two.constvars), strict=True))

    def read(a: Any, b: Any) -> Exponent:
        return _of_numbers(a.val, b.val) if hasattr(a, "val") else known[a]

    for a, b in zip(one.eqns, two.eqns, strict=True):
        pairs = list(zip(a.invars, b.invars, strict=False))
        same = all(hasattr(y, "val") if hasattr(x, "val") else twin[x] is y for x, y in pairs)
        if a.primitive is not b.primitive or len(a.invars) != len(b.invars) or not same:
            return unknown
        found = _equation(a, b, [read(x, y) for x, y in pairs])
        known |= zip(a.outvars, found, strict=True)
        twin |= zip(a.outvars, b.outvars, strict=True)
    return [read(a, b) for a, b in zip(one.outvars, two.outvars, strict=True)]


def _equation(a: Any, b: Any, given: list[Exponent]) -> list[Exponent]:
    """The exponents of what one operation returns."""
    name, results = a.primitive.name, len(a.outvars)
    sizes = [_of_sizes(x, y) for x, y in zip(a.invars, b.invars, strict=True)]
    made = [_of_sizes(x, y) for x, y in zip(a.outvars, b.outvars, strict=True)]
    if name in _NO_SIZE:
        return [0.0] * results
    if name in _OF_FIRST:
        return given[:1] * results
    if name == "select_n":
        return [_largest(given[1:])]
    if name in ("scan", "while", "cond"):
        return _controlled(name, a, b, given)
    inner = [(a.params[key], b.params[key]) for key in _INNER if key in a.params]
    if inner:
        return _closed(*inner[0], given)
    g, size, made = _known(given), _known(sizes), _known(made)
    if g is None or size is None or made is None:
        return [None] * results
    if name in _SAME:
        return [max(g, default=0.0)] * results
    if name == "min":
        return [min(g)]
    if name == "mul":
        return [g[0] + g[1]]
    if name == "div":
        return [g[0] - g[1]]
    if name in _POWERS:
        return [_POWERS[name] * g[0]]
    if name == "integer_pow":
        return [a.params["y"] * g[0]]
    if name == "reduce_sum":
        return [g[0] + size[0] - made[0]]
    if name == "dot_general":
        axes = a.params["dimension_numbers"][0][0]
        lengths = [math.prod(x.invars[0].aval.shape[i] for i in axes) for x in (a, b)]
        over = _of_numbers(*lengths)
        return [None if over is None else g[0] + g[1] + over]
    # What else there is keeps the examples apart, or it may be a sum over them.
    elementwise = not name.startswith(_OVER_EXAMPLES) and all(m == max(size, default=0.0) for m in made)
    return [None if any(g) or (any(size) and not elementwise) else 0.0] * results


def _controlled(name: str, a: Any, b: Any, given: list[Exponent]) -> list[Exponent]:
    """The exponents of what loops and conditionals return; a loop over the examples is not known."""
    if name == "cond":
        branches = zip(a.params["branches"], b.params["branches"], strict=True)
        found = [_closed(one, two, given[1:]) for one, two in branches]
        return [_largest(of_one) for of_one in zip(*found, strict=True)]
    if name == "while":
        first, consts = a.params["cond_nconsts"], a.params["body_nconsts"]
        inputs, carried = given[first:], len(a.outvars)
        found = _closed(a.params["body_jaxpr"], b.params["body_jaxpr"], inputs)
    else:
        consts, carried, inputs = a.params["num_consts"], a.params["num_carry"], given
        found = _closed(a.params["jaxpr"], b.params["jaxpr"], inputs)
        if a.params["length"] != b.params["length"]:
            return [None] * len(a.outvars)
    steady = found[:carried] == list(inputs[consts : consts + carried])
    return found if steady else [None] * len(a.outvars)


def _known(given: Sequence[Exponent]) -> list[float] | None:
    """The exponents, if all of them are known."""
    known = [g for g in given if g is not None]
    return known if len(known) == len(given) else None


def _largest(given: Sequence[Exponent]) -> Exponent:
    known = _known(given)
    return None if known is None else max(known, default=0.0)


def _of_sizes(a: Any, b: Any) -> Exponent:
    return _of_numbers(math.prod(a.aval.shape), math.prod(b.aval.shape))


def _of_numbers(a: Any, b: Any) -> Exponent:
    """The exponent of a constant that is ``a`` once and ``b`` for twice the examples."""
    if a is b:
        return 0.0
    if jnp.shape(a) != jnp.shape(b):
        return None
    if math.prod(jnp.shape(a)) > _FEW or jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
        return 0.0
    try:
        a, b = (np.asarray(x, float) for x in (a, b))
    except jax.errors.TracerArrayConversionError:  # made outside of the loss
        return 0.0
    if np.array_equal(a, b, equal_nan=True):
        return 0.0
    if a.size != 1 or not a.item() * b.item() > 0:
        return None
    exponent = math.log2(b.item() / a.item())
    return exponent if math.isclose(exponent, round(exponent)) and exponent else None
