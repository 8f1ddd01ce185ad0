"""The damping that follows a model's success, on its own; with a model: test_quadratic.py."""

import jax.numpy as jnp
import pytest

from kfqn_optax._steps.success import Success

FOLLOWS = Success(every=5, rate=0.5, floor=0.1, ceiling=100.0)
NOTCH = 2**5


@pytest.mark.parametrize(
    ("settings", "start"),
    [({}, 10.0), ({"rate": 1.0}, 1.0), ({"floor": 20.0}, 20.0), ({"ceiling": 3.0}, 3.0)],
)
def test_where_it_starts(settings, start):
    assert FOLLOWS._replace(**settings).start == start


@pytest.mark.parametrize(
    ("scale", "count", "ratio", "share", "plateau", "noisy", "after"),
    [
        (10.0, 5, 0.8, 1.0, False, 0, 10 / NOTCH),
        (10.0, 5, 0.5, 1.0, False, 0, 10.0),
        (2.0, 5, 0.2, 1.0, False, 0, 2 * NOTCH),
        (10.0, 4, 0.8, 1.0, False, 0, 10.0),
        (10.0, 2, 0.8, 1.0, False, 0, 10 / NOTCH),
        (2.0, 2, 0.2, 1.0, False, 0, 2.0),
        (2.0, 3, -1.0, 0.05, False, 0, 2 * NOTCH),
        (0.2, 10, 0.8, 1.0, False, 0, 0.1),
        (10.0, 10, -1.0, 1.0, False, 0, 100.0),
        (10.0, 10, 0.8, 1.0, True, 0, 10 / NOTCH**3),
        (1e-4, 10, 0.8, 1.0, True, 0, 1e-5),
        (1e-4, 10, 0.5, 1.0, False, 0, 0.1),
        (1.0, 10, 0.8, 1.0, False, 0.5, 0.55),
        (0.1, 10, 0.8, 1.0, False, 1.0, 1.0),
        (2.0, 10, 0.5, 1.0, False, 1.0, 2.0),
        (1e-4, 10, 0.8, 1.0, True, 1.0, 1.0),
    ],
    ids=[
        "success",
        "neither",
        "failure",
        "not looked at",
        "success after two steps",
        "failure after two steps",
        "at once, where hardly any step is left",
        "floor",
        "ceiling",
        "faster on a plateau",
        "floor of a plateau",
        "off the plateau",
        "floor among noise",
        "up to it at once",
        "above it",
        "a plateau among noise",
    ],
)
def test_what_it_is_after_a_step(scale, count, ratio, share, plateau, noisy, after):
    numbers = (jnp.float32(scale), jnp.int32(count), jnp.float32(ratio), jnp.float32(share))
    assert FOLLOWS.after(*numbers, jnp.asarray(plateau), jnp.float32(noisy)) == pytest.approx(after)


@pytest.mark.parametrize("settings", [{"rate": 1.0}, {"floor": 20.0}])
def test_noise_does_not_move_a_fixed_damping_nor_a_floor_above_1(settings):
    follows = FOLLOWS._replace(**settings)
    scale, ratio, share = jnp.float32(follows.start), jnp.float32(0.8), jnp.float32(1.0)
    after = follows.after(scale, jnp.int32(10), ratio, share, jnp.asarray(False), jnp.float32(1.0))
    assert after == scale
