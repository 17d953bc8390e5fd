# SPDX-License-Identifier: Apache-2.0
"""Splash attention, the TPU's fused kernel, over rows of packed examples.

Letters: B rows, S positions, H heads, K kv heads, h head dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mm1_jax.chips import attention_block
from mm1_jax.sharding import spec_of

LANES = 128  # positions are cut into blocks of a multiple of this
PICTURE_BLOCK = 1024  # without `causal` nothing is skipped: the 768 of 378 pixels are one block


def tpu_kind() -> str | None:
  """Returns the kind of the mesh's chips; None if they are no TPUs.

  The mesh's, not the host's: a program for a TPU is compiled on machines that have none.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.device_kind if device is not None and device.platform == "tpu" else None


def block_size(num_positions: int, device_kind: str, *, causal: bool = True) -> int:
  """Returns the largest block that divides the row, up to what suits the chip.

  Larger blocks feed the matrix units better; smaller ones skip more of what lies above the diagonal
  and need less VMEM.
  """
  limit = attention_block(device_kind) if causal else PICTURE_BLOCK
  limit = min(limit, num_positions)
  fits = [size for size in range(LANES, limit + 1, LANES) if num_positions % size == 0]
  return fits[-1]


def splash_attention(
  queries: Float[Array, "B S H h"],
  keys: Float[Array, "B S K h"],
  values: Float[Array, "B S K h"],
  segment_ids: Int[Array, "B S"],
  *,
  causal: bool,
  block: int,
  interpret: bool = False,
) -> Float[Array, "B S H h"]:
  """Softmax attention within segments; with `causal`, to a position's own slot and before.

  Each chip runs the kernel on its rows, heads and (where they are split) queries. The keys and
  values of whole rows are gathered here, so that their gradients are reduce-scattered. What the
  backward pass needs is named, so that a remat policy may keep it: "qkv", and "attention", the
  output with its softmax's normaliser.

  Args:
    block: positions in a block; divides those of a chip.
    interpret: runs the kernel step by step on any backend, for tests.
  """
  mesh, spec, parts = jax.sharding.get_abstract_mesh(), spec_of(queries), spec_of(keys)[1]
  num_positions, num_heads, head_dim = queries.shape[1:]
  mask = masks.CausalMask if causal else masks.FullMask
  attend = kernel.make_splash_mha(
    masks.MultiHeadMask([mask((num_positions, num_positions))] * num_heads),
    block_sizes=kernel.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      use_fused_bwd_kernel=True,
    ),
    head_shards=1,  # the mask is one for all heads
    q_seq_shards=mesh.shape[spec[1]] if spec[1] else 1,
    residual_checkpoint_name="attention",
    interpret=interpret,
  )
  # The kernel carries the mask's blocks, and each chip needs those of its queries.
  blocks = attend.manual_sharding_spec(NamedSharding(mesh, P(None, spec[1])))
  attend = jax.tree.map(jax.sharding.reshard, attend, blocks)

  @functools.partial(
    jax.shard_map,
    in_specs=(blocks, spec, spec_of(keys), spec_of(values), P(*spec[:2]), P(spec[0])),
    out_specs=spec,
    check_vma=False,  # the kernel does not say over which axes its results vary
  )
  def run(attend, queries, keys, values, own_segments, segments):
    if parts:
      keys, values = (jax.lax.all_gather(x, parts, axis=1, tiled=True) for x in (keys, values))
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (queries * head_dim**-0.5, keys, values))
    rows = (checkpoint_name(x, "qkv") for x in heads_first)
    with jax.named_scope("fused_splash"):
      out = jax.vmap(attend)(*rows, kernel.SegmentIds(own_segments, segments))
    # A tuple only where residuals are asked for.
    return jnp.swapaxes(out, 1, 2)

  own_segments = jax.sharding.reshard(segment_ids, P(*spec[:2]))
  return run(attend, queries, keys, values, own_segments, segment_ids)
