# SPDX-License-Identifier: Apache-2.0
"""How one array of ours is laid out in their tensors, and the inverse for those that are exported.

Theirs are PyTorch's: a linear map is [out, in], and heads are folded into its rows or columns.
Letters as in `models`: D width, H heads, h head dim, F mlp, E experts, V vocabulary; w x w patches.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mm1_jax.models.vit import PIXEL_MEAN, PIXEL_STD

Shape = tuple[int, ...]


class WeightLayout(Protocol):
  """Their tensors, and how to make our array of them."""

  def shapes(self, ours: Shape) -> list[Shape]:
    """Returns the shapes that theirs must have to make ours."""
    ...

  def load(self, theirs: Sequence[np.ndarray], ours: Shape) -> np.ndarray: ...


class Reversible(WeightLayout, Protocol):
  """A layout that our array can be written in."""

  def store(self, ours: np.ndarray) -> list[np.ndarray]:
    """Returns the tensors that `load` makes `ours` of."""
    ...


@dataclasses.dataclass(frozen=True)
class Same:
  """A vector or a table, as it is."""

  def shapes(self, ours):
    return [ours]

  def load(self, theirs, ours):
    return theirs[0]

  def store(self, ours):
    return [ours]


@dataclasses.dataclass(frozen=True)
class Flat:
  """[H h] -> [H, h], a bias of heads."""

  def shapes(self, ours):
    return [(math.prod(ours),)]

  def load(self, theirs, ours):
    return theirs[0].reshape(ours)

  def store(self, ours):
    return [ours.reshape(-1)]


@dataclasses.dataclass(frozen=True)
class Transposed:
  """[out, in] -> [in, out]; the first `num_in` of our dims are `in`, the others `out`."""

  num_in: int = 1

  def shapes(self, ours):
    return [(math.prod(ours[self.num_in :]), math.prod(ours[: self.num_in]))]

  def load(self, theirs, ours):
    return theirs[0].T.reshape(ours)

  def store(self, ours):
    return [ours.reshape(math.prod(ours.shape[: self.num_in]), -1).T]


@dataclasses.dataclass(frozen=True)
class PerExpert:
  """E times [out, in] -> [E, in, out]."""

  def shapes(self, ours):
    return [(ours[2], ours[1])] * ours[0]

  def load(self, theirs, ours):
    return np.stack([x.T for x in theirs])

  def store(self, ours):
    return [x.T for x in ours]


@dataclasses.dataclass(frozen=True)
class PatchConvolution:
  """[D, 3, w, w] -> [w w 3, D]: the patch embedding as a convolution."""

  def shapes(self, ours):
    side = math.isqrt(ours[0] // 3)
    return [(ours[1], 3, side, side)]

  def load(self, theirs, ours):
    return theirs[0].transpose(2, 3, 1, 0).reshape(ours)

  def store(self, ours):
    side = math.isqrt(ours.shape[0] // 3)
    return [ours.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)]


@dataclasses.dataclass(frozen=True)
class DepthwiseConvolution:
  """[C, 1, r, s] -> [r, s, C]: one kernel for each channel."""

  def shapes(self, ours):
    return [(ours[2], 1, *ours[:2])]

  def load(self, theirs, ours):
    return theirs[0][:, 0].transpose(1, 2, 0)

  def store(self, ours):
    return [ours.transpose(2, 0, 1)[:, None]]


@dataclasses.dataclass(frozen=True)
class ClassPosition:
  """The first row of [1 + P, D]."""

  num_patches: int

  def shapes(self, ours):
    return [(1 + self.num_patches, *ours)]

  def load(self, theirs, ours):
    return theirs[0][0]


@dataclasses.dataclass(frozen=True)
class PositionsBehindClass:
  """The other rows of [1 + P, D], on the patch grid."""

  def shapes(self, ours):
    return [(1 + ours[0] * ours[1], ours[2])]

  def load(self, theirs, ours):
    return theirs[0][1:].reshape(ours)


# SigLIP's pixels are 2 x - 1 of x in [0, 1], ours (x - mean) / std, and its convolution has a bias.
# Both fit into our weights without loss: W (2 x - 1) + b = W 2 std ((x - mean) / std)
# + W (2 mean - 1) + b. The last two terms are equal for all patches, and join the positions.


@dataclasses.dataclass(frozen=True)
class SiglipPatch:
  """[D, 3, w, w], times 2 std of each channel."""

  def shapes(self, ours):
    return PatchConvolution().shapes(ours)

  def load(self, theirs, ours):
    scale = 2 * np.array(PIXEL_STD, np.float32)[:, None, None]
    return PatchConvolution().load([theirs[0].astype(np.float32) * scale], ours)


@dataclasses.dataclass(frozen=True)
class SiglipPositions:
  """[P, D], the convolution [D, 3, w, w] and its bias [D]."""

  patch_size: int

  def shapes(self, ours):
    height, width, dim = ours
    return [(height * width, dim), (dim, 3, self.patch_size, self.patch_size), (dim,)]

  def load(self, theirs, ours):
    positions, weight, bias = (x.astype(np.float32) for x in theirs)
    shift = 2 * np.array(PIXEL_MEAN, np.float32) - 1
    return (positions + bias + np.einsum("dcrs,c->d", weight, shift)).reshape(ours)


@dataclasses.dataclass(frozen=True)
class FusedThird:
  """One of q, k, v (0, 1, 2) of [3 D, D] as [D, H, h], or of [3 D] as [H, h]."""

  index: int

  def shapes(self, ours):
    width = math.prod(ours[-2:])
    return [(3 * width, *ours[:-2])]

  def load(self, theirs, ours):
    third = np.split(theirs[0], 3)[self.index]
    return third.T.reshape(ours)


@dataclasses.dataclass(frozen=True)
class Rows:
  """[num, D] as the first rows of [V, D]; rows of new ids, and those after `num`, are a mean.

  It is the mean of the first `own` rows, which the tokenizer has. It is safer than random rows, or
  the padding that was there: as an output it is no likelier than the other rows.
  """

  num: int
  own: int
  new: tuple[int, ...] = ()  # below `num`

  def shapes(self, ours):
    return [(self.num, ours[1])]

  def load(self, theirs, ours):
    rows = theirs[0]
    mean = rows[: self.own].mean(axis=0, keepdims=True, dtype=np.float32).astype(rows.dtype)
    whole = np.concatenate([rows, np.repeat(mean, ours[0] - self.num, axis=0)])
    whole[list(self.new)] = mean
    return whole


SAME, FLAT, LINEAR, FROM_HEADS = Same(), Flat(), Transposed(), Transposed(2)
PER_EXPERT = PerExpert()
PATCH, DEPTHWISE = PatchConvolution(), DepthwiseConvolution()
