"""The part of a step that is made: runs of losses against NumPy, and what noise and trends do to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfqn_optax._steps.gain import Losses, watched


def gains(values, patience):
    """The gain after each of these losses."""

    def step(carry, value):
        losses, gain = watched(*carry, value, patience)
        return (losses, gain), gain

    _, after = jax.lax.scan(step, (Losses.start(), jnp.ones([])), jnp.asarray(values, jnp.float32))
    return np.asarray(after)


def expected_gains(values, patience):
    gain, run, before, after = 1.0, [], None, []
    for value in values:
        run.append(value)
        if len(run) >= patience / gain:
            mean, error = np.mean(run), np.var(run) / len(run)
            if before is not None and mean > before[0]:
                gain *= 0.7
            elif before is not None and mean < before[0] - np.sqrt(error + before[1]):
                gain *= 1.25
            gain = np.clip(gain, 0.05, 1)
            run, before = [], (mean, error)
        after.append(gain)
    return np.array(after)


@pytest.mark.parametrize("patience", [1, 7, 20])
@pytest.mark.parametrize("trend", [-0.02, 0.0, 0.02])
def test_the_gain_is_that_of_the_oracle(patience, trend):
    rng = np.random.default_rng(patience)
    values = np.float32(5 + trend * np.arange(400) + rng.normal(size=400))
    expected = expected_gains(np.float64(values), patience)
    np.testing.assert_allclose(gains(values, patience), expected, rtol=1e-5)
    assert len(set(expected.round(6))) > 2 or trend < 0


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_a_falling_loss_keeps_it_at_one_and_a_rising_one_ends_at_the_least(unit):
    falling = unit * (1 + np.exp(-np.arange(3000) / 1000))
    assert (gains(falling, 20) == 1).all()
    np.testing.assert_allclose(gains(falling[::-1], 20)[-1], 0.05)


def test_it_grows_again_where_the_losses_fall_by_more_than_their_noise():
    values = np.concatenate([np.linspace(1, 2, 100), np.linspace(2, 1, 300)])
    after = gains(values, 20)
    assert after.min() < 0.5
    assert after[-1] == 1


def test_losses_that_stay_as_they_are_change_nothing():
    assert (gains(np.full(100, 3.0), 5) == 1).all()
