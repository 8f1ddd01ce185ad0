"""The paper's deep autoencoder problems as one command: ``python -m kfqn_optax.bench``."""
