"""``python -m kfqn_optax.bench faults``: what goes wrong in one step, and what is left of it."""
