# SPDX-License-Identifier: Apache-2.0
"""The maps between tokens and rows, by hand and against JAX's own gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm1_jax.models.dispatch import collect, invert, places, spread, spread_weights
from tests.helpers import tiny

pytestmark = pytest.mark.compiles

# Three tokens of two choices and five rows: token 1 has no second row, and row 3 no owner.
SLOTS = jnp.array([[4, 0], [1, 5], [2, 5]])
OWNERS = jnp.array([1, 2, 4, 6, 0])


def test_places_by_hand():
  queue = jnp.array([1, 0, 3, 1, 1, 0])  # 3 of 3 experts: waits for none
  place, sizes = places(queue, 3)
  assert place[jnp.array([0, 1, 3, 4, 5])].tolist() == [0, 0, 1, 2, 1]
  assert sizes.tolist() == [2, 3, 0]


def test_invert_by_hand():
  assert invert(SLOTS, 5).tolist() == OWNERS.tolist()


def test_spread_and_collect_by_hand():
  x = jnp.array([[1.0], [2.0], [3.0]])
  rows = spread(x, SLOTS, OWNERS)
  assert rows[jnp.array([0, 1, 2, 4]), 0].tolist() == [1, 2, 3, 1]
  rows = jnp.array([[1.0], [10.0], [100.0], [jnp.nan], [1000.0]])
  assert collect(rows, SLOTS, OWNERS)[:, 0].tolist() == [1001, 10, 100]
  weights = jnp.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
  expected = np.array([0.2, 0.3, 0.5, 0.0, 0.1], np.float32)
  assert np.array_equal(spread_weights(weights, SLOTS, OWNERS)[:, 0], expected)


def test_gradients_equal_those_of_plain_indexing():
  rng = np.random.default_rng(0)
  x, rows, weights = (jnp.asarray(rng.standard_normal(s)) for s in ((3, 4), (5, 4), (3, 2)))
  owned = (OWNERS < 6)[:, None]
  to_rows, to_tokens = (jnp.asarray(rng.standard_normal(s)) for s in ((5, 4), (3, 4)))

  def ours(x, rows, weights):
    # Rows without an owner must not count: their weight is 0.
    spread_out = spread(x, SLOTS, OWNERS) * spread_weights(weights, SLOTS, OWNERS)
    return jnp.sum(spread_out * to_rows) + jnp.sum(collect(rows, SLOTS, OWNERS) * to_tokens)

  def plain(x, rows, weights):
    token, choice = OWNERS // 2, OWNERS % 2
    spread_out = jnp.where(owned, x[token] * weights[token, choice][:, None], 0.0)
    padded = jnp.concatenate([rows, jnp.zeros((1, 4))])
    return jnp.sum(spread_out * to_rows) + jnp.sum(padded[SLOTS].sum(1) * to_tokens)

  actual = tiny.jit(jax.grad(ours, argnums=(0, 1, 2)))(x, rows, weights)
  expected = tiny.jit(jax.grad(plain, argnums=(0, 1, 2)))(x, rows, weights)
  # Row 3 has no owner: its gradient is arbitrary, and is multiplied by 0 where it is used.
  np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
  np.testing.assert_allclose(actual[1] * owned, expected[1], rtol=1e-5)
  np.testing.assert_allclose(actual[2], expected[2], rtol=1e-5)
