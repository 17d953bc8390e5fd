# SPDX-License-Identifier: Apache-2.0
"""Attention in plain XLA: for any mask, and for packed rows without most non-causal blocks.

Each chip runs it on its own rows, heads and queries. Outside of `shard_map`, the heads' split over
`tensor` would be a part of the types, and JAX's grouping of heads by kv heads cannot keep it where
there is one kv head.

In packed rows, each quarter of the queries is multiplied only with the keys up to its own end:

  queries 1  x . . .
          2  x x . .      10 of 16 blocks are computed; the mask applies within blocks, on the
          3  x x x .      diagonal and where another example begins
          4  x x x x

Letters: B rows, S positions, H heads, K kv heads, G heads a kv head, h head dim, T queries of a
part, C keys up to its end.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from mm1_jax.sharding import axes_of, spec_of

PARTS = 4  # of a row; each further one saves less, and is one more program to compile
MIN_POSITIONS = 128  # in a row; in shorter ones parts save no time


def has_parts(num_positions: int) -> bool:
  """Returns whether rows of so many positions are cut into parts."""
  return num_positions >= MIN_POSITIONS and num_positions % PARTS == 0


def plain_attention(
  queries: Float[Array, "B S H h"],
  keys: Float[Array, "B C K h"],
  values: Float[Array, "B C K h"],
  mask: Bool[Array, "B 1 S C"] | None = None,
) -> Float[Array, "B S H h"]:
  """Softmax attention where `mask` allows it (anywhere without one), with float32 logits."""
  rows, parts, heads, _ = spec_of(queries)
  whole = P(rows, None, heads)
  # An axis of one device splits nothing; shard_map would sum the gradients of keys and values.
  split = P(rows, parts if _size(parts) > 1 else None, heads)
  arrays = (queries, split), (keys, whole), (values, whole)
  if mask is not None:
    arrays += ((mask, P(rows, None, split[1])),)
  specs = tuple(spec for _, spec in arrays)

  @functools.partial(jax.shard_map, in_specs=specs, out_specs=split)
  def run(queries, keys, values, mask=None):
    return jax.nn.dot_product_attention(queries, keys, values, mask=mask, implementation="xla")

  out = run(*(jax.sharding.reshard(x, spec) for x, spec in arrays))
  return jax.sharding.reshard(out, spec_of(queries))


def _size(axes: str | tuple[str, ...] | None) -> int:
  """Returns over how many devices an entry of a PartitionSpec splits a dim."""
  mesh = jax.sharding.get_abstract_mesh().shape
  return math.prod(mesh[axis] for axis in axes_of(axes))


def blocked_attention(
  queries: Float[Array, "B S H h"],
  keys: Float[Array, "B S K h"],
  values: Float[Array, "B S K h"],
  mask: Bool[Array, "B 1 S S"],
) -> Float[Array, "B S H h"]:
  """Softmax attention where `mask` and the order of positions allow it, with float32 logits.

  Each chip runs it on its rows and heads. Heads come before positions throughout, so that the
  probabilities, the largest of its arrays, are nowhere transposed: on a CPU, forward and backward
  took 46 ms where `jax.nn.dot_product_attention` took 78 (16 rows of 256, 4 heads of 32).
  """
  spec = spec_of(keys)
  rows = P(spec[0])
  # Positions are whole. If their spec names an axis, even of one device, shard_map would sum the
  # gradients of keys and values over it.
  arrays = (jax.sharding.reshard(queries, spec), keys, values, jax.sharding.reshard(mask, rows))

  @functools.partial(jax.shard_map, in_specs=tuple(spec_of(x) for x in arrays), out_specs=spec)
  def run(queries, keys, values, mask):
    num_rows, num_positions, num_heads, head_dim = queries.shape
    num_kv_heads, size = keys.shape[2], num_positions // PARTS
    queries = (queries * head_dim**-0.5).reshape(num_rows, PARTS, size, num_kv_heads, -1, head_dim)
    queries = queries.transpose(1, 0, 3, 4, 2, 5)  # [parts, B, K, G, T, h]
    keys, values = (jnp.swapaxes(x, 1, 2) for x in (keys, values))
    outs = []
    for part in range(PARTS):
      begin, end = part * size, (part + 1) * size
      causal = jnp.arange(begin, end)[:, None] >= jnp.arange(end)[None]
      seen = mask[:, :, begin:end, :end] & causal[None, None]
      outs.append(_attend_part(queries[part], keys[:, :, :end], values[:, :, :end], seen))
    out = jnp.stack(outs, axis=1).transpose(0, 1, 4, 2, 3, 5)  # [B, parts, T, K, G, h]
    return out.reshape(num_rows, num_positions, num_heads, head_dim)

  return jax.sharding.reshard(run(*arrays), spec_of(queries))


def _attend_part(
  queries: Float[Array, "B K G T h"],
  keys: Float[Array, "B K C h"],
  values: Float[Array, "B K C h"],
  mask: Bool[Array, "B 1 T C"],
) -> Float[Array, "B K G T h"]:
  """Returns the attention of a part's queries to the keys and values up to its end, by `mask`."""
  rows = queries.reshape(*queries.shape[:2], -1, queries.shape[-1])  # heads of a kv head as rows
  logits = jnp.einsum("bkqh,bkch->bkqc", rows, keys, preferred_element_type=jnp.float32)
  logits = logits.reshape(*queries.shape[:4], keys.shape[2])
  probs = jax.nn.softmax(jnp.where(mask[:, None], logits, -jnp.inf), axis=-1)
  probs = probs.reshape(*rows.shape[:3], keys.shape[2]).astype(values.dtype)
  return jnp.einsum("bkqc,bkch->bkqh", probs, values).reshape(queries.shape)
