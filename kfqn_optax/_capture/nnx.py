"""Flax NNX: find the layers of a model, and route their outputs through the tap.

NNX has no interceptors. Inside the loss, on a copy of the model made for it, each layer gets its slot as
one more ``nnx.Param`` beside its kernel, so that whatever lifts its parameters (``nnx.scan``, ``nnx.vmap``,
``nnx.StateAxes({nnx.Param: 0})``) lifts the slot along, and its class becomes a subclass that taps the
built-in ``__call__``. Slot and class go back before the loss returns: nothing stays on the model.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kfqn_optax._capture.forms import Form, Unsupported, check_real
from kfqn_optax._capture.found import layer_of, layers_of
from kfqn_optax._capture.layers import Layer, Layers, Path
from kfqn_optax._capture.nnx_forms import (
    BASES,
    form_of,
    form_of_any_call,
    needs_call,
    one_copy,
    stacked_axes,
    sums_of,
)
from kfqn_optax._capture.parameters import leaves_by_path
from kfqn_optax._capture.slot import SLOT, Slot
from kfqn_optax._capture.tap import add_virtual_bias, tap
from kfqn_optax._shown import shown

_as_pure: Callable[[Any], Any] = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure
# Gradients of some of a model's variables need the graph mode, whatever the user has set it to.
_PARAMETERS = inspect.signature(nnx.value_and_grad).parameters
GRAPH: dict[str, Any] = {name: True for name in ("graph", "graph_updates") if name in _PARAMETERS}
jit_with_models = nnx.jit
_WRAPPERS = tuple(getattr(nnx, name) for name in ("WeightNorm", "SpectralNorm") if hasattr(nnx, name))

# Part of JAX's trace-cache key, as in ``linen.py``.
_tracing = jax.make_user_context(None)
_searches = itertools.count()


class _Local(threading.local):
    bias_only = False
    calls: dict[str, Form | Unsupported] | None = None


_local = _Local()


class _SlotParam(nnx.Param):
    """The slot of the layer named ``kfqn_layer``; a Param goes where the layer's parameters go."""


def is_model(value: object) -> bool:
    return isinstance(value, nnx.Module)


def is_state(value: object) -> bool:
    return isinstance(value, nnx.State)


def as_arrays(tree: Any) -> Any:
    """``tree`` with the arrays that NNX variables hold in the place of the variables."""
    return _as_pure(tree)


def assign(tree: Any, arrays: Any) -> Any:
    """``tree`` with these arrays; where all of it is NNX variables, they are set, and it is returned."""
    is_variable = lambda node: isinstance(node, nnx.Variable)
    if all(map(is_variable, jax.tree.leaves(tree, is_leaf=is_variable))):
        nnx.update(tree, nnx.state(arrays))
        return tree
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(arrays))


# ------------------------------------------------------------------------------------------------- finding


def find_layers(
    model: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any], max_dim: int, strict: bool
) -> Layers:
    """``kfqn.find_layers`` for an NNX model."""
    params, _ = leaves_by_path(nnx.state(model, nnx.Param))
    modules = _modules(model)
    owners = _owners(modules)
    found: dict[str, tuple[Layer, Form]] = {}
    skipped: dict[Path, str] = {}
    for path, module in modules.items():
        base = _base(module)
        if base is None:
            skipped[path] = f"no rule for {type(module).__name__}"
            continue
        try:
            _check_place(path, module, base, modules, owners)
            layer, form = _layer(path, module, base, params, max_dim)
            found[layer.name] = layer, form
        except Unsupported as reason:
            skipped[path] = f"{base.__name__} {reason}"
    layers = [layer for layer, _ in found.values()]
    if args or kwargs:
        calls = _search(model, layers, args, kwargs)
        layers = []
        for name, (layer, form) in found.items():
            met = calls.get(name)
            if isinstance(met, Form):
                layers.append(dataclasses.replace(layer, positions=met.positions))
            elif met is not None:
                skipped[layer.path] = f"{form.kind} {met}"
            else:
                skipped.setdefault(layer.path, "belongs to no layer that this call runs")
    elif unknown := [name for name, (_, form) in found.items() if needs_call(form)]:
        raise ValueError(
            f"kfqn.find_layers: at how many positions the convolutions {unknown} apply their kernels shows"
            " only in a call. Give the arguments of one, arrays or shapes:"
            " kfqn.find_layers(model, images)."
        )
    return layers_of(layers, params, skipped, type(model).__name__, strict)


def _modules(model: Any) -> dict[Path, Any]:
    """The modules in a model, each once, under the first of its paths."""
    return {
        tuple(str(key) for key in path): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module)
    }


def _base(module: Any) -> Any:
    bases = [base for base in BASES if isinstance(module, base)]
    return bases[0] if bases else None


def _owners(modules: dict[Path, Any]) -> dict[int, list[Path]]:
    """For the id of every variable the paths of the modules that hold it."""
    owners: dict[int, list[Path]] = {}
    for path, module in modules.items():
        for value in vars(module).values():
            if isinstance(value, nnx.Variable):
                owners.setdefault(id(value), []).append(path)
    return owners


def _check_place(
    path: Path, module: Any, base: Any, modules: dict[Path, Any], owners: dict[int, list[Path]]
) -> None:
    for length in range(len(path)):
        around = modules.get(path[:length])
        if isinstance(around, _WRAPPERS):
            raise Unsupported(f"inside nnx.{type(around).__name__}")
    kernel = getattr(module, _kernel_name(base), None)
    if not isinstance(kernel, nnx.Variable):
        raise Unsupported("without a kernel of its own")
    others = [other for other in owners[id(kernel)] if other != path]
    if others:
        raise Unsupported(f"sharing its kernel with {'/'.join(others[0]) or 'the model'}")


def _kernel_name(base: Any) -> str:
    return "embedding" if base is nnx.Embed else "kernel"


def _layer(
    path: Path, module: Any, base: Any, params: Mapping[Path, Any], max_dim: int
) -> tuple[Layer, Form]:
    kernel, bias = params.get((*path, _kernel_name(base))), params.get((*path, "bias"))
    if kernel is None:
        raise Unsupported("whose kernel is no nnx.Param of its own")
    check_real(kernel)
    form = form_of_any_call(base, module)
    bias_shape = None if bias is None else jnp.shape(bias)
    axes = stacked_axes(jnp.shape(kernel), bias_shape, one_copy(base, module))
    layer = layer_of(
        form,
        path,
        kernel,
        bias,
        kernel_axes=axes.kernel,
        bias_axes=axes.bias,
        slot_axes=axes.slot,
        rank=axes.rank,
        max_dim=max_dim,
    )
    return layer, form


def _search(
    model: nnx.Module, layers: Iterable[Layer], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Form | Unsupported]:
    """Run the model on abstract values: for the name of each layer that is called, its form there."""
    method = kwargs.pop("method", None)
    graphdef, state = nnx.split(model)
    leaves, structure = jax.tree.flatten((args, kwargs))
    traced = [isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) for leaf in leaves]

    def run(state: Any, arrays: list[jax.Array]) -> None:
        values = iter(arrays)
        merged = [next(values) if t else leaf for t, leaf in zip(traced, leaves, strict=True)]
        args, kwargs = jax.tree.unflatten(structure, merged)
        fresh = nnx.merge(graphdef, state, copy=True)
        attach(fresh, {layer.path: _zeros(layer) for layer in layers})
        if method is None:
            fresh(*args, **kwargs)
        elif isinstance(method, str):
            getattr(fresh, method)(*args, **kwargs)
        else:
            method(fresh, *args, **kwargs)

    calls: dict[str, Form | Unsupported] = {}
    _local.calls = calls
    try:
        with _tracing(f"search {next(_searches)}"):
            jax.eval_shape(run, state, [leaf for t, leaf in zip(traced, leaves, strict=True) if t])
    except Exception as error:
        error.add_note(
            f"kfqn.find_layers was tracing model(*args, **kwargs) with {shown(args)}, {shown(kwargs)}: give"
            ' it arguments as your loss does, and method="..." where the loss calls a method of the model.'
        )
        raise
    finally:
        _local.calls = None
    return calls


def _zeros(layer: Layer) -> dict[str, jax.Array]:
    return {key: jnp.zeros(shape, layer.dtype) for key, shape in layer.slot_shapes.items()}


# ------------------------------------------------------------------------------------------------- tapping


@contextlib.contextmanager
def tapping(bias_only: bool = False) -> Iterator[None]:
    """Within this context, layers with a slot send their output through it, as in ``linen.tapping``."""
    before = _local.bias_only
    _local.bias_only = bias_only
    try:
        with _tracing("virtual bias" if bias_only else "tap"):
            yield
    finally:
        _local.bias_only = before


def attach(model: Any, slots: Mapping[Path, Slot]) -> None:
    """Put slots beside the kernels of the layers at these paths, and tap the layers."""
    modules = _modules(model)
    for path, slot in slots.items():
        module = modules[path]
        setattr(module, SLOT, _SlotParam(dict(slot), kfqn_layer="/".join(path) or "."))
        object.__setattr__(module, "__class__", _tapped_class(type(module)))


def detach(model: Any) -> None:
    """Undo ``attach``."""
    for module in _modules(model).values():
        if hasattr(type(module), "kfqn_original"):
            delattr(module, SLOT)
            object.__setattr__(module, "__class__", type(module).kfqn_original)
            for name, value in list(vars(module).items()):
                # Flax 0.12.0 keeps the names of deleted attributes, as a part of the graph.
                if isinstance(value, Mapping) and SLOT in value:
                    make: Any = type(value)
                    kept = make({key: kind for key, kind in value.items() if key != SLOT})
                    object.__setattr__(module, name, kept)


@functools.cache
def _tapped_class(cls: Any) -> Any:
    """A subclass of ``cls`` in which the built-in ``__call__`` of the layer below it is tapped.

    The tap stands right before the built-in class, so that a ``__call__`` of the user's own is left as it
    is, and what it hands to ``super().__call__`` is tapped.
    """
    base = next(base for base in BASES if issubclass(cls, base))
    if cls is not base:
        return types.new_class(cls.__name__, (cls, _tapped_class(base)), {}, _body(kfqn_original=cls))

    def __call__(self, *args, **kwargs):  # noqa: N807
        outputs = base.__call__(self, *args, **kwargs)
        return _through_tap(base, self, outputs, args, kwargs)

    return types.new_class(cls.__name__, (cls,), {}, _body(kfqn_original=cls, __call__=__call__))


def _body(**attributes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda namespace: namespace.update(attributes, __module__=__name__)


def _through_tap(base: Any, module: Any, outputs: Any, args: tuple, kwargs: dict) -> Any:
    variable = getattr(module, SLOT)
    inputs = args[0] if args else kwargs["inputs"]
    try:
        if base is nnx.Einsum:
            _check_equation(module, args, kwargs)
        check_real(inputs, outputs)
        form = form_of(base, module, inputs.ndim, outputs.shape)
    except Unsupported as reason:
        if _local.calls is None:
            raise ValueError(
                f"kfqn.value_and_grad: the layer {variable.kfqn_layer} is {base.__name__} {reason}. Give"
                " kfqn.find_layers the arguments of a call, so that it leaves the layer out."
            ) from None
        _local.calls[variable.kfqn_layer] = reason
        return outputs
    if _local.calls is not None:
        _local.calls.setdefault(variable.kfqn_layer, form)
    slot = as_arrays(variable)
    if _local.bias_only:
        return add_virtual_bias(outputs, slot, form.output_axes)
    return tap(outputs, slot, sums_of(form, base, module, inputs, slot), form.output_axes)


def _check_equation(module: Any, args: tuple, kwargs: dict) -> None:
    given = args[1] if len(args) > 1 else kwargs.get("einsum_str")
    if given is not None and given.replace(" ", "") != module.einsum_str:
        raise Unsupported(f"called with another equation, {given!r}")


# ------------------------------------------------------------------------------------- the loss of a model
