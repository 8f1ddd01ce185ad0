"""``python -m kfqn_optax.bench soak``: what is left of the factors after very many steps."""
