"""``python -m kfqn_optax.bench suite``: methods beside each other on many problems."""
