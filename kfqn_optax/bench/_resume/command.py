"""The command: one row a method, and exit status 1 if a run that was killed is another one."""

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rich.box
import rich.table

from kfqn_optax.bench._errors import UserError
from kfqn_optax.bench._faults.run import METHODS
from kfqn_optax.bench._options import Parser, known, positive
from kfqn_optax.bench._output.table import print_table
from kfqn_optax.bench._resume.trainer import LAST
from kfqn_optax.bench._simulated import simulated

DEVICES, MOST_STEPS, MORE, ROUNDING = 4, 40, 20, 1e-9


class Row(NamedTuple):
    """A method's runs.

    Attributes:
      kills: how often one of them was killed.
      again: steps that it made a second time.
      equal: whether its last state is that of a run without a kill, bit by bit.
      difference: of the parameters after 20 more steps on four devices from those on one, from the same
        checkpoint; the largest, over the largest parameter. Rounding grows: hundreds of steps are too many.
    """

    method: str
    steps: int
    kills: int
    again: int
    equal: bool
    difference: float

    @property
    def held(self) -> bool:
        return self.equal and self.difference <= ROUNDING


def resume(arguments: Sequence[str]) -> int:
    """Run what ``arguments`` ask for and return the exit status."""
    parser = Parser(
        prog="python -m kfqn_optax.bench resume",
        description="A small network is trained in float64, in processes that are killed (SIGKILL) at any"
        f" moment, each of which goes on from the newest checkpoint; and for {MORE} steps on four simulated"
        " devices. Exits with 1 if the last state is not that of a run without a kill, bit by bit, or the"
        f" parameters of the run on four devices differ by more than {ROUNDING:g}.",
    )
    among = f"of {', '.join(METHODS)} (default all)"
    parser.add_argument("--methods", type=known(METHODS), nargs="+", default=list(METHODS), help=among)
    parser.add_argument("--kills", type=positive(int), default=20, metavar="N", help="default 20")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            rows.append(_row(Path(folder), method, options.kills))
            print(f"{method}: {rows[-1].kills} kills", file=sys.stderr)
    print_table(_table(rows))
    return int(not all(row.held for row in rows))


def _row(folder: Path, method: str, kills: int) -> Row:
    steps = MOST_STEPS * (kills + 1)
    whole, killed, alone, divided = (folder / f"{method}_{k}" for k in range(4))
    _train(whole, method, steps)
    _train(alone, method, steps // 2)
    shutil.copytree(alone, divided)
    _train(alone, method, steps // 2 + MORE)
    _train(divided, method, steps // 2 + MORE, devices=DEVICES)
    chance = random.Random(0)
    made = sum(_train(killed, method, steps, until=chance.randint(1, MOST_STEPS)) for _ in range(kills))
    made += _train(killed, method, steps)
    first, other = _last(whole), _last(killed)
    equal = all(np.array_equal(first[name], other[name]) for name in first)
    one, four = _last(alone), _last(divided)
    params = [name for name in one if "params" in name]
    largest = max(np.abs(one[name]).max() for name in params)
    difference = max(np.abs(one[name] - four[name]).max() for name in params)
    return Row(method, steps, kills, made - steps, equal, float(difference / largest))


def _last(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / LAST) as leaves:
        return dict(leaves)


def _train(folder: Path, method: str, steps: int, devices: int = 1, until: int | None = None) -> int:
    """Train in a process, which is killed at a moment after its step ``until``, and count its steps."""
    asked = json.dumps({"folder": str(folder), "method": method, "steps": steps})
    command = [sys.executable, "-m", "kfqn_optax.bench._resume.trainer", asked]
    environment = simulated(devices) | {
        "JAX_ENABLE_X64": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    made = 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for made, _ in enumerate(process.stdout, 1):
            if made == until:
                process.kill()
    if process.returncode != (0 if until is None else -signal.SIGKILL):
        raise UserError(f"{method}: the process that trains ended with {process.returncode}; see above")
    return made


def _table(rows: Sequence[Row]) -> rich.table.Table:
    table = rich.table.Table(title="Killed and resumed, in float64", box=rich.box.SIMPLE_HEAD)
    table.add_column("method")
    for heading in ("steps", "kills", "steps made twice"):
        table.add_column(heading, justify="right")
    table.add_column("last state")
    table.add_column(f"{MORE} steps on {DEVICES} devices, difference", justify="right")
    table.add_column("")
    for row in rows:
        numbers = f"{row.steps:,}", str(row.kills), str(row.again)
        state = "bit-equal" if row.equal else "another one"
        verdict = "" if row.held else "did not hold"
        table.add_row(row.method, *numbers, state, f"{row.difference:.1e}", verdict)
    return table
