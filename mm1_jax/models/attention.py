# SPDX-License-Identifier: Apache-2.0
"""Multi-head and grouped-query attention, its masks, rotary positions, and the KV cache.

Letters: B rows, S query positions, C cached positions, D width, H heads, K kv heads, h head dim,
U layers whose cache is one.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mm1_jax.config import RopeScaling
from mm1_jax.models.blocked import blocked_attention, has_parts, plain_attention
from mm1_jax.models.cudnn import LENGTH_MULTIPLE, cudnn_attention, has_kernel, on_gpu
from mm1_jax.models.layers import RMSNorm, broadcast, constant, multiply, normal
from mm1_jax.models.splash import LANES, block_size, splash_attention, tpu_kind
from mm1_jax.sharding import LAYOUT, gather, spec_of


class KV(NamedTuple):
  """The keys and values of a stack of layers.

  A head's slots are contiguous, as its products need them: with the heads of a slot contiguous,
  XLA:CPU transposed the whole cache for every new token.
  """

  keys: Float[Array, "U B K C h"]
  values: Float[Array, "U B K C h"]


class Place(NamedTuple):
  """Where in a `KV` a layer's next keys and values go."""

  layer: Int[Array, ""]
  slot: Int[Array, ""]


def packed_causal_mask(
  query_segments: Int[Array, "B S"], key_segments: Int[Array, "B C"], offset: Int[Array, ""] | int
) -> Bool[Array, "B 1 S C"]:
  """Returns the mask of packed rows: keys of the query's segment, at its slot or before.

  Query i is at slot `offset + i`. Examples of one row do not attend to each other:

    segments 1 1 2 2 -> [[1 0 0 0]
                         [1 1 0 0]
                         [0 0 1 0]
                         [0 0 1 1]]
  """
  same = query_segments[:, :, None] == key_segments[:, None, :]
  queries = jnp.arange(query_segments.shape[1])[:, None] + offset
  causal = queries >= jnp.arange(key_segments.shape[1])[None, :]
  return (same & causal[None])[:, None]


def branching_mask(
  segment_ids: Int[Array, "B S"], branch_ids: Int[Array, "B S"]
) -> Bool[Array, "B 1 S S"]:
  """Returns the mask of packed trees: a stem, branch 0, and branches 1, 2, ... that continue it.

  Positions attend, within their segment and at their slot or before, to the stem and to their own
  branch. So several continuations of one context are read beside one copy of it:

    branches 0 1 1 2 -> [[1 0 0 0]
                         [1 1 0 0]
                         [1 1 1 0]
                         [1 0 0 1]]
  """
  rows = P(spec_of(segment_ids)[0])  # all of a row's keys, where its positions are split
  key_segments, key_branches = (jax.sharding.reshard(x, rows) for x in (segment_ids, branch_ids))
  own = branch_ids[:, :, None] == key_branches[:, None, :]
  stem = key_branches[:, None, :] == 0
  return packed_causal_mask(segment_ids, key_segments, 0) & (own | stem)[:, None]


def rope(
  x: Float[Array, "B S H h"],
  positions: Int[Array, "B S"],
  theta: float,
  scaling: RopeScaling | None = None,
) -> Float[Array, "B S H h"]:
  """Rotates pairs (i, i + h/2) by positions x theta^(-2i/h) (arXiv 2104.09864, Llama's pairing)."""
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if scaling is not None:
    # How often a frequency turns within the original context: rarely 0, often 1.
    turns = scaling.original_positions * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    frequency *= kept + (1 - kept) / scaling.factor
  angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)


def filling(num_positions: int) -> int:
  """Returns how many more positions a row needs for the fused kernel of the mesh's chips."""
  if tpu_kind() is not None:
    return -num_positions % LANES
  return -num_positions % LENGTH_MULTIPLE if on_gpu() else 0


def attend(
  queries: Float[Array, "B S H h"],
  keys: Float[Array, "B C K h"],
  values: Float[Array, "B C K h"],
  *,
  mask: Bool[Array, "B 1 S C"] | None = None,
  segment_ids: Int[Array, "B S"] | None = None,
  causal: bool = True,
) -> Float[Array, "B S H h"]:
  """Softmax attention with float32 logits; K divides H (grouped queries).

  Every query attends to every key, or to those that `mask` allows. If `segment_ids` are given, S is
  C, and positions attend only within their segment, with `causal` at their own slot or before.

  On TPUs, rows of whole blocks with segments go through splash attention; on GPUs, rows in 16 bits
  through cuDNN's kernel. All else is plain XLA, which leaves out what it can of causal rows
  (`models.blocked`).

  Where the positions of a row are split over `sequence`, the queries stay split, and the keys and
  values of the whole row are gathered; with grouped queries these are few. The device with a row's
  end has more keys than that with its beginning: of n devices, it does 2 - 1/n times the mean.
  """
  fused = has_kernel(queries, keys)
  in_order = False  # whether causality is left to the attention function, not to the mask
  if segment_ids is not None:
    rows, parts, *_ = spec_of(queries)
    whole = jax.sharding.reshard(segment_ids, P(rows))
    num_parts = jax.sharding.get_abstract_mesh().shape[parts] if parts else 1
    num_positions, chip = whole.shape[1] // num_parts, tpu_kind()
    if chip is not None and num_positions % LANES == 0:
      block = block_size(num_positions, chip, causal=causal)
      return splash_attention(queries, keys, values, whole, causal=causal, block=block)
    keys, values = (jax.sharding.reshard(x, P(rows, None, *spec_of(x)[2:])) for x in (keys, values))
    in_order = causal and num_parts == 1 and (fused or has_parts(num_positions))
    if causal and not in_order:
      mask = packed_causal_mask(segment_ids, whole, 0)
    else:
      mask = (segment_ids[:, :, None] == whole[:, None, :])[:, None]
  queries, keys, values = (checkpoint_name(x, "qkv") for x in (queries, keys, values))
  if fused:  # which is kept with "attention", see `layers.remat_policy`
    return cudnn_attention(queries, keys, values, mask, causal=in_order)
  if in_order:
    assert mask is not None
    out = blocked_attention(queries, keys, values, mask)
  else:
    out = plain_attention(queries, keys, values, mask)
  return checkpoint_name(out, "attention")


class Attention(nnx.Module):
  """Attention with per-head projections: biases in the ViT, rotary positions in the decoder."""

  def __init__(
    self,
    key: jax.Array,
    *,
    width: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    out_std: float,
    qkv_bias: bool = False,
    out_bias: bool = False,
    rope_theta: float | None = None,
    rope_scaling: RopeScaling | None = None,
    qk_norm_eps: float | None = None,
  ):
    self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
    keys = jax.random.split(key, 4)
    std = width**-0.5

    def projection(key, heads):
      return normal(key, (width, heads, head_dim), LAYOUT.attention_dhk, std)

    self.query = projection(keys[0], num_heads)
    self.key = projection(keys[1], num_kv_heads)
    self.value = projection(keys[2], num_kv_heads)
    self.out = normal(keys[3], (num_heads, head_dim, width), LAYOUT.attention_hkd, out_std)
    self.query_bias = constant(0.0, num_heads, head_dim) if qkv_bias else None
    self.key_bias = constant(0.0, num_kv_heads, head_dim) if qkv_bias else None
    self.value_bias = constant(0.0, num_kv_heads, head_dim) if qkv_bias else None
    self.out_bias = constant(0.0, width) if out_bias else None
    self.query_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps else None
    self.key_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps else None

  def __call__(
    self,
    x: Float[Array, "B S D"],
    *,
    mask: Bool[Array, "B 1 S C"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    causal: bool = True,
    positions: Int[Array, "B S"] | None = None,
    cache: KV | None = None,
    place: Place | None = None,
  ) -> tuple[Float[Array, "B S D"], KV | None]:
    """Returns the output, and the cache with this call's keys and values from `place` on.

    A `cache` needs a `place`. For `mask`, `segment_ids` and `causal` see `attend`.
    """
    queries = self._project(x, self.query, self.query_bias, self.query_norm, positions)
    keys = self._project(x, self.key, self.key_bias, self.key_norm, positions)
    values = self._project(x, self.value, self.value_bias)
    if cache is not None:
      assert place is not None
      cache = KV(_write(cache.keys, keys, place), _write(cache.values, values, place))
      keys, values = (_read(stack, place).astype(x.dtype) for stack in cache)
    heads = attend(queries, keys, values, mask=mask, segment_ids=segment_ids, causal=causal)
    out = multiply(
      "bshk,hkd->bsd", heads, gather(self.out[...], x.dtype, rows=x), out_sharding=spec_of(x)
    )
    if self.out_bias is not None:
      out += broadcast(self.out_bias[...], out)
    return out, cache

  def _project(self, x, weight, bias, norm=None, positions=None) -> Float[Array, "B S H h"]:
    heads = multiply("bsd,dhk->bshk", x, gather(weight[...], x.dtype, rows=x))
    if bias is not None:
      heads += broadcast(bias[...], heads)
    if norm is not None:
      heads = norm(heads)
    if positions is not None and self.rope_theta is not None:
      heads = rope(heads, positions, self.rope_theta, self.rope_scaling)
    return heads


def _write(
  stack: Float[Array, "U B K C h"], new: Float[Array, "B S K h"], place: Place
) -> Float[Array, "U B K C h"]:
  new = jnp.swapaxes(new, 1, 2)[None].astype(stack.dtype)
  return jax.lax.dynamic_update_slice(stack, new, (place.layer, 0, 0, place.slot, 0))


def _read(stack: Float[Array, "U B K C h"], place: Place) -> Float[Array, "B C K h"]:
  layer = jax.lax.dynamic_index_in_dim(stack, place.layer, keepdims=False)
  return jnp.swapaxes(layer, 1, 2)
