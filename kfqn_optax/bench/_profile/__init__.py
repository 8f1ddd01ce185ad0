"""``python -m kfqn_optax.bench profile``: where a step's time, operations and compiling go."""
