"""The outputs of a Flax NNX model's layers, routed through the tap.

NNX has no interceptors. Inside the loss, on a copy of the model made for it, each layer is given its name,
and its class becomes a subclass that taps the built-in ``__call__``; ``routes.py`` has its slot. Where
copies of a layer are stacked, each needs a slot of its own: there it is one more ``nnx.Param`` beside the
kernel, so that what lifts the layer's parameters (``nnx.scan``, ``nnx.StateAxes({nnx.Param: 0})``) lifts
the slot along. Name, slot and class go back before the loss returns: nothing stays on the model.
"""

import contextlib
import functools
import itertools
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from kfqn_optax._capture.forms import Form, Unsupported, check_real
from kfqn_optax._capture.layers import Path
from kfqn_optax._capture.nnx import as_arrays, modules_of
from kfqn_optax._capture.nnx_forms import BASES, form_of, sums_of
from kfqn_optax._capture.routes import Candidate, active
from kfqn_optax._capture.slot import SLOT, Slot
from kfqn_optax._capture.tap import add_virtual_bias, tap

# Part of JAX's trace-cache key, as in ``linen.py``.
_tracing = jax.make_user_context(None)
_searches = itertools.count()


class _Local(threading.local):
    bias_only = False
    calls: dict[str, Form | Unsupported] | None = None


_local = _Local()


class _SlotParam(nnx.Param):
    """The slot of a stacked layer; a Param goes where the layer's parameters go."""


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


@contextlib.contextmanager
def recording() -> Iterator[dict[str, Form | Unsupported]]:
    """Within this context, each tapped layer that is called enters its form there, under its name."""
    _local.calls = calls = {}
    try:
        with _tracing(f"search {next(_searches)}"):
            yield calls
    finally:
        _local.calls = None


NAMES = "kfqn_layers"


def attach(
    model: Any, candidates: Mapping[Path, Sequence[Candidate]], beside: Mapping[Path, Slot] | None = None
) -> None:
    """Tap the layers at these paths of a model.

    Args:
      model: the model.
      candidates: for the path of each module the layers that it may be.
      beside: slots to be put beside kernels.
    """
    modules = modules_of(model)
    for path, found in candidates.items():
        module = modules[path]
        # A string, which is static: what lifts or jits the module takes it along.
        setattr(module, NAMES, "\n".join(f"{len(start)} {layer.name}" for start, layer in found))
        if beside and path in beside:
            setattr(module, SLOT, _SlotParam(dict(beside[path])))
        object.__setattr__(module, "__class__", _tapped_class(type(module)))


def detach(model: Any) -> None:
    """Undo ``attach``."""
    for module in modules_of(model).values():
        if hasattr(type(module), "kfqn_original"):
            for name in (NAMES, SLOT):
                if hasattr(module, name):
                    delattr(module, name)
            object.__setattr__(module, "__class__", type(module).kfqn_original)
            for name, value in list(vars(module).items()):
                # Flax 0.12.0 keeps the names of deleted attributes, as a part of the graph.
                if isinstance(value, Mapping) and (SLOT in value or NAMES in value):
                    make: Any = type(value)
                    kept = make({key: kind for key, kind in value.items() if key not in (SLOT, NAMES)})
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
    names, routes = getattr(module, NAMES).split("\n"), active()
    inputs = args[0] if args else kwargs["inputs"]
    try:
        if base is nnx.Einsum:
            _check_equation(module, args, kwargs)
        check_real(inputs, outputs)
        form = form_of(base, module, inputs.ndim, outputs.shape)
    except Unsupported as reason:
        name = names[0].split(" ", 1)[1]
        if _local.calls is None:
            raise ValueError(
                f"kfqn.value_and_grad: the layer {name} is {base.__name__} {reason}. Give"
                " kfqn.find_layers the arguments of a call, so that it leaves the layer out."
            ) from None
        _local.calls[name] = reason
        return outputs
    if _local.calls is not None:
        _local.calls.setdefault(names[0].split(" ", 1)[1], form)
    if routes is None:
        return outputs
    kernel = as_arrays(getattr(module, form.kernel_name))
    candidates = [routes.named(int(start), name) for start, name in (text.split(" ", 1) for text in names)]
    beside = as_arrays(getattr(module, SLOT)) if hasattr(module, SLOT) else None

    def through_tap(call, slot):
        if _local.bias_only:
            return add_virtual_bias(call, outputs, slot, form.output_axes)
        return tap(call, outputs, kernel, slot, sums_of(form, base, module, inputs, slot), form.output_axes)

    return routes.through(candidates, kernel, beside, outputs, through_tap)


def _check_equation(module: Any, args: tuple, kwargs: dict) -> None:
    given = args[1] if len(args) > 1 else kwargs.get("einsum_str")
    if given is not None and given.replace(" ", "") != module.einsum_str:
        raise Unsupported(f"called with another equation, {given!r}")
