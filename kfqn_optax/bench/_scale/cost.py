"""What a step of one method costs on networks of one size."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from kfqn_optax.bench._errors import UserError
from kfqn_optax.bench._profile.methods import ADAM, PROFILED
from kfqn_optax.bench._profile.step import Timed, step_of, take_turns
from kfqn_optax.bench._scale.network import Size, task_of
from kfqn_optax.bench._simulated import simulated


class Cost(NamedTuple):
    """A step's cost.

    Attributes:
      axis: what is varied, and ``value`` its value.
      seconds: of a step.
      in_adams: the same in steps of Adam that took turns with it.
      compile_seconds: of the step.
      gflop: operations of a device in its dearest step.
      state_mb: of the optimizer's state on one device.
    """

    axis: str
    value: int
    method: str
    seconds: float
    in_adams: float
    compile_seconds: float
    gflop: float
    state_mb: float


def costs_of(axis: str, value: int, size: Size, methods: list[str], steps: int) -> list[Cost]:
    """Of Adam and of each of these methods, taking turns."""
    task = task_of(size)
    timed = {"adam": step_of(task, ADAM)} | {name: step_of(task, PROFILED[name]) for name in methods}
    take_turns(list(timed.values()), steps)
    adam = timed["adam"].mean_seconds
    return [cost_of(axis, value, name, step, adam) for name, step in timed.items()]


def cost_of(axis: str, value: int, name: str, step: Timed, adam: float) -> Cost:
    state = step.arguments[1]
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    seconds = step.mean_seconds
    return Cost(
        axis, value, name, seconds, seconds / adam, step.compile_seconds, step.flops / 1e9, held / 1e6
    )


def costs_on_devices(devices: int, size: Size, steps: int) -> list[Cost]:
    """Of ``kfac`` with its factors divided, in a process that simulates this many devices on the CPU."""
    asked = json.dumps({"devices": devices, "size": size._asdict(), "steps": steps})
    done = subprocess.run(
        [sys.executable, "-m", "kfqn_optax.bench._scale.on_devices", asked],
        env=simulated(devices),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise UserError(f"{devices} simulated devices: {done.stderr.strip().splitlines()[-1:]}")
    records: list[Mapping[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return [Cost(**record) for record in records]
