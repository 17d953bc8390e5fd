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
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mm1_jax.sharding import spec_of

LANES = 128  # positions are cut into blocks of a multiple of this

# Positions in a block. Larger blocks feed the matrix units better; smaller ones skip more of what
# lies above the diagonal and need less VMEM.
BLOCKS = {"TPU v6 lite": 1024, "TPU7x": 2048}
DEFAULT_BLOCK = 512
MAX_WHOLE = 1024  # patches of a picture that are one block: 378 pixels are 730, in 768


def block_size(num_positions: int, device_kind: str) -> int:
  """Returns the largest block that divides the row, up to what suits the chip."""
  limit = min(BLOCKS.get(device_kind, DEFAULT_BLOCK), num_positions)
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

  Each chip runs the kernel on its rows and heads. What the backward pass needs is named, so that a
  remat policy may keep it: "qkv", and "attention", the output with its softmax's normaliser.

  Args:
    block: positions in a block; divides S.
    interpret: runs the kernel step by step on any backend, for tests.
  """
  spec = spec_of(queries)

  @functools.partial(
    jax.shard_map,
    in_specs=(spec, spec, spec, P(*spec[:2])),
    out_specs=spec,
    check_vma=False,  # the kernel does not say over which axes its results vary
  )
  def run(queries, keys, values, segment_ids):
    num_positions, num_heads, head_dim = queries.shape[1:]
    mask = masks.CausalMask if causal else masks.FullMask
    shape = (num_positions, num_positions)
    attend = kernel.make_splash_mha(
      masks.MultiHeadMask([mask(shape)] * num_heads),
      block_sizes=kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,
      ),
      head_shards=1,
      q_seq_shards=1,
      residual_checkpoint_name="attention",
      interpret=interpret,
    )
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (queries * head_dim**-0.5, keys, values))
    rows = (checkpoint_name(x, "qkv") for x in heads_first)
    with jax.named_scope("fused_splash"):
      out = jax.vmap(attend)(*rows, kernel.SegmentIds(segment_ids, segment_ids))
    # A tuple only where residuals are asked for.
    return jnp.swapaxes(out, 1, 2)  # pyright: ignore[reportArgumentType]

  return run(queries, keys, values, segment_ids)


def splash_all_to_all(
  queries: Float[Array, "I P H h"],
  keys: Float[Array, "I P K h"],
  values: Float[Array, "I P K h"],
  *,
  interpret: bool = False,
) -> Float[Array, "I P H h"]:
  """Softmax attention of all patches of a picture to all, however many they are.

  They are filled up to a multiple of `LANES`, and what was filled in is seen by none of them.
  """
  num_patches = queries.shape[1]
  more = -num_patches % LANES
  size = num_patches + more
  real = (jnp.arange(size) < num_patches).astype(jnp.int32)
  picture = P(spec_of(queries)[0])
  segment_ids = jnp.broadcast_to(real[None], (queries.shape[0], size), out_sharding=picture)
  heads = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (queries, keys, values))
  block = size if size <= MAX_WHOLE else block_size(size, "")
  out = splash_attention(*heads, segment_ids, causal=False, block=block, interpret=interpret)
  return out[:, :num_patches]
