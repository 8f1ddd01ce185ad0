"""The layers of a Flax NNX model."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kfqn_optax._capture.forms import Form, Unsupported, check_real
from kfqn_optax._capture.found import layer_of, layers_of
from kfqn_optax._capture.layers import Layer, Layers, Path
from kfqn_optax._capture.nnx import modules_of
from kfqn_optax._capture.nnx_forms import BASES, form_of_any_call, needs_call, one_copy, stacked_axes
from kfqn_optax._capture.nnx_tap import attach, recording
from kfqn_optax._capture.parameters import leaves_by_path
from kfqn_optax._capture.routes import Candidate
from kfqn_optax._shown import shown

_WRAPPERS = tuple(getattr(nnx, name) for name in ("WeightNorm", "SpectralNorm") if hasattr(nnx, name))


def find_layers(
    model: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any], max_dim: int, strict: bool
) -> Layers:
    """``kfqn.find_layers`` for an NNX model."""
    params, _ = leaves_by_path(nnx.state(model, nnx.Param))
    modules = modules_of(model)
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
        attach(fresh, {layer.path: [Candidate((), layer)] for layer in layers})
        if method is None:
            fresh(*args, **kwargs)
        elif isinstance(method, str):
            getattr(fresh, method)(*args, **kwargs)
        else:
            method(fresh, *args, **kwargs)

    with recording() as calls:
        try:
            jax.eval_shape(run, state, [leaf for t, leaf in zip(traced, leaves, strict=True) if t])
        except Exception as error:
            error.add_note(
                f"kfqn.find_layers was tracing model(*args, **kwargs) with {shown(args)}, {shown(kwargs)}:"
                ' give it arguments as your loss does, and method="..." where the loss calls a method of'
                " the model."
            )
            raise
    return calls
