"""``python -m kfqn_optax.bench resume``: training that is killed and goes on from its last checkpoint."""
