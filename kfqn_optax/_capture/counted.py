"""Whether a loss is a mean over any number of examples, of which some may be taken: traced, and not run."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kfqn_optax._capture.call import Call
from kfqn_optax._capture.examples import count_examples, twice
from kfqn_optax._capture.growth import growth
from kfqn_optax._capture.loss import Loss, is_forward_mode
from kfqn_optax._warnings import warn_once

# What a loss raises that asks for the values of its arguments, in ``if`` or by NumPy.
_ASKS_FOR_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)

# What goes wrong with numbers and not with shapes, where a loss is not traced; and what JAX cannot do.
_OF_RUNNING = (ArithmeticError, NotImplementedError, jax.errors.JaxRuntimeError)


class Counted:
    """The loss of one call, with its own examples and with twice as many."""

    def __init__(self, owner: Loss, call: Call):
        self.owner, self.call = owner, call
        self.examples = count_examples(owner.batch_argnums, call.args)

    @functools.cached_property
    def growth(self) -> float | None:
        """The loss of twice as many examples is 2^growth times as large; None if that is not known."""
        once, doubled = self._program(self.call.args), self._twice
        return None if once is None or doubled is None else growth(once, doubled)

    def check_number(self) -> None:
        """Raise unless the loss can be called with another number of examples."""
        if self.examples is not None:
            with self.of_other_number(2 * self.examples):
                _ = self._twice

    @contextlib.contextmanager
    def of_other_number(self, rows: int) -> Iterator[None]:
        """What the loss raises here is due to its other number of examples, and is told so."""
        try:
            yield
        except (*_ASKS_FOR_VALUES, *_OF_RUNNING):
            raise
        except Exception as error:
            if is_forward_mode(error):
                raise
            raise ValueError(self._other_number(rows, error)) from error

    def check_part(self) -> None:
        """Before a part is taken: raise if the loss is known to be more than a mean over the examples."""
        numbers = self.owner.batch_argnums
        if self._alike:
            warn_once(
                f"kfqn.value_and_grad: batch_argnums={numbers} leaves out argument {self._alike[0]} of"
                f" loss_fn, which has {self.examples} rows, too. All of them stay where the optimizer takes"
                " some of the examples. If it has a row for each example, name it there."
            )
        if self.growth is not None and self.growth > 0:
            raise ValueError(
                f"kfqn.value_and_grad: with twice the examples of batch_argnums={numbers}, loss_fn is"
                f" {2**self.growth:.3g} times as large, as its program tells: it is a sum and not a mean."
                f" The optimizer takes some of the {self.examples} examples, and their loss must be that of"
                " all, but for chance. Take the mean over the examples that loss_fn gets (jnp.mean,"
                " or divide by the sum of a mask). Or leave out batch_argnums: then all examples are taken."
            )

    @functools.cached_property
    def _twice(self) -> Any:
        return self._program(twice(self.owner.batch_argnums, self.call.args))

    def _program(self, args: tuple[Any, ...]) -> Any:
        """The program of the loss, whose arguments are those that count examples.

        None where the loss asks for their values, which a program does not have.
        """
        numbers = self.owner.batch_argnums

        def loss(batch):
            given = list(args)
            for number, argument in zip(numbers, batch, strict=True):
                given[number - 1] = argument
            call = self.call.with_args(tuple(given))
            return call.value(self.owner.loss_fn, call.params, self.owner.has_aux)

        try:
            return jax.make_jaxpr(loss)([args[number - 1] for number in numbers])
        except _ASKS_FOR_VALUES:
            return None

    @property
    def _alike(self) -> list[int]:
        """Positions of other arguments whose leaves all have as many rows as there are examples."""
        others = [(i, arg) for i, arg in enumerate(self.call.args, 1) if i not in self.owner.batch_argnums]
        starts = [(i, {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(arg)}) for i, arg in others]
        return [i for i, lengths in starts if lengths == {(self.examples,)}]

    def _other_number(self, rows: int, error: Exception) -> str:
        numbers, alike = self.owner.batch_argnums, self._alike
        if alike:
            listed = f"Argument {alike[0]} has" if len(alike) == 1 else f"Arguments {alike} have"
            both = tuple(sorted((*numbers, *alike)))
            remedy = f"{listed} {self.examples} rows, too: give batch_argnums={both}."
        else:
            remedy = (
                "An array with an entry for each example that loss_fn finds elsewhere must be a positional"
                " argument and named in batch_argnums; and loss_fn must not ask for a shape with the number"
                " of examples in it."
            )
        said = (str(error).strip() or "no message").splitlines()[0][:200]
        return (
            f"kfqn.value_and_grad: loss_fn works with its {self.examples} examples and not with {rows}"
            f" ({type(error).__name__}: {said}). With batch_argnums={numbers} the optimizer takes some of"
            f" the examples. {remedy} Or leave out batch_argnums: then all examples are taken."
        )
