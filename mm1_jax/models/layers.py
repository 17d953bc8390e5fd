# SPDX-License-Identifier: Apache-2.0
"""What every part is made of: parameters, norms, linear maps, and the scan over equal blocks.

Modules are `nnx.Module`s used as plain pytrees. Params are float32 and cast where they are used; a
module computes in the dtype of its input, except for norms and softmaxes, which run in float32.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core.primitives import name_p
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mm1_jax.models.cudnn import FORWARD_KERNEL
from mm1_jax.models.dequantize import dequantize
from mm1_jax.models.splash import tpu_kind
from mm1_jax.sharding import LAYOUT, axes_of, gather, on_each_chip, spec_of


def remat_policy(remat: str) -> Callable[..., Any]:
  """Returns what of a block the backward pass keeps, see `ModelConfig.remat`."""
  if remat == "dots":
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  names = [] if remat == "full" else remat.split("+")
  host = [name.removeprefix("host:") for name in names if name.startswith("host:")]
  named = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[name for name in names if not name.startswith("host:")],
    names_which_can_be_offloaded=host,
    offload_src="device",
    offload_dst="pinned_host",
  )

  def policy(primitive, *args, **params):
    # The softmax's normaliser, its second output, cannot be named from outside, and without it the
    # backward pass would run the whole kernel once more.
    if primitive.name == FORWARD_KERNEL:
      primitive, params = name_p, {"name": "attention"}
    return named(primitive, *args, **params)

  return policy


def normal(key: jax.Array, shape: tuple[int, ...], spec: P, std: float) -> nnx.Param:
  """Returns a float32 weight drawn from N(0, std), created with its sharding."""
  return nnx.Param(std * jax.random.normal(key, shape, jnp.float32, out_sharding=spec))


def constant(value: float, *shape: int) -> nnx.Param:
  """Returns a replicated float32 weight: a norm's scale or a bias."""
  return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=LAYOUT.replicated))


def broadcast(weight: Float[Array, "..."], like: Float[Array, "..."]) -> Float[Array, "..."]:
  """Returns a weight over the last dims of `like`, in its shape, dtype and sharding.

  The one way from a stored bias, scale, position table or kernel (or an array with dims of length
  1) to what it is added to or multiplied with. It is cast *after* it is broadcast, so that its
  gradient, a sum over all positions, is a float32 sum: in bfloat16 each term below 2^-9 of what is
  summed already is lost, and sums over 32k positions were 10 to 30% off. As in `gather`, the type
  is *reduced* over the axes of the leading dims: each chip keeps a sum of its own until the
  gradient has left all loops.
  """
  lead, spec = like.ndim - weight.ndim, spec_of(like)
  reduced = spec_of(weight).reduced | set(axes_of(*spec[:lead]))
  weight = weight.astype(jnp.float32)
  weight = jax.sharding.reshard(weight, P(*spec[lead:], reduced=frozenset(reduced)))
  dims = tuple(range(lead, like.ndim))
  weight = jax.lax.broadcast_in_dim(weight, like.shape, dims, out_sharding=P(*spec))
  return weight.astype(like.dtype)


def _pick(table: Float[Array, "V D"], ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
  return table.at[ids].get(out_sharding=P(*spec_of(ids), None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows_of(table_type: Any, table, ids):
  del table_type
  return _pick(table, ids)


def _rows_of_forward(table_type, table, ids):
  del table_type
  return _pick(table, ids), ids


def _rows_of_backward(table_type, ids, grad):
  wide = table_type.update(dtype=jnp.float32)
  (of_table,) = jax.linear_transpose(lambda table: _pick(table, ids), wide)(
    grad.astype(jnp.float32)
  )
  return of_table.astype(table_type.dtype), None


_rows_of.defvjp(_rows_of_forward, _rows_of_backward)


def rows_of(table: Float[Array, "V D"], ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
  """Returns the rows of a table by their ids.

  The table's gradient is summed in float32 on each chip, for the reason in `broadcast`, and cast
  before it crosses to others: [V, D] in float32 exists on a chip for as long as it is summed.
  """
  return _rows_of(jax.typeof(table), table, ids)


def multiply(
  subscripts: str,
  x: Float[Array, "..."],
  weight: Float[Array, "..."],
  *,
  out_sharding: P | None = None,
  **kwargs: Any,
) -> Float[Array, "..."]:
  """Returns `jnp.einsum(subscripts, x, weight, ...)` for positions of rows: "bsd,df->bsf".

  The leading letters of x and the result are not the weight's. On a single device that is no TPU,
  they are merged into one dim for the product: else XLA merges them in the weight's gradient, by a
  transposition that it computes element by element, with all that comes before it.
  """
  if jax.sharding.get_abstract_mesh().size != 1 or tpu_kind() is not None:
    return jnp.einsum(subscripts, x, weight, out_sharding=out_sharding, **kwargs)
  taken, result = subscripts.split(",")[0], subscripts.split("->")[1]
  equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(taken, result, strict=False))
  lead = "".join(letter for letter, _ in equal)
  num = x.ndim - len(taken.removeprefix(lead))
  dims, spec = x.shape[:num], spec_of(x)[:num]
  flat = (math.prod(dims), *x.shape[num:])
  x = jax.lax.reshape(x, flat, out_sharding=P(axes_of(*spec)))
  y = jnp.einsum(subscripts.replace(lead, "n"), x, weight, **kwargs)
  return jax.lax.reshape(y, (*dims, *y.shape[1:]), out_sharding=P(*spec, *spec_of(y)[1:]))


class RMSNorm(nnx.Module):
  """Root-mean-square norm over the last dim (arXiv 1910.07467)."""

  def __init__(self, dim: int, eps: float):
    self.eps = eps
    self.scale = constant(1.0, dim)

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * broadcast(self.scale[...], y)).astype(x.dtype)


class LayerNorm(nnx.Module):
  """Layer norm over the last dim, with scale and bias."""

  def __init__(self, dim: int, eps: float = 1e-5):
    self.eps = eps
    self.scale = constant(1.0, dim)
    self.bias = constant(0.0, dim)

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    y = x.astype(jnp.float32)
    y -= jnp.mean(y, axis=-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * broadcast(self.scale[...], y) + broadcast(self.bias[...], y)).astype(x.dtype)


class Linear(nnx.Module):
  """A matrix, and a bias where `bias` is set, over the last dim; output whole on every chip."""

  def __init__(
    self,
    key: jax.Array,
    in_dim: int,
    out_dim: int,
    *,
    std: float,
    bias: bool = True,
    spec: P = LAYOUT.dense_io,
  ):
    self.weight = normal(key, (in_dim, out_dim), spec, std)
    self.bias = constant(0.0, out_dim) if bias else None

  def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    y = multiply("...i,io->...o", x, gather(self.weight[...], x.dtype, rows=x))
    return y if self.bias is None else y + broadcast(self.bias[...], y)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """x sigmoid(1.702 x), which CLIP was trained with; GELU in its place breaks the weights."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
  "quick_gelu": quick_gelu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),  # SigLIP's
}


def resize_grid(grid: Float[Array, "H W D"], shape: tuple[int, int]) -> Float[Array, "h w D"]:
  """Resizes learned 2-D positions bicubically to another patch grid."""
  if grid.shape[:2] == shape:
    return grid
  resize = functools.partial(jax.image.resize, shape=(*shape, grid.shape[-1]), method="bicubic")
  return on_each_chip(resize, (), (grid,))


def stack(make: Callable[[jax.Array], Any], key: jax.Array, num: int) -> Any:
  """Returns `num` equal modules as one whose arrays have a leading dim, each from its own key."""
  return jax.vmap(make)(jax.random.split(key, num))


def run_blocks(
  block_fn: Callable[[Any, Any], tuple[Any, Any]], x: Any, blocks: Any, *, remat: str, scan: bool
) -> tuple[Any, Any]:
  """Runs `block_fn(x, block) -> (x, out)` over stacked blocks, dequantised where they run.

  `remat` names what the backward pass keeps of a block (see `ModelConfig.remat`). With `scan` the
  block is compiled once, whatever the depth; without, it is unrolled, with the same result.

  Returns:
    The last x, and the outs stacked along a leading dim.
  """

  def body(x, block):
    return block_fn(x, dequantize(block))

  if remat != "none":
    # Inside a scan the barrier against common-subexpression elimination is not needed.
    body = jax.checkpoint(body, policy=remat_policy(remat), prevent_cse=not scan)
  if scan:
    return jax.lax.scan(body, x, blocks)
  outs = []
  for block in _unstack(blocks):
    x, out = body(x, block)
    outs.append(out)
  return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def _unstack(blocks: Any) -> list[Any]:
  """Returns the blocks of a stack. Unlike that of indexing, the gradient is written in one go."""
  leaves, treedef = jax.tree.flatten(blocks)
  split = [jax.lax.split(leaf, (1,) * leaf.shape[0]) for leaf in leaves]
  return [treedef.unflatten([x[0] for x in parts]) for parts in zip(*split, strict=True)]
