# SPDX-License-Identifier: Apache-2.0
"""cuDNN's fused attention on GPUs, with the mask of packed rows.

Letters: B rows, S query positions, C key positions, H heads, K kv heads, h head dim.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mm1_jax.sharding import spec_of

FORWARD_KERNEL = "dot_product_attention_fwd_wrapper"  # the primitive's name in jax 0.10 and 0.11
LENGTH_MULTIPLE = 2  # of the positions in a row


def on_gpu() -> bool:
  """Returns whether the mesh's chips are GPUs."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device is not None and device.platform in ("gpu", "cuda")


def has_kernel(queries: Float[Array, "B S H h"], keys: Float[Array, "B C K h"]) -> bool:
  """Returns whether cuDNN serves this call: on GPUs, in 16 bits.

  Heads are multiples of eight up to 128 wide (256 on newer chips, which no model here has), and
  rows have an even number of positions, for the gradient.
  """
  head_dim, lengths = queries.shape[-1], (queries.shape[1], keys.shape[1])
  even = all(length % LENGTH_MULTIPLE == 0 for length in lengths)
  half = queries.dtype in (jnp.bfloat16, jnp.float16)
  return on_gpu() and half and head_dim <= 128 and head_dim % 8 == 0 and even


def cudnn_attention(
  queries: Float[Array, "B S H h"],
  keys: Float[Array, "B C K h"],
  values: Float[Array, "B C K h"],
  mask: Bool[Array, "B 1 S C"] | None = None,
  *,
  causal: bool = False,
  implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B S H h"]:
  """Softmax attention where `mask` and, with `causal`, the order of positions allow it.

  The kernel skips what is above the diagonal only with `causal`; a mask alone it reads
  whole. Each GPU runs it on its rows, heads and queries, so `causal` needs whole rows.

  Args:
    implementation: of `jax.nn.dot_product_attention`; "xla" runs anywhere, for tests.
  """
  masks = () if mask is None else (mask,)
  arrays = (queries, keys, values, *masks)

  @functools.partial(
    jax.shard_map,
    in_specs=tuple(spec_of(x) for x in arrays),
    out_specs=spec_of(queries),
    check_vma=False,  # the kernel does not say over which axes its results vary
  )
  def run(queries, keys, values, *masks):
    return jax.nn.dot_product_attention(
      queries,
      keys,
      values,
      mask=masks[0] if masks else None,
      is_causal=causal,
      implementation=implementation,
    )

  return run(*arrays)
