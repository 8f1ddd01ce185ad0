"""Flax linen: find the layers of a model, and route their outputs through the tap.

Inside a model, the module is met through ``nn.intercept_methods``; a layer is recognised by the built-in
``__call__`` that is about to run, so a subclass that calls ``super().__call__`` is met once, and one that
computes something else is not. Which slot is its own, ``routes.py`` says. Slots of stacked layers are put
into the ``params`` collection of the outermost module, next to the kernel: the only collection that every
lifted transformation already carries to every layer.
"""

import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import flax.core
import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kfqn_optax._capture.forms import Form, Unsupported, check_real
from kfqn_optax._capture.found import layer_of, layers_of
from kfqn_optax._capture.layers import MAX_DIM, Layer, Layers, Path
from kfqn_optax._capture.linen_forms import form_of, sums_of
from kfqn_optax._capture.parameters import leaves_by_path, put
from kfqn_optax._capture.routes import active
from kfqn_optax._capture.slot import SLOT
from kfqn_optax._capture.tap import add_virtual_bias, tap
from kfqn_optax._constants import check_constants
from kfqn_optax._shown import shown

_BASES = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvTranspose, nn.ConvLocal, nn.Embed)
_CALLS = {base: inspect.unwrap(base.__call__) for base in _BASES}

# Part of JAX's trace-cache key: a function traced under a tap (or while layers are being found) is never
# reused outside, nor the other way round, even where a module or a loss is jitted on its own.
_tracing = jax.make_user_context(None)
_searches = itertools.count()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Mark:
    """Left in the parameters by the search. Its arrays have no elements: on the way out of a lifted
    transformation each gains one non-empty axis exactly where that transformation stacks it."""

    kernel: jax.Array
    bias: jax.Array
    slot: jax.Array
    form: Form = dataclasses.field(metadata={"static": True})


def find_layers(
    model: nn.Module,
    variables: Any,
    *args: Any,
    max_dim: int = MAX_DIM,
    strict: bool = False,
    **kwargs: Any,
) -> Layers:
    """``kfqn.find_layers`` for a linen model."""
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(
            f"kfqn.find_layers: expected a flax.linen.Module or a flax.nnx.Module, got {given}."
            " Pass the model itself, not its class, its parameters or its apply function."
        )
    if not isinstance(variables, (dict, flax.core.FrozenDict)) or "params" not in variables:
        is_tree = isinstance(variables, (dict, flax.core.FrozenDict))
        given = list(variables) if is_tree else shown(variables)
        raise ValueError(
            f'kfqn.find_layers: expected variables with a collection "params", got {given}. Pass'
            ' model.init(...), or {"params": params}.'
        )
    check_constants(call="kfqn.find_layers", max_dim=max_dim)
    skipped: dict[Path, str] = {}
    marks = _search(model, variables, args, kwargs, skipped)
    params, _ = leaves_by_path(nn.meta.unbox(variables["params"]))
    for path in [path for path, mark in marks.items() if not _in_one_order(mark)]:
        kind = marks.pop(path).form.kind
        skipped[path] = f"{kind} stacked along axes that cross: count all of them from the same end"
    found = [_layer(path, mark, params, max_dim) for path, mark in marks.items()]
    return layers_of(found, params, skipped, type(model).__name__, strict)


def _search(
    model: nn.Module, variables: Any, args: tuple, kwargs: dict, skipped: dict[Path, str]
) -> dict[Path, _Mark]:
    """Run the model on abstract values; the marks its layers left, by path in the parameter tree."""
    mutable = kwargs.pop("mutable", False)
    collections = {*variables, "params"}
    if mutable is not True:
        collections |= {mutable} if isinstance(mutable, str) else set(mutable or ())
    leaves, structure = jax.tree.flatten((variables, args, kwargs))
    traced = [_is_array(leaf) for leaf in leaves]

    def run(arrays: list[jax.Array]) -> Any:
        values = iter(arrays)
        merged = [next(values) if t else leaf for t, leaf in zip(traced, leaves, strict=True)]
        variables, args, kwargs = jax.tree.unflatten(structure, merged)
        with nn.intercept_methods(_marking(skipped, aside)):
            _, state = model.apply(
                variables, *args, mutable=True if mutable is True else list(collections), **kwargs
            )
        return state["params"]

    aside: dict[Path, _Mark] = {}
    try:
        with _tracing(f"search {next(_searches)}"):
            shapes = jax.eval_shape(run, [leaf for t, leaf in zip(traced, leaves, strict=True) if t])
    except Exception as error:
        error.add_note(
            f"kfqn.find_layers was tracing model.apply(variables, *args, **kwargs) with {shown(args)},"
            f" {shown(kwargs)}: give it the arguments that your loss gives (rngs=..., train=...,"
            " method=...)."
        )
        raise
    is_mark = lambda node: isinstance(node, _Mark)
    flat, _ = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=is_mark)
    marks = {
        tuple(jax.tree_util.keystr((key,), simple=True) for key in keys[:-1]): leaf
        for keys, leaf in flat
        if is_mark(leaf)
    }
    params, _ = leaves_by_path(nn.meta.unbox(variables["params"]))
    for path, mark in aside.items():
        if params[*path, mark.form.kernel_name].ndim == mark.kernel.ndim:
            marks.setdefault(path, mark)
        else:
            skipped[path] = f"{mark.form.kind} in a branch of nn.cond or nn.switch inside a stack"
    return marks


def _in_one_order(mark: _Mark) -> bool:
    """Whether kernel, bias and slot are stacked over the same axes in the same order.

    Where one lifted transformation counts its axis from the front and another from the back, the two
    may come in one order in an array, and in the other in an array of another rank.
    """
    shapes = [mark.kernel.shape, mark.bias.shape, mark.slot.shape]
    axes = [_stacked_axes(shape) for shape in shapes]
    lengths = {tuple(shape[i] for i in own) for shape, own in zip(shapes, axes, strict=True)}
    from_the_end = {tuple(i - len(shape) for i in own) for shape, own in zip(shapes, axes, strict=True)}
    told_apart = all(len(set(own)) == len(own) for own in lengths)
    return len(lengths) == 1 and (told_apart or len(set(axes)) == 1 or len(from_the_end) == 1)


def _is_array(leaf: object) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def _marking(skipped: dict[Path, str], aside: dict[Path, _Mark]) -> Callable[..., Any]:
    """An interceptor that leaves a mark beside the kernel of every layer it can tap.

    The branches of ``nn.cond`` must leave the same tree: marks of layers in there are put ``aside``.
    """

    def interceptor(call, args, kwargs, context):
        outputs = call(*args, **kwargs)
        module = context.module
        base = _base(context)
        if base is None:
            if context.method_name == "__call__" and module.path not in skipped:
                skipped[module.path] = f"no rule for {type(module).__name__}"
            return outputs
        params = nn.meta.unbox(dict(module.variables["params"]))
        if SLOT in params:
            return outputs
        try:
            form = form_of(base, module, params, _inputs(args, kwargs), outputs, args, kwargs)
            check_real(_inputs(args, kwargs), outputs, params[form.kernel_name])
            bias = params.get("bias")
            mark = _Mark(
                kernel=jnp.zeros((0,) * params[form.kernel_name].ndim),
                bias=jnp.zeros((0,) * (1 if bias is None else bias.ndim)),
                slot=jnp.zeros((0,) * max(3, params[form.kernel_name].ndim)),
                form=form,
            )
            around = " ".join(module.scope.debug_path)
            if "map_variables(" in around:
                raise Unsupported("inside nn.map_variables, nn.WeightNorm or the like")
            if "cond(" in around or "switch(" in around:
                aside[module.path] = mark
            else:
                module.put_variable("params", SLOT, mark)
        except Unsupported as reason:
            skipped[module.path] = f"{base.__name__} {reason}"
        except flax.errors.ModifyScopeVariableError:
            skipped[module.path] = f"{base.__name__} applied to parameters that are not the model's own"
        return outputs

    return interceptor


def _base(context: nn.module.InterceptorContext) -> type[nn.Module] | None:
    method = context.orig_method
    function = inspect.unwrap(getattr(method, "func", method))
    bases = [b for b, call in _CALLS.items() if call is function and isinstance(context.module, b)]
    return bases[0] if bases else None


def _inputs(args: tuple, kwargs: dict) -> jax.Array:
    return args[0] if args else kwargs["inputs"]


def _layer(path: Path, mark: _Mark, params: dict[Path, Any], max_dim: int) -> Layer:
    """The static facts of the layer at ``path``, whose mark came out of all lifted transformations."""
    form = mark.form
    kernel = params[*path, form.kernel_name]
    bias = params.get((*path, "bias"))
    slot_axes = _stacked_axes(mark.slot.shape)
    return layer_of(
        form,
        path,
        kernel,
        bias,
        kernel_axes=_stacked_axes(mark.kernel.shape),
        bias_axes=_stacked_axes(mark.bias.shape),
        slot_axes=slot_axes,
        rank=mark.slot.ndim - len(slot_axes),
        max_dim=max_dim,
    )


def _stacked_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis, length in enumerate(shape) if length)


@contextlib.contextmanager
def tapping(bias_only: bool = False) -> Iterator[None]:
    """Within this context, layers send their output through the slot that is theirs, if they have one.

    With ``bias_only`` as a virtual bias, which every kind of differentiation goes through and which
    gives the gradients of the outputs alone.
    """
    key = "virtual bias" if bias_only else "tap"
    with _tracing(key), nn.intercept_methods(_tapping(bias_only)):
        yield


def _tapping(bias_only: bool) -> Callable[..., Any]:
    def interceptor(call, args, kwargs, context):
        module, routes = context.module, active()
        if routes is None or module.scope is None:
            return call(*args, **kwargs)
        if not routes.entered:
            visible, _ = leaves_by_path(nn.meta.unbox(dict(module.variables.get("params", {}))))
            with routes.enter(module.path, visible) as beside_stacks:
                if beside_stacks:
                    return _call_with_slots(context, beside_stacks, args, kwargs)
                return interceptor(call, args, kwargs, context)
        outputs, base = call(*args, **kwargs), _base(context)
        if base is None:
            return outputs
        params = nn.meta.unbox(dict(module.variables["params"]))
        kernel, inputs = params["embedding" if base is nn.Embed else "kernel"], _inputs(args, kwargs)
        candidates = routes.candidates(module.path, kernel)

        def through_tap(call, slot):
            form = form_of(base, module, params, inputs, outputs, args, kwargs)
            if bias_only:
                return add_virtual_bias(call, outputs, slot, form.output_axes)
            sums = sums_of(form, base, module, inputs, slot)
            return tap(call, outputs, kernel, slot, sums, form.output_axes)

        return routes.through(candidates, kernel, params.get(SLOT), outputs, through_tap)

    return interceptor


def _call_with_slots(
    context: nn.module.InterceptorContext, slots: dict[Path, Any], args: tuple, kwargs: dict
) -> Any:
    """What the module's method returns, run with these slots beside its kernels."""

    def with_slots(variables):
        params = variables["params"]
        for path, slot in slots.items():
            params = put(params, path, SLOT, dict(slot))
        return {"params": params}

    def method(module, *args, **kwargs):
        return getattr(module, context.method_name)(*args, **kwargs)

    return nn.map_variables(method, "params", trans_in_fn=with_slots)(context.module, *args, **kwargs)
