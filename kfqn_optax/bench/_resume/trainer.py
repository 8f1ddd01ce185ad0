"""``python -m kfqn_optax.bench._resume.trainer JSON``: train from the newest checkpoint in a folder.

Prints a line for each step made. The batch is divided among all devices that JAX has.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfqn_optax as kfqn
from kfqn_optax.bench._faults.run import METHODS, MODEL, batch, data, loss_fn

SAVED_EVERY, LAST = 5, "last.npz"


def train(folder: Path, method: str, steps: int) -> None:
    """Go on to step number ``steps`` with a checkpoint every five; the last state also goes to ``LAST``."""
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    everywhere, divided = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("batch",)))
    start, step = _program(method)
    structure = jax.eval_shape(start, jax.random.key(0))
    structure = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), structure
    )
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=SAVED_EVERY)
    with ocp.CheckpointManager(folder, options=options) as manager:
        done = manager.latest_step()
        if done is None:
            done, tree = 0, jax.device_put(jax.jit(start)(jax.random.key(0)), everywhere)
        else:
            tree = manager.restore(done, args=ocp.args.StandardRestore(structure))
        for k in range(done, steps):
            inputs = batch(k)
            x, y = (jax.device_put(np.asarray(part, np.float64), divided) for part in (inputs.x, inputs.y))
            tree = step(tree, x, y)
            manager.save(k + 1, args=ocp.args.StandardSave(tree), force=k + 1 == steps)
            print(k + 1, flush=True)
    leaves = jax.tree.leaves_with_path(tree)
    arrays: dict[str, Any] = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    np.savez(folder / LAST, **arrays)


def _program(method: str) -> tuple[Any, Any]:
    x = data()[0][:1].astype(np.float64)
    params = jax.eval_shape(MODEL.init, jax.random.key(0), x)["params"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float64), params)
    layers = kfqn.find_layers(MODEL, {"params": zeros}, x)
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=(1, 2))
    tx = METHODS[method](1.0, layers)

    def start(key):
        params = MODEL.init(key, x)["params"]
        params = optax.tree.cast(params, np.float64)
        return {"params": params, "opt_state": tx.init(params)}

    @functools.partial(jax.jit, donate_argnums=0)
    def step(tree, x, y):
        _, grads, curvature = value_and_grad(tree["params"], x, y, 1.0)
        updates, state = tx.update(grads, tree["opt_state"], tree["params"], curvature=curvature)
        return {"params": optax.apply_updates(tree["params"], updates), "opt_state": state}

    return start, step


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    train(Path(asked["folder"]), asked["method"], asked["steps"])
