# SPDX-License-Identifier: Apache-2.0
"""Weight-only int8: symmetric, one scale for each output channel of a matrix.

An output channel is all that one number of a matrix product depends on: a column of a linear map,
one head dim of a projection, a row of the embedding (which is the head, too).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mm1_jax.convert.export.run_reader import ParamPart
from mm1_jax.models.dequantize import SUMMED


def summed_dims(part: ParamPart) -> tuple[int, ...] | None:
  """Returns the dims of a part that share a scale; None for what stays as it is."""
  dims = SUMMED.get(part.name.split(".")[-1])
  if dims is None or len(part.shape) < 2 or part.in_float32:
    return None
  return dims


def quantize(x: np.ndarray, dims: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Returns int8 of the shape of x, and float32 scales with `dims` of size 1: x ~ q scale.

  No number is further from x than half a scale. A channel of zeros has the scale 1.
  """
  x = x.astype(np.float32)
  largest = np.max(np.abs(x), axis=dims, keepdims=True)
  scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
  return np.clip(np.rint(x / scale), -127, 127).astype(np.int8), scale


@dataclasses.dataclass(frozen=True)
class Int8Layout:
  """int8 and its scales to our array: a layout, as `mm1_jax.convert.layouts` has them."""

  dims: tuple[int, ...]

  def shapes(self, ours: tuple[int, ...]) -> list[tuple[int, ...]]:
    shared = {dim % len(ours) for dim in self.dims}
    return [ours, tuple(1 if i in shared else size for i, size in enumerate(ours))]

  def load(self, theirs: Sequence[np.ndarray], ours: tuple[int, ...]) -> np.ndarray:
    quantized, scale = theirs
    return quantized.astype(np.float32) * scale
