"""``python -m kfqn_optax.bench sweep``: one method with its defaults under many circumstances."""
