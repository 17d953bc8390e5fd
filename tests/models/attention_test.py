# SPDX-License-Identifier: Apache-2.0
"""Attention: literal masks, and rotary positions that depend on distance only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from mm1_jax.models.attention import attend, packed_causal_mask, rope
from mm1_jax.sharding import LAYOUT
from tests.helpers import tiny

pytestmark = pytest.mark.compiles


def mask(queries: list[int], keys: list[int], offset: int = 0) -> list[list[int]]:
  made = packed_causal_mask(jnp.array([queries]), jnp.array([keys]), offset)
  assert made.shape == (1, 1, len(queries), len(keys))
  return np.asarray(made[0, 0]).astype(int).tolist()


def test_one_example_attends_to_itself_and_the_past():
  assert mask([1, 1, 1], [1, 1, 1]) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_neither_packed_examples_nor_padding_are_attended_to_from_others():
  assert mask([1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 0]) == [
    [1, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0],
    [0, 0, 1, 0, 0, 0],
    [0, 0, 1, 1, 0, 0],
    [0, 0, 1, 1, 1, 0],
    [0, 0, 0, 0, 0, 1],  # attends to padding alone: no row of a softmax is empty
  ]


def test_prompt_padded_on_the_left():
  assert mask([0, 1, 1], [0, 1, 1]) == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_cached_slots_ahead_are_attended_to_and_empty_ones_are_not():
  """Two new positions at slots 3 and 4 of a cache of six; its first slot is padding."""
  assert mask([1, 1], [0, 1, 1, 1, 1, 0], offset=3) == [
    [0, 1, 1, 1, 0, 0],
    [0, 1, 1, 1, 1, 0],
  ]


def test_rows_have_masks_of_their_own():
  segments = jnp.array([[1, 1], [1, 2]])
  made = packed_causal_mask(segments, segments, 0)
  assert np.asarray(made[:, 0]).astype(int).tolist() == [[[1, 0], [1, 1]], [[1, 0], [0, 1]]]


def test_rope_by_hand():
  """Pairs are (i, i + h/2), Llama's; the second of two turns theta^(-1/2) as fast."""
  x = jnp.array([1.0, 10.0, 2.0, 20.0]).reshape(1, 1, 1, 4)
  out = rope(x, jnp.array([[3]]), 100.0)[0, 0, 0]
  fast, slow = 3.0, 3.0 / 10
  expected = [
    np.cos(fast) - 2 * np.sin(fast),
    10 * np.cos(slow) - 20 * np.sin(slow),
    2 * np.cos(fast) + np.sin(fast),
    20 * np.cos(slow) + 10 * np.sin(slow),
  ]
  np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_rope_makes_logits_depend_on_distance_only():
  rng = np.random.default_rng(0)
  query, key = (jnp.asarray(rng.standard_normal((1, 1, 1, 16)), jnp.float32) for _ in range(2))

  def logit(i: int, j: int) -> float:
    return float(jnp.sum(rope(query, jnp.array([[i]]), 1e4) * rope(key, jnp.array([[j]]), 1e4)))

  assert logit(7, 3) == pytest.approx(logit(1004, 1000), abs=1e-3)
  assert abs(logit(7, 3) - logit(7, 4)) > 0.05


def test_rope_of_position_0_is_the_identity_and_keeps_bfloat16():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 3, 8)), jnp.bfloat16)
  out = rope(x, jnp.zeros((1, 2), jnp.int32), 1e4)
  assert out.dtype == jnp.bfloat16
  assert (out == x).all()


def test_rope_far_out_is_computed_in_float32():
  """Position 4095 has no exact bfloat16: computed there, angles would be off by whole turns."""
  x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
  out = rope(x, jnp.array([[4095]]), 1e4)[0, 0, 0].astype(jnp.float32)
  expected = [np.cos(4095) - np.sin(4095), np.cos(4095) + np.sin(4095)]
  np.testing.assert_allclose(out, expected, atol=0.01)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seen", ["segments", "mask", "all"])
@pytest.mark.parametrize("num_positions", [1, 96, 130, 256])
def test_any_number_of_kv_heads_has_gradients(num_kv_heads, dtype, seen, num_positions):
  """Traced on a mesh, at lengths that are cut into parts and at others."""
  mesh = tiny.mesh(1, 2)

  def abstract(*shape, dtype=dtype, spec=LAYOUT.act_bshk):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  queries = abstract(2, num_positions, 4, 16)
  keys = abstract(2, num_positions, num_kv_heads, 16)
  rows = abstract(2, num_positions, dtype="int32", spec=LAYOUT.act_b)

  def total(queries, keys, values, rows):
    mask = packed_causal_mask(rows, rows, 0) if seen == "mask" else None
    segments = rows if seen == "segments" else None
    return jnp.sum(attend(queries, keys, values, mask=mask, segment_ids=segments))

  with jax.set_mesh(mesh):
    grads = jax.eval_shape(jax.grad(total, argnums=(0, 1, 2)), queries, keys, keys, rows)
  assert [x.shape for x in grads] == [queries.shape, keys.shape, keys.shape]


def test_grouped_queries_share_consecutive_heads():
  """Heads 0 and 1 read kv head 0, heads 2 and 3 kv head 1; logits are scaled by h^(-1/2)."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal((1, 3, n, 4)).astype(np.float32) for n in (4, 2, 2))
  causal = np.tril(np.ones((3, 3), bool))
  with jax.set_mesh(tiny.mesh()):
    qkv = (jnp.asarray(x) for x in (q, k, v))
    out = attend(*qkv, mask=jnp.asarray(causal[None, None]))
  for head in range(4):
    logits = q[0, :, head] @ k[0, :, head // 2].T / 2
    probs = np.where(causal, np.exp(logits), 0)
    expected = probs / probs.sum(-1, keepdims=True) @ v[0, :, head // 2]
    np.testing.assert_allclose(out[0, :, head], expected, rtol=1e-4, atol=1e-5)
