# SPDX-License-Identifier: Apache-2.0
"""Weights of fewer bits, for inference: they are dequantised where a block runs.

One block at a time, so all others stay small. `inference/quantize.py` makes them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mm1_jax.sharding import LAYOUT, spec_of

# Dims of a matrix that its input is summed over, from the last, by the last part of its name. All
# numbers that differ in these alone make one output: they share a scale.
SUMMED = {
  "query": (-3,),
  "key": (-3,),
  "value": (-3,),
  "out": (-3, -2),
  "gate": (-2,),
  "up": (-2,),
  "down": (-2,),
  "weight": (-2,),
  "patch": (-2,),
  "embedding": (-1,),
  "head": (-1,),
}


class Quantized(NamedTuple):
  """A weight as values times scales, each scale for a tile of the values."""

  values: Int[Array, "..."]  # int8 or int4, of the weight's shape and sharding
  scales: Float[Array, "..."]  # of as many dims; whole on every device

  def dequantize(self) -> Float[Array, "..."]:
    """Returns the weight in float32."""
    scales = self.scales
    for dim, (size, num) in enumerate(zip(self.values.shape, scales.shape, strict=True)):
      scales = jnp.repeat(scales, size // num, axis=dim, out_sharding=LAYOUT.replicated)
    scales = jax.sharding.reshard(scales, spec_of(self.values))
    return self.values.astype(jnp.float32) * scales


def dequantize(tree: Any) -> Any:
  """Returns the module with its quantised weights in float32; unchanged if it has none."""
  return jax.tree.map(
    lambda x: x.dequantize() if isinstance(x, Quantized) else x,
    tree,
    is_leaf=lambda x: isinstance(x, Quantized),
  )
