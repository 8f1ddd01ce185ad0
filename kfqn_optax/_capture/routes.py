"""Which slot a call of a layer sends its statistics to.

The loss is given its parameters as they are, without slots. So it may take norms of them, steps along their
gradients, averages and squares, or combine them with any other tree, as with ``jax.grad``. The slots come
beside the parameters, with the context in which the loss is traced, and a call has to be matched with its
layer:

* The parameters of the outermost module that the loss calls tell which part of the tree that module has
  (:meth:`Routes.enter`), and with it the paths of the layers below.
* Several parts fit where models are alike (twins in ``join_layers``). Then it is the one that holds the
  very array which the module was given; or else the one that the kernel depends on, which one more abstract
  trace of the loss tells for each part (:meth:`Routes._depending_on`).
* A layer that finds a slot beside its kernel takes that one. Layers whose copies a lifted transformation
  stacks are given theirs so, since each copy needs its own, by the outermost module that has the stack. So
  are those for which the loss itself asks (:func:`with_slots`).
* Where none of this tells, the loss is given slots among its parameters after all (:class:`NeedsSlots`): a
  model that is ``nn.vmap(...)()`` itself, a loss that scans over stacked parameters, twins that share one
  trace under ``jax.jit``. So it is where layers are called inside a ``jax.custom_vjp``, whose derivatives
  are those of its arguments alone, if that brings them to life (:meth:`TreeCall.value_and_grad`).
"""

import contextlib
import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import Params as ArrayTree

from kfqn_optax._capture.layers import Layer, Layers, Path
from kfqn_optax._capture.parameters import leaves_by_path, put
from kfqn_optax._capture.reached import Reached
from kfqn_optax._capture.slot import SLOT, Slot

# Part of JAX's trace-cache key. What is traced in one pass holds the slots of that pass, which are tracers,
# so a function that is jitted on its own inside a loss is traced anew in each.
_tracing = jax.make_user_context(None)
_passes = itertools.count()


@dataclasses.dataclass(eq=False)
class TapCall:
    """One call of a layer.

    Attributes:
      index: its place in the order in which the loss makes its calls, the same in every pass.
      layer: the name of the layer.
      counts: whether the kernel depends on the parameters. None: the derivative that is being taken tells.
      probe: an array that only the derivative of this pass moves; None: a slot is one.
      moved: whether any derivative moved the kernel.
      live: whether that of this pass did, and came through the slot.
      idle: whether that of this pass left it where it was, for one trace may serve calls of both kinds.
    """

    index: int
    layer: str
    counts: bool | None
    probe: jax.Array | None = None
    moved: bool = False
    live: bool = False
    idle: bool = False


class NeedsSlots(Exception):  # noqa: N818 (caught, and the loss is given slots among its parameters)
    """Only a slot beside its kernel can tell which layer, or which copy of a stacked one, a call is of."""


class Candidate(NamedTuple):
    """A layer that a call may be of, and what the paths of its model in the tree start with."""

    start: Path
    layer: Layer


class Record(Reached):
    """What the first pass over a loss shows while it is traced."""

    def __init__(self):
        super().__init__()
        self.calls: list[TapCall] = []

    def clear(self) -> None:
        self.any = False
        self.calls.clear()

    @property
    def live(self) -> set[str]:
        """Layers of which a call depends on the parameters, as the derivative of the pass has it."""
        return {call.layer for call in self.calls if call.live}

    @property
    def silent(self) -> set[str]:
        """Layers that are called, and none of whose calls is live."""
        return {call.layer for call in self.calls} - self.live

    @property
    def depends(self) -> bool:
        """Whether the loss depends on a call of a layer with the parameters that it was given."""
        return self.any and bool(self.live)

    @property
    def counts(self) -> dict[int, bool]:
        """For each call by its index, whether its kernel depends on the parameters."""
        return {call.index: call.live for call in self.calls}

    @property
    def mixed(self) -> bool:
        """Whether calls that count and calls that do not share a trace, so that ``counts`` cannot tell."""
        return any(call.live and call.idle for call in self.calls)

    @property
    def unseen(self) -> list[str]:
        """Layers whose calls all were where only a derivative of the loss's own moves their kernels."""
        return sorted({call.layer for call in self.calls if call.moved} - self.live - {""})


@dataclasses.dataclass
class Found:
    """What the first pass found out for those after it.

    Attributes:
      counts: :attr:`Record.counts`; None where it cannot tell.
      beside: whether the loss is given slots among its parameters.
    """

    counts: dict[int, bool] | None = dataclasses.field(default_factory=dict)
    beside: bool = False


class Routes:
    """The slots of one pass over a loss, and which call takes which.

    Args:
      layers: the layers.
      params: the parameters as the loss is given them.
      slots: for each layer name its slot.
      loss: the loss as a function of the parameters alone.
      counts: what the first pass recorded, for a pass that does not differentiate the parameters.
      record: where this pass enters its calls.
      asked: whether the slots among the parameters, if there are any, are those that the loss asked for.
        Otherwise a derivative of the loss's own may be one in them, and has to be told from that of the
        pass.
    """

    def __init__(
        self,
        layers: Layers,
        params: ArrayTree,
        slots: Mapping[str, Slot],
        loss: Callable[[ArrayTree], Any],
        counts: Mapping[int, bool] | None = None,
        record: Record | None = None,
        asked: bool = True,
    ):
        self.layers, self.slots = layers, slots
        self._params, self._loss, self._counts, self._record = params, loss, counts, record
        self._asked = asked
        given, _ = leaves_by_path(params)
        kernels = {layer.name: given.get((*layer.path, layer.kernel_name)) for layer in layers}
        self._owner = {id(kernels[x.name]): x for x in layers if kernels[x.name] is not None}
        self._by_path = {layer.path: layer for layer in layers}
        self._starts: list[Path] | None = None  # while a module runs: the parts of the tree it may have
        self._index = itertools.count()
        self.finished = False  # in the backward part of the pass only slots among the arguments are at hand
        self._depending: dict[Path, set[int]] = {}

    @property
    def entered(self) -> bool:
        """Whether a module runs."""
        return self._starts is not None

    @contextlib.contextmanager
    def enter(self, place: Path, visible: Mapping[Path, Any]) -> Iterator[dict[Path, Slot]]:
        """The context in which the outermost module of a call runs.

        Args:
          place: its path below the module that was applied.
          visible: its parameters, by their path below it.

        Yields:
          Slots to be put beside the kernels of stacked layers, by their path below the module.
        """
        self._starts = self._parts(place, visible)
        try:
            yield self._beside_stacks(place, visible)
        finally:
            self._starts = None

    def candidates(self, path: Path, kernel: jax.Array, whole: bool = False) -> list[Candidate]:
        """The layers that the module at ``path`` of the model that runs may be.

        ``whole``: with the kernels of all copies, where those are stacked.
        """
        if id(kernel) in self._owner:
            return [Candidate((), self._owner[id(kernel)])]
        found = [(start, self._by_path.get((*start, *path))) for start in self._starts or ()]
        return [Candidate(s, x) for s, x in found if x is not None and _fits(x, kernel, whole)]

    def named(self, start: int, name: str) -> Candidate:
        """The layer of this name, of a model whose paths in the tree start with so many keys."""
        layer = self.layers[name]
        return Candidate(layer.path[:start], layer)

    def through(
        self,
        candidates: list[Candidate],
        kernel: jax.Array,
        beside: Slot | None,
        outputs: jax.Array,
        tap: Callable[[TapCall, Slot], jax.Array],
    ) -> jax.Array:
        """``tap(call, slot)`` for a call of one of the candidates, or ``outputs`` if it is none of them.

        ``beside`` is the slot that the module found beside its kernel.
        """
        index = next(self._index)
        layer = None
        if beside is None or len(candidates) == 1:
            layer = self._which(index, candidates)
        if beside is None:
            if layer is None or (layer.stack and self._is_constant(index, layer)):
                return outputs
            if self.finished:
                if self._record is not None:
                    self._record.calls.append(TapCall(index, layer.name, False))
                return outputs
            beside = self.slots[layer.name]
        counts = None if self._counts is None else self._counts.get(index, True)
        probe = None if self._asked or self.finished else next(iter(self.slots.values()))["rows"]
        call = TapCall(index, "" if layer is None else layer.name, counts, probe)
        if self._record is not None:
            self._record.calls.append(call)
        with _unrouted():  # a convolution's sums are calls of layers, too
            return tap(call, beside)

    def _is_constant(self, index: int, layer: Layer) -> bool:
        """Whether the kernel of a copy that has no slot depends on no parameter; raises if it does."""
        if self._asked:
            raise NeedsSlots
        if index in self._depending_on(()):
            raise ValueError(
                f"kfqn.value_and_grad: the layer {layer.name!r} has stacked copies {layer.stack}, and"
                " loss_fn applies one of them on its own, without its slot. Inside loss_fn take it from"
                " params = kfqn.with_slots(params)."
            )
        return True

    def _parts(self, place: Path, visible: Mapping[Path, Any]) -> list[Path]:
        """What the paths of a module's parameters in the tree may start with, before ``place``.

        Those below which most layers are found, in the shapes they have; of these, those that hold the
        same arrays.
        """
        found: dict[Path, int] = {}
        same: dict[Path, int] = {}
        for layer in self.layers:
            for end in range(len(layer.path) + 1):
                above, below = layer.path[:end], layer.path[end:]
                start = above[: len(above) - len(place)]
                kernel = visible.get((*below, layer.kernel_name))
                if kernel is None or (*start, *place) != above or not _fits(layer, kernel, whole=True):
                    continue
                found[start] = found.get(start, 0) + 1
                same[start] = same.get(start, 0) + (self._owner.get(id(kernel)) is layer)
        most = max(same.values(), default=0)
        chosen = {start: count for start, count in found.items() if same[start] == most}
        return [start for start, count in chosen.items() if count == max(chosen.values())]

    def _beside_stacks(self, place: Path, visible: Mapping[Path, Any]) -> dict[Path, Slot]:
        slots: dict[Path, Slot] = {}
        for start in self._starts or ():
            above = (*start, *place)
            for layer in self.layers:
                path = layer.path[len(above) :]
                kernel = visible.get((*path, layer.kernel_name))
                if not layer.stack or layer.path[: len(above)] != above or kernel is None:
                    continue
                if jnp.shape(kernel) != layer.kernel_shape or (*path, SLOT, "rows") in visible:
                    continue
                if path in slots:
                    raise NeedsSlots
                slots[path] = self.slots[layer.name]
        return slots

    def _which(self, index: int, candidates: list[Candidate]) -> Layer | None:
        """The candidate that the kernel of call ``index`` depends on, if there is a choice."""
        if len(candidates) > 1:
            names = [layer.name for _, layer in candidates]
            candidates = [found for found in candidates if index in self._depending_on(found.start)]
            if len(candidates) > 1 and self._asked:
                raise NeedsSlots
            if len(candidates) > 1:
                raise ValueError(_several(names))
        return candidates[0].layer if candidates else None

    def _depending_on(self, start: Path) -> set[int]:
        """The calls whose kernels depend on the layers below ``start``; the loss is traced, and not run."""
        if start not in self._depending:
            leaves, structure = jax.tree.flatten(self._params)
            place = {path: i for i, path in enumerate(leaves_by_path(self._params)[0])}
            own = [x for x in self.layers if x.path[: len(start)] == start]
            moving = [place[*layer.path, layer.kernel_name] for layer in own]
            met: set[int] = set()

            def value(kernels, probe):
                moved = list(leaves)
                for i, kernel in zip(moving, kernels, strict=True):
                    moved[i] = kernel
                with _active(_Question(met, probe)):
                    returned = self._loss(jax.tree.unflatten(structure, moved))
                return jax.tree.leaves(returned)[0]

            gradient = jax.grad(value, argnums=(0, 1))
            jax.eval_shape(gradient, [jnp.asarray(leaves[i]) for i in moving], jnp.zeros([]))
            self._depending[start] = met
        return self._depending[start]


class _Question(Routes):
    """In the place of routes: which calls have kernels that the derivative being taken moves."""

    def __init__(self, met: set[int], probe: jax.Array):
        self._met, self._probe = met, probe
        self._index, self.slots = itertools.count(), {}

    @property
    def entered(self) -> bool:
        return True

    def candidates(self, path, kernel, whole=False):
        return []

    def named(self, start, name):
        return ()

    def through(self, candidates, kernel, beside, outputs, tap):
        return _asked(self._met, next(self._index), outputs, kernel, self._probe)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _asked(met, index, outputs, kernel, probe):
    del met, index, kernel, probe
    return outputs


def _asked_forward(met, index, outputs, kernel, probe):
    if kernel.perturbed and probe.perturbed:  # only our own derivative moves the probe
        met.add(index)
    return _asked(met, index, outputs.value, kernel.value, probe.value), None


_asked.defvjp(_asked_forward, lambda met, index, residuals, g: (g, None, None), symbolic_zeros=True)


def active() -> Routes | None:
    """The routes of the pass that is being traced."""
    return _local.routes


@contextlib.contextmanager
def routing(routes: Routes) -> Iterator[None]:
    """The context in which the loss runs. The routes stay until the whole pass is over."""
    _local.routes = routes
    with _tracing(next(_passes)):
        yield
    routes.finished = True


@contextlib.contextmanager
def whole_pass() -> Iterator[None]:
    """The context of a pass: of the loss and of its derivative."""
    before = _local.routes
    try:
        with _tracing(next(_passes)):
            yield
    finally:
        _local.routes = before


@contextlib.contextmanager
def _unrouted() -> Iterator[None]:
    before = _local.routes
    _local.routes = None
    try:
        yield
    finally:
        _local.routes = before


@contextlib.contextmanager
def _active(routes: Routes) -> Iterator[None]:
    before = _local.routes
    _local.routes = routes
    try:
        with _tracing(next(_passes)):
            yield
    finally:
        _local.routes = before


class _Local(threading.local):
    routes: Routes | None = None


_local = _Local()


def with_slots(params: ArrayTree) -> ArrayTree:
    """``params`` with the slots of the statistics beside the layers' kernels, for use inside ``loss_fn``.

    Hardly any loss needs it: slots reach the layers by themselves. Use it where an error says so: where
    ``loss_fn`` makes parameters for a layer of which nothing else can tell whose they are. Each slot is a
    dictionary of zeros, ``"kfqn_slot"``. A function with a ``jax.custom_vjp`` must return its gradients
    with those of the parameters, as ``jax.vjp`` does.

    Args:
      params: the parameters as ``loss_fn`` was given them.

    Returns:
      The parameters with slots. Where no statistics are taken, ``params`` as they are.

    Example:
      >>> import kfqn_optax as kfqn
      >>> kfqn.with_slots({"dense": {"kernel": 1.0}})
      {'dense': {'kernel': 1.0}}
    """
    routes = active()
    if routes is None or not routes.slots:
        return params
    for layer in routes.layers:
        params = put(params, layer.path, SLOT, dict(routes.slots[layer.name]))
    return params


def without_slots(params: Any) -> Any:
    """``params`` without the slots that :func:`with_slots` put into them; what has none stays as it is.

    Example:
      >>> import kfqn_optax as kfqn
      >>> kfqn.without_slots({"dense": {"kernel": 1.0, "kfqn_slot": {"rows": 0.0}}})
      {'dense': {'kernel': 1.0}}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    if not any(jax.tree_util.DictKey(SLOT) in path for path, _ in leaves):
        return params
    if isinstance(params, (tuple, list)):
        plain = [without_slots(value) for value in params]
        return type(params)(*plain) if hasattr(params, "_fields") else type(params)(plain)
    if not hasattr(params, "items"):
        return params
    plain = {key: without_slots(value) for key, value in params.items() if key != SLOT}
    return plain if isinstance(params, dict) else type(params)(plain)


def _fits(layer: Layer, kernel: jax.Array, whole: bool = False) -> bool:
    """Whether a kernel has the shape of one copy of the layer's, or that of the whole stack."""
    shape = jnp.shape(kernel)
    one_copy = tuple(x for i, x in enumerate(layer.kernel_shape) if i not in layer.kernel_axes)
    return shape == one_copy or (whole and shape == layer.kernel_shape)


def _several(names: list[str]) -> str:
    return (
        f"kfqn.value_and_grad: loss_fn calls a layer that may be any of {names}, and its kernel depends on"
        " several of them. Apply each model to its own part of the parameters, or let what loss_fn makes of"
        " them bring the slots along: params = kfqn.with_slots(params)."
    )
