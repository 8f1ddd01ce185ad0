"""``python -m kfqn_optax.bench._scale.on_devices JSON``: costs with the factors divided."""

import json
import sys

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfqn_optax as kfqn
from kfqn_optax.bench._profile.methods import ADAM
from kfqn_optax.bench._profile.step import Timed, settled, take_turns
from kfqn_optax.bench._scale.cost import Cost, cost_of
from kfqn_optax.bench._scale.network import Size, task_of
from kfqn_optax.bench._suite.methods import Method, curvature_step


def costs(devices: int, size: Size, steps: int) -> list[Cost]:
    mesh = jax.make_mesh((devices,), ("batch",), axis_types=(AxisType.Auto,))
    task = task_of(size)

    def step_of(method: Method) -> Timed:
        tx = method.make(1.0, task.layers)
        params, state = jax.device_put(task.init(0), NamedSharding(mesh, PartitionSpec()))
        batch = jax.device_put(task.train, NamedSharding(mesh, PartitionSpec("batch")))
        arguments = (params, settled(jax.jit(tx.init)(params)), state, batch)
        return Timed(method.step(task, tx), arguments, lambda before, result: (*result[:3], before[3]))

    divided = Method(lambda rate, layers: kfqn.kfac(rate, layers, factor_mesh=mesh), curvature_step)
    timed = {"adam": step_of(ADAM), "kfac": step_of(divided)}
    take_turns(list(timed.values()), steps)
    adam = timed["adam"].mean_seconds
    return [cost_of("devices", devices, name, step, adam) for name, step in timed.items()]


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    found = costs(asked["devices"], Size(**asked["size"]), asked["steps"])
    print(json.dumps([cost._asdict() for cost in found]))
