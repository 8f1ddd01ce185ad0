"""What is profiled: Adam, which everything is measured in, and the library's methods."""

import optax

import kfqn_optax as kfqn
from kfqn_optax.bench._suite.methods import METHODS, Method, curvature_step, gradient_step

ADAM = Method(lambda rate, layers: optax.adam(1e-3), gradient_step)
SPARSE = "kfqn(update_every=10)"
PROFILED: dict[str, Method] = {
    "kfac": METHODS["kfac"],
    "kbfgs": METHODS["kbfgs"],
    "kfqn": METHODS["kfqn"],
    SPARSE: Method(lambda rate, layers: kfqn.kfqn(rate, layers, update_every=10), curvature_step),
}
