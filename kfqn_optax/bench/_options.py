"""The options of the command line, and what is wrong with those given, each as one line."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kfqn_optax.bench._errors import UserError
from kfqn_optax.bench._methods import COMPARED, METHODS, SETTINGS, learning_rate
from kfqn_optax.bench._problems import PROBLEMS

DEFAULT_SECONDS = 60.0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check; ``learning_rates`` then has those of each method asked for, in order."""
    options = _parser().parse_args(arguments)
    given = dict(vars(options).pop("learning_rate"))
    for name in given:
        if name not in options.methods:
            raise UserError(f"--learning-rate {name}=...: {name} is not among --methods")
    options.learning_rates = {
        name: given.get(name) or [learning_rate(name, options.problem, options.setting)]
        for name in options.methods
    }
    if options.epochs is None and options.seconds is None:
        options.seconds = DEFAULT_SECONDS
    return options


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m kfqn_optax.bench",
        description="Train deep autoencoders with several optimizers and compare them.",
        epilog="As the first word: suite, profile, sweep, scale, faults, soak, resume, each with a --help.",
    )

    def add(name: str, to: Any = parser, **settings: Any) -> None:
        to.add_argument(name, **settings)

    add("--problem", type=known(PROBLEMS), default="curves", help=", ".join(PROBLEMS))
    add("--data-dir", type=Path, metavar="DIR", help="folder of the MNIST files or orl_faces.npz")
    among = f"of {', '.join(METHODS)} (default {','.join(COMPARED)})"
    add("--methods", type=_methods, default=COMPARED, metavar="A,B", help=among)
    limit = parser.add_mutually_exclusive_group()
    add("--epochs", to=limit, type=positive(int), metavar="N", help="epochs of each run")
    seconds = f"training seconds of each run (default {DEFAULT_SECONDS:g}, unless --epochs)"
    add("--seconds", to=limit, type=positive(float), metavar="S", help=seconds)
    target = "end a run early when the training loss is no higher; shows epochs and seconds to it"
    add("--target", type=positive(float), metavar="LOSS", help=target)
    add("--seed", type=seed, nargs="+", default=[0], metavar="N", help="one run each (default 0)")
    add("--batch-size", type=positive(int), default=1000, metavar="N", help="default 1000")
    rate = {
        "type": assignment(METHODS),
        "action": "append",
        "default": [],
        "metavar": "METHOD=VALUE[,VALUE...]",
    }
    add("--learning-rate", help="one run each; may be repeated for other methods", **rate)
    setting = "paper: learning rate and damping 0.3, no norm constraint; capped: with one of 3"
    add("--setting", choices=SETTINGS, default="default", help=f"of our methods; {setting}")
    out = "where the plot and the JSON go (default bench-results)"
    add("--out", type=Path, default=Path("bench-results"), metavar="DIR", help=out)
    return parser


def known(names: Mapping[str, Any]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"unknown {text!r}; known are {', '.join(names)}")
        return text

    return parse


def _methods(text: str) -> list[str]:
    return list(dict.fromkeys(map(known(METHODS), text.split(","))))


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            number = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"expected a {number} above 0, got {text!r}")
        return value

    return parse


def seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def assignment(methods: Mapping[str, Any]) -> Callable[[str], tuple[str, list[float]]]:
    """Parse METHOD=VALUE[,VALUE...] for one of these methods."""

    def parse(text: str) -> tuple[str, list[float]]:
        name, equals, values = text.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"expected METHOD=VALUE, for example sgd=0.1, got {text!r}")
        return known(methods)(name), [positive(float)(value) for value in values.split(",")]

    return parse
