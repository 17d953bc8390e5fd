# SPDX-License-Identifier: Apache-2.0
"""LoRA (arXiv 2106.09685): W + alpha / rank * A B, where A and B are trained and W is fixed.

The sum is made where a layer runs, one layer at a time, so the layers' code has no part in it:
attention, dense and sparse networks, on any mesh. What it saves is the optimizer's state, and all
but one layer's gradient of W. It saves no time: A's and B's gradients are made of that of W.

Letters: r rank; E experts; I, O the dims that a matrix maps from and to, two of them for heads.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from mm1_jax.config import LoRAConfig
from mm1_jax.models.layers import normal
from mm1_jax.sharding import on_each_chip, spec_of

ATTENTION = ("query", "key", "value", "out")  # the other matrices are of the feed-forward network


class Adapter(nnx.Module):
  """A[E, I, r] from N(0, 1 / I) and B[E, r, O] = 0, split over the mesh like W[E, I, O].

  The first `lead` dims of W are experts, those up to `split` what it maps from.
  """

  def __init__(self, key: jax.Array, weight: Float[Array, "..."], rank: int, lead: int, split: int):
    self.lead, self.split = lead, split
    shape, spec = weight.shape, tuple(spec_of(weight))
    spec += (None,) * (len(shape) - len(spec))
    std = math.prod(shape[lead:split]) ** -0.5
    self.a = normal(key, (*shape[:split], rank), P(*spec[:split], None), std)
    place = P(*spec[:lead], None, *spec[split:])
    self.b = nnx.Param(
      jnp.zeros((*shape[:lead], rank, *shape[split:]), jnp.float32, out_sharding=place)
    )

  def product(self) -> Float[Array, "..."]:
    """Returns A B, of the shape and sharding of W. No collective: r is not split over chips."""
    a, b = self.a[...], self.b[...]
    w = "ijkl"[: a.ndim + b.ndim - 2 - self.lead]
    subscripts = f"{w[: self.split]}r,{w[: self.lead]}r{w[self.split :]}->{w}"
    split = spec_of(a).partitions[: self.split] + spec_of(b).partitions[self.lead + 1 :]
    return on_each_chip(functools.partial(jnp.einsum, subscripts), split, (a, b))


class LoRA(nnx.Module):
  """The adapters of a decoder layer, under the names of its matrices."""

  def __init__(self, key: jax.Array, layer: Any, cfg: LoRAConfig):
    self.cfg = cfg
    for number, name in enumerate(cfg.matrices):
      weight = getattr(_home(layer, name), name)[...]
      lead = int(name not in ATTENTION and weight.ndim == 3)
      split = lead + 1 + (name == "out")  # from heads and their dims
      key_of_one = jax.random.fold_in(key, number)
      setattr(self, name, Adapter(key_of_one, weight, cfg.rank, lead, split))


def merge(layer: Any) -> Any:
  """Returns a decoder layer with the sums as its matrices, and without adapters."""
  if layer.lora is None:
    return layer
  layer = jax.tree.map(lambda x: x, layer)  # a copy
  lora, layer.lora = layer.lora, None
  for name in lora.cfg.matrices:
    home = _home(layer, name)
    weight = getattr(home, name)[...]
    delta = lora.cfg.alpha / lora.cfg.rank * getattr(lora, name).product()
    setattr(home, name, nnx.Param((weight + delta).astype(weight.dtype)))
  return layer


def _home(layer: Any, name: str) -> Any:
  return layer.attention if name in ATTENTION else layer.mlp
