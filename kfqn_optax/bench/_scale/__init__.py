"""``python -m kfqn_optax.bench scale``: what a step costs against width, depth, batch, devices."""
