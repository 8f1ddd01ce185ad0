"""What must hold of a wheel and an sdist, where the wheel is installed and nothing that only tests need."""

import importlib.metadata
import importlib.util
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import kfqn_optax as kfqn

TO_TEST = (
    "pyproject.toml",
    "tests/conftest.py",
    "notebooks/quickstart.ipynb",
    "docs/coverage.md",
    ".ci/run",
)


def check_contents(wheel: str, sdist: str) -> None:
    name = f"kfqn_optax-{kfqn.__version__}"
    packed = zipfile.ZipFile(wheel).namelist()
    strays = [path for path in packed if not path.startswith(("kfqn_optax/", f"{name}.dist-info/"))]
    assert not strays, f"the wheel holds {strays}"
    assert "kfqn_optax/py.typed" in packed
    assert f"{name}.dist-info/licenses/LICENSE" in packed
    with tarfile.open(sdist) as archive:
        source = archive.getnames()
    missing = [path for path in TO_TEST if f"{name}/{path}" not in source]
    assert not missing, f"the sdist lacks {missing}"


def check_empty() -> None:
    """The package is the installed one, without the extras."""
    assert sys.prefix in str(pathlib.Path(kfqn.__file__).resolve()), kfqn.__file__
    assert importlib.metadata.version("kfqn_optax") == kfqn.__version__
    assert not any(map(importlib.util.find_spec, ("matplotlib", "pytest")))


def check_training() -> None:
    """Steps of the kind that README.md shows."""
    model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)])
    x = jax.random.normal(jax.random.key(0), (32, 5))
    labels = jnp.argmax(x[:, :3], axis=1)
    variables = model.init(jax.random.key(1), x)

    def loss_fn(params, x, labels):
        logits = kfqn.outputs(model.apply({"params": params}, x), "categorical")
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    layers = kfqn.find_layers(model, variables, x)
    assert "layers_2" in str(layers)
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=(1, 2))
    tx = kfqn.kfac(learning_rate=1.0, layers=layers)

    @jax.jit
    def train_step(params, opt_state, x, labels):
        loss, grads, curvature = value_and_grad(params, x, labels)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
        return optax.apply_updates(params, updates), opt_state, loss

    params, opt_state = variables["params"], tx.init(variables["params"])
    losses = []
    for _ in range(10):
        params, opt_state, loss = train_step(params, opt_state, x, labels)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0], losses
    assert kfqn.diagnostics(opt_state)["rejected"] == 0


def check_bench() -> None:
    """The benchmark's help, and one line that says what its plots need."""
    command = [sys.executable, "-m", "kfqn_optax.bench"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "--problem" in shown.stdout
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr == "error: the plot needs matplotlib: pip install 'kfqn_optax[bench]'\n"


if __name__ == "__main__":
    check_contents(*sys.argv[1:])
    check_empty()
    check_training()
    check_bench()
    print("the wheel and the sdist are good")
