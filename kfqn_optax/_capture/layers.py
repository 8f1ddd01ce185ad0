"""Static facts about a model's layers, and the way between parameters and one matrix per layer.

Every layer has one matrix W of shape ``(*copies, d_in [+ 1], d_out)``: its kernel, inputs before outputs,
over its bias where it has one. ``copies`` are the axes over which a lifted transformation (``nn.scan``,
``nn.vmap``) stacked independent copies of the layer, and the groups of a grouped kernel; they come first
here, wherever the layer keeps them.
"""

import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.table

Path = tuple[str, ...]
CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer that the optimizer preconditions.

    Attributes:
      path: where its parameters live in the parameter tree.
      kind: the Flax layer it is, for example ``"Dense"``.
      groups: how many independent groups of inputs and outputs the kernel has, as in a grouped
        convolution.
      in_dim: d_in, the length of an input row of one group (without the 1 that stands for the bias).
      out_dim: d_out, the length of an output row of one group.
      use_bias: whether the layer adds a bias.
      positions: T, at how many places a convolution applies its kernel to one example; 1 otherwise.
      stack: lengths of the axes over which independent copies of the layer are stacked.
      kernel_axes: where those axes are in the kernel.
      bias_axes: where they are in the bias.
      slot_axes: where they are in the slot.
      kernel_name: the name of the kernel among the layer's parameters.
      kernel_split: the shape of one copy of the kernel with groups on an axis of their own.
      kernel_order: the order of its axes that puts groups first, then inputs, then outputs.
      bias_order: the same for the bias: groups first, then outputs.
      kernel_shape: the shape of the kernel, stacked axes included.
      bias_shape: that of the bias; None without one.
      slot_shapes: shapes of the slot's leaves, stacked axes included (see ``slot.py``).
      dtype: dtype of the statistics and factors, float32 or wider.
    """

    path: Path
    kind: str
    groups: int
    in_dim: int
    out_dim: int
    use_bias: bool
    positions: int
    stack: tuple[int, ...]
    kernel_axes: tuple[int, ...]
    bias_axes: tuple[int, ...]
    slot_axes: tuple[int, ...]
    kernel_name: str
    kernel_split: tuple[int, ...]
    kernel_order: tuple[int, ...]
    bias_order: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    bias_shape: tuple[int, ...] | None
    slot_shapes: Mapping[str, tuple[int, ...]]
    dtype: jnp.dtype

    def __hash__(self) -> int:
        return hash((self.path, self.kind, self.kernel_shape, self.bias_shape))  # slot_shapes has no hash

    @property
    def name(self) -> str:
        """The path as one string, the key of this layer in every state and report."""
        return "/".join(self.path) or "."

    @property
    def rows(self) -> int:
        """Length of a homogeneous input, d_in + 1 with a bias and d_in without."""
        return self.in_dim + self.use_bias

    @property
    def copies(self) -> tuple[int, ...]:
        """Axes of independent matrices: the stacked ones, and the groups if there are several."""
        return self.stack + ((self.groups,) if self.groups > 1 else ())

    @property
    def has_second_moment(self) -> bool:
        """Whether the statistics of this layer hold A, of all rows."""
        return "second_moment" in self.slot_shapes and self.kind not in CONVOLUTIONS

    @property
    def has_patches_moment(self) -> bool:
        """Whether they hold A of a convolution, of the patches of some rows."""
        return "second_moment" in self.slot_shapes and self.kind in CONVOLUTIONS

    @property
    def parameter_shapes(self) -> dict[Path, tuple[int, ...]]:
        shapes = {(*self.path, self.kernel_name): self.kernel_shape}
        if self.use_bias and self.bias_shape is not None:
            shapes[*self.path, "bias"] = self.bias_shape
        return shapes

    def get_matrix(self, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        """The layer's matrix (*copies, d_in [+ 1], d_out) from arrays shaped like its parameters."""
        n = len(self.stack)
        kernel = to_front(kernel, self.kernel_axes).reshape(self.stack + self.kernel_split)
        kernel = kernel.transpose(*range(n), *(n + i for i in self.kernel_order))
        kernel = kernel.reshape((*self.copies, self.in_dim, self.out_dim))
        if bias is None:
            return kernel
        bias = to_front(bias, self.bias_axes)
        bias = bias.transpose(*range(n), *(n + i for i in self.bias_order))
        return jnp.concatenate([kernel, bias.reshape((*self.copies, 1, self.out_dim))], axis=-2)

    def set_matrix(self, matrix: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The kernel and the bias whose matrix this is; the inverse of :meth:`get_matrix`."""
        n = len(self.stack)
        split = [self.kernel_split[i] for i in self.kernel_order]
        kernel = matrix[..., : self.in_dim, :].reshape(*self.stack, *split)
        kernel = kernel.transpose(*range(n), *(n + i for i in _inverse(self.kernel_order)))
        one_copy = [x for i, x in enumerate(self.kernel_shape) if i not in self.kernel_axes]
        kernel = _from_front(kernel.reshape(*self.stack, *one_copy), self.kernel_axes)
        if not self.use_bias or self.bias_shape is None:
            return kernel, None
        one_copy = [x for i, x in enumerate(self.bias_shape) if i not in self.bias_axes]
        bias = matrix[..., -1, :].reshape(*self.stack, *(one_copy[i] for i in self.bias_order))
        bias = bias.transpose(*range(n), *(n + i for i in _inverse(self.bias_order)))
        return kernel, _from_front(bias, self.bias_axes)

    def slot_vector(self, vector: jax.Array) -> jax.Array:
        """The ``vector`` of this layer's slot for a vector (*copies, d_in [+ 1])."""
        shape = self.slot_shapes["vector"]
        one_copy = [x for i, x in enumerate(shape) if i not in self.slot_axes]
        return _from_front(vector[..., : self.in_dim].reshape(*self.stack, *one_copy), self.slot_axes)


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of a model, and the parameters that belong to none; ``print`` it for a table.

    Made by :func:`find_layers` and :func:`join_layers`. Static: it holds shapes and no arrays.

    Attributes:
      found: the layers that are preconditioned.
      others: for every other parameter, its path, shape, and why it belongs to none.
      model: what the layers were found on, for error messages.
    """

    found: tuple[Layer, ...]
    others: tuple[tuple[Path, tuple[int, ...], str], ...]
    model: str

    def __hash__(self) -> int:
        return hash((self.model, *(layer.name for layer in self.found)))

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, name: str) -> Layer:
        for layer in self.found:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}; the layers are {[layer.name for layer in self.found]}")

    def __str__(self) -> str:
        table = rich.table.Table(title=f"layers of {self.model}", box=rich.box.SIMPLE_HEAD)
        table.add_column("preconditioned", overflow="fold")
        table.add_column("kind")
        for heading in ("d_in", "d_out", "copies"):
            table.add_column(heading, justify="right")
        table.add_column("inputs' statistic")
        table.add_column("factors, MB", justify="right")
        total = 0.0
        for layer in self.found:
            sides = (f"{layer.in_dim}{' + 1' if layer.use_bias else ''}", str(layer.out_dim))
            megabytes = _factor_bytes(layer) / 1e6
            total += megabytes
            copies, statistic = str(math.prod(layer.copies)), _statistic(layer)
            table.add_row(layer.name, layer.kind, *sides, copies, statistic, f"{megabytes:.3f}")
        table.caption = f"H_a, H_g and A of kbfgs with its default max_dim: {total:.3f} MB"
        parts: list[rich.table.Table] = [table]
        if self.others:
            rest = rich.table.Table(box=rich.box.SIMPLE_HEAD)
            for heading in ("diagonal factor", "shape", "why"):
                rest.add_column(heading, overflow="fold")
            for path, shape, reason in self.others:
                rest.add_row("/".join(path), str(shape), reason)
            parts.append(rest)
        console = rich.console.Console(file=io.StringIO(), width=108, color_system=None)
        with console.capture() as capture:
            console.print(*parts)
        return capture.get()


MAX_DIM = 8192
LONG_MEMORY = 20


def _statistic(layer: Layer) -> str:
    if layer.kind == "Embed":
        return "counts (diagonal A)"
    return "A" if layer.has_second_moment else "minibatch action"


def _factor_bytes(layer: Layer) -> int:
    """Bytes of kbfgs's factors: squares, or the pairs of limited memory for sides beyond MAX_DIM."""
    side = lambda dim: dim * min(dim, 2 * LONG_MEMORY) if dim > MAX_DIM else dim * dim
    if layer.kind == "Embed":
        inputs = 2 * layer.rows
    else:
        inputs = side(layer.rows) + (layer.rows**2 if layer.has_second_moment else 0)
    return math.prod(layer.copies) * (inputs + side(layer.out_dim)) * layer.dtype.itemsize


def join_layers(parts: Mapping[str, Layers] | Sequence[Layers] | Any) -> Layers:
    """Layers of several models that one loss trains together.

    Args:
      parts: the layers found on each model, in a dictionary, list, (named) tuple or dataclass of the form
        of the parameters that the loss takes.

    Returns:
      The layers of all models, their paths below the key (or the index) of their model.

    Raises:
      TypeError: if anything in ``parts`` is not what :func:`find_layers` returns.
      ValueError: if two layers would have the same name.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, kfqn_optax as kfqn
      >>> encoder, decoder, x = nn.Dense(2), nn.Dense(3), jnp.ones((5, 3))
      >>> v = encoder.init(jax.random.key(0), x)
      >>> w = decoder.init(jax.random.key(1), x[:, :2])
      >>> params = {"encoder": v["params"], "decoder": w["params"]}  # what loss_fn takes
      >>> layers = kfqn.join_layers({
      ...     "encoder": kfqn.find_layers(encoder, v, x),
      ...     "decoder": kfqn.find_layers(decoder, w, x[:, :2]),
      ... })
      >>> [layer.name for layer in layers]
      ['encoder', 'decoder']
    """
    if dataclasses.is_dataclass(parts) and not isinstance(parts, (Layers, type)):
        parts = {field.name: getattr(parts, field.name) for field in dataclasses.fields(parts)}
    if not isinstance(parts, (Mapping, Sequence)) or isinstance(parts, str):
        raise TypeError(
            f"kfqn.join_layers: got a {type(parts).__name__}. Give a dictionary or list of what"
            " kfqn.find_layers returns, one of each model."
        )
    if not parts:
        raise ValueError("kfqn.join_layers: got no layers. Give those of each model, by its key.")
    as_dict = getattr(parts, "_asdict", None)  # of a NamedTuple
    given: Any = parts if as_dict is None else as_dict()
    items = given.items() if isinstance(given, Mapping) else enumerate(given)
    found, others, models = [], [], []
    for key, part in items:
        if not isinstance(part, Layers):
            raise TypeError(
                f"kfqn.join_layers: at {key!r} there is a {type(part).__name__}, not what"
                " kfqn.find_layers returns."
            )
        prefix = str(key)
        found += [dataclasses.replace(layer, path=(prefix, *layer.path)) for layer in part]
        others += [((prefix, *path), shape, reason) for path, shape, reason in part.others]
        models.append(f"{prefix}: {part.model}")
    owners: dict[str, str] = {}
    for layer in found:
        owner = owners.setdefault(layer.name, layer.path[0])
        if owner != layer.path[0]:
            raise ValueError(
                f"kfqn.join_layers: {owner!r} and {layer.path[0]!r} both have a layer {layer.name!r}. Give"
                " the models keys without a slash."
            )
    return Layers(tuple(found), tuple(others), ", ".join(models))


def to_front(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.moveaxis(array, axes, tuple(range(len(axes))))


def _from_front(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.moveaxis(array, tuple(range(len(axes))), axes)


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))
