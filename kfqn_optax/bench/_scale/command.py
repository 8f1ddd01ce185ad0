"""The command: a table of each axis, and a plot of all."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import rich.box
import rich.table

from kfqn_optax.bench._folder import prepare_folder
from kfqn_optax.bench._options import Parser, known, positive
from kfqn_optax.bench._output.environment import environment
from kfqn_optax.bench._output.figure import require_matplotlib
from kfqn_optax.bench._output.record import write_json
from kfqn_optax.bench._output.table import print_table
from kfqn_optax.bench._profile.methods import PROFILED
from kfqn_optax.bench._scale.cost import Cost, costs_of, costs_on_devices
from kfqn_optax.bench._scale.network import Size
from kfqn_optax.bench._scale.plot import save_plot

AXES: Mapping[str, tuple[Size, tuple[int, ...]]] = {
    "width": (Size(), (128, 256, 512, 1_024, 2_048, 4_096)),
    "depth": (Size(width=128), (2, 4, 8, 16, 32, 64)),
    "batch": (Size(), (32, 128, 512, 2_048, 8_192, 16_384)),
    "devices": (Size(width=1_024), (1, 2, 4, 8)),
}
QUICK = {"width": (8, 16), "depth": (1, 2), "batch": (16, 32), "devices": (2,)}
QUICK_SIZE = Size(width=16, depth=1, batch=32)


def scale(arguments: Sequence[str]) -> int:
    """Measure what ``arguments`` ask for and return the exit status."""
    options = _parser().parse_args(arguments)
    if options.out is not None:
        require_matplotlib()
        prepare_folder(options.out)
    costs: list[Cost] = []
    for cost in _costs(options):
        costs.append(cost)
        print(f"{cost.axis} {cost.value}, {cost.method}: {1e3 * cost.seconds:.1f} ms", file=sys.stderr)
    for axis in options.axes:
        print_table(_table(axis, [cost for cost in costs if cost.axis == axis]))
    if options.out is not None:
        records = [cost._asdict() for cost in costs]
        write_json({"environment": environment(), "costs": records}, options.out / "scale.json")
        save_plot(costs, options.out / "scale.png")
        print(f"saved scale.json and scale.png in {options.out}")
    return 0


def _costs(options: argparse.Namespace) -> Iterator[Cost]:
    for axis in options.axes:
        usual, values = (QUICK_SIZE, QUICK[axis]) if options.quick else AXES[axis]
        for value in values:
            if axis == "devices":
                yield from costs_on_devices(value, usual, options.steps)
            else:
                size = usual._replace(**{axis: value})
                yield from costs_of(axis, value, size, options.methods, options.steps)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m kfqn_optax.bench scale",
        description="Cost and memory of a step of networks of tanh layers, one thing varied at a time, in"
        " a run under way: the first 30 steps of kfac are dearer."
        " Devices are simulated: they share this machine's cores, so that their memory and operations tell,"
        " and not their seconds.",
    )
    add = parser.add_argument
    names = f"of {', '.join(AXES)} (default all)"
    add("--axes", type=known(AXES), nargs="+", default=list(AXES), metavar="A", help=names)
    among = f"of {', '.join(PROFILED)}, beside adam (default kfac kbfgs)"
    add("--methods", type=known(PROFILED), nargs="+", default=["kfac", "kbfgs"], metavar="A", help=among)
    add("--steps", type=positive(int), default=8, metavar="N", help="timed, of each (default 8)")
    add("--quick", action="store_true", help="tiny networks")
    add("--out", type=Path, metavar="DIR", help="write scale.json and scale.png there too")
    return parser


def _table(axis: str, costs: Sequence[Cost]) -> rich.table.Table:
    size = AXES[axis][0]
    fixed = {name: value for name, value in size._asdict().items() if name != axis}
    title = f"{axis} ({', '.join(f'{name} {value:,}' for name, value in fixed.items())})"
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD)
    table.add_column(axis, justify="right")
    table.add_column("method")
    for heading in ("ms/step", "x Adam", "compile s", "GFLOP, dearest step", "state, MB a device"):
        table.add_column(heading, justify="right")
    for cost in costs:
        numbers = f"{1e3 * cost.seconds:.1f}", f"{cost.in_adams:.2f}", f"{cost.compile_seconds:.1f}"
        more = f"{cost.gflop:.3g}", f"{cost.state_mb:.3g}"
        table.add_row(f"{cost.value:,}", cost.method, *numbers, *more)
    return table
