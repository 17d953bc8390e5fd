# SPDX-License-Identifier: Apache-2.0
"""Matrix products of rows sorted by group, each group with its own matrix.

  rows  [ a a a | b | c c ]     sizes [3, 1, 2]
  out   [ a A   |b B| c C ]     out[i] = rows[i] . weights[group of i]

The work depends on the number of rows alone, however they are divided: nothing is padded to the
largest group. Rows past the last group belong to none: their output is undefined.

Each platform has its own kernel, chosen when the program is lowered, so that one traced step also
compiles for a TPU on a machine without one:

  TPU    the megablox Pallas kernels. XLA's own `ragged_dot` takes every row through every group's
         matrix in the gradient of the weights (libtpu 0.0.42).
  Hopper the Mosaic GPU kernels, in 16 bits. `ragged_dot` ran at a sixth to a ninth of their speed.
  CPU    a loop over blocks of one group's rows; `ragged_dot` does every group there, always.
  else   `ragged_dot`.

Letters: M rows, K in, N out, E groups.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

from mm1_jax.chips import is_hopper

ROW_TILE = 512  # rows that a TPU kernel takes at a time
DIM_TILE = 1024  # and columns, at most: operands, result and sum fit in 16 MB of VMEM
GPU_TILE = 128  # rows and columns of a Mosaic GPU kernel's block
CPU_BLOCK = 128  # rows of one product on a CPU: enough to run at full speed


def padded_rows(num_rows: int) -> int:
  """Returns the next number of rows that the TPU kernels split evenly."""
  tile = ROW_TILE if num_rows >= ROW_TILE else 16  # as deep as a bfloat16 register
  return -(-num_rows // tile) * tile


def grouped_matmul(
  rows: Float[Array, "M K"],
  weights: Float[Array, "E K N"] | Float[Array, "E N K"],
  sizes: Int[Array, " E"],
  *,
  transpose: bool = False,
) -> Float[Array, "M N"]:
  """Returns each row times its group's matrix, summed in float32, in the dtype of the rows.

  Not differentiable: the gradient by rows is `grouped_matmul` of it with `transpose`, the one by
  weights is `grouped_outer`.

  Args:
    rows: sorted by group; on a TPU, `padded_rows` of them.
    weights: one matrix a group, in the dtype of the rows.
    sizes: int32 rows in each group; they add up to M or less.
    transpose: takes the transpose of each matrix, [E, N, K].
  """
  return jax.lax.platform_dependent(
    rows,
    weights,
    sizes,
    tpu=functools.partial(megablox_product, transpose=transpose),
    cpu=functools.partial(blocked_product, transpose=transpose),
    default=functools.partial(
      mosaic_product if _has_mosaic(rows, weights) else ragged_product, transpose=transpose
    ),
  )


def grouped_outer(
  rows: Float[Array, "M K"], grad: Float[Array, "M N"], sizes: Int[Array, " E"]
) -> Float[Array, "E K N"]:
  """Returns rows^T . grad of each group, the gradient of its matrix; 0 where it has no row."""
  return jax.lax.platform_dependent(
    rows,
    grad,
    sizes,
    tpu=megablox_outer,
    cpu=blocked_outer,
    default=mosaic_outer if _has_mosaic(rows, grad) else ragged_outer,
  )


def megablox_product(rows, weights, sizes, *, transpose: bool = False, interpret: bool = False):
  return gmm(
    rows,
    weights,
    sizes,
    preferred_element_type=rows.dtype,
    tiling=_tiling(rows.shape[0], rows.shape[1], weights.shape[1 if transpose else 2]),
    transpose_rhs=transpose,
    interpret=interpret,
  )


def megablox_outer(rows, grad, sizes, *, interpret: bool = False):
  return tgmm(
    rows.T,
    grad,
    sizes,
    preferred_element_type=rows.dtype,
    tiling=_tiling(rows.shape[0], rows.shape[1], grad.shape[1]),
    interpret=interpret,
  )


def _tiling(num_rows: int, num_in: int, num_out: int) -> tuple[int, int, int]:
  """Returns tiles of rows, in and out; the largest that leave no remainder where one does."""

  def tile(dim: int) -> int:
    even = [t for t in range(128, DIM_TILE + 1, 128) if dim % t == 0]
    return even[-1] if even else min(dim, DIM_TILE)

  return min(num_rows, ROW_TILE), tile(num_in), tile(num_out)


def _has_mosaic(rows: Array, other: Array) -> bool:
  """Returns whether the mesh's chips and the shapes are those of the Mosaic GPU kernels."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  hopper = device is not None and is_hopper(device.device_kind)
  whole = all(dim % GPU_TILE == 0 for dim in (rows.shape[-1], *other.shape[-2:][other.ndim == 2 :]))
  enough = rows.shape[0] >= GPU_TILE  # a block's rows; a few decoded tokens are not
  return hopper and whole and enough and rows.dtype in (jnp.bfloat16, jnp.float16)


def mosaic_product(rows, weights, sizes, *, transpose: bool = False):
  # Imported here: it defines the flags of JAX's own tests.
  from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

  out = ragged_dot(
    rows,
    weights,
    group_sizes=sizes,
    block_m=GPU_TILE,
    block_n=GPU_TILE,
    block_k=GPU_TILE,
    max_concurrent_steps=3,  # what fits into shared memory
    grid_block_n=4,
    transpose_rhs=transpose,
  )
  # Rows of no group are not written, and uninitialised memory may hold NaN: 0 x NaN would reach the
  # gradient of the weights.
  return jnp.where(jnp.arange(rows.shape[0])[:, None] < jnp.sum(sizes), out, 0)


def mosaic_outer(rows, grad, sizes):
  from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

  return transposed_ragged_dot(
    rows,
    grad,
    group_sizes=sizes,
    block_m=GPU_TILE,
    block_n=GPU_TILE,
    block_k=GPU_TILE // 2,
    max_concurrent_steps=4,
    grid_block_n=1,
  )


def ragged_product(rows, weights, sizes, *, transpose: bool = False):
  contract = (((1,), (2 if transpose else 1,)), ((), ()))
  dims = jax.lax.RaggedDotDimensionNumbers(contract, [0], [0])
  return _ragged(rows, weights, sizes, dims)


def ragged_outer(rows, grad, sizes):
  dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
  return _ragged(rows, grad, sizes, dims)


def _ragged(a, b, sizes, dims):
  out = jax.lax.ragged_dot_general(a, b, sizes, dims, preferred_element_type=jnp.float32)
  return out.astype(a.dtype)


def blocked_product(rows, weights, sizes, *, transpose: bool = False):
  contract = (((1,), (1 if transpose else 0,)), ((), ()))

  def multiply(out, group, start, mine):
    block = jax.lax.dynamic_slice_in_dim(rows, start, mine.shape[0])
    product = _dot(block, weights[group], contract).astype(rows.dtype)
    # A block may reach into the next group's rows, or, at the end of all, back over finished ones.
    others = jax.lax.dynamic_slice_in_dim(out, start, mine.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, product, others), start, 0)

  num_out = weights.shape[1 if transpose else 2]
  return _over_blocks(multiply, jnp.zeros((rows.shape[0], num_out), rows.dtype), rows, sizes)


def blocked_outer(rows, grad, sizes):
  def add(out, group, start, mine):
    a, b = (jax.lax.dynamic_slice_in_dim(x, start, mine.shape[0]) for x in (rows, grad))
    product = _dot(jnp.where(mine, a, 0), jnp.where(mine, b, 0), (((0,), (0,)), ((), ())))
    return out.at[group].add(product)

  out = jnp.zeros((sizes.shape[0], rows.shape[1], grad.shape[1]), jnp.float32)
  return _over_blocks(add, out, rows, sizes).astype(rows.dtype)


def _dot(a, b, dims) -> Array:
  return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _over_blocks(body: Callable, out: Array, rows: Float[Array, "M K"], sizes: Int[Array, " E"]):
  """Runs `body(out, group, start, mine) -> out` over blocks of `CPU_BLOCK` rows of one group each.

  `mine[i]` says whether row start + i is of the group and of this block.
  """
  num_rows = rows.shape[0]
  block = min(CPU_BLOCK, num_rows)
  ends = jnp.cumsum(sizes)
  starts = ends - sizes
  last_block = jnp.cumsum(-(-sizes // block))  # blocks up to and with each group

  def step(i, out):
    group = jnp.searchsorted(last_block, i, side="right")
    first = last_block[group] - -(-sizes[group] // block)
    begin = starts[group] + (i - first) * block
    start = jnp.minimum(begin, num_rows - block)
    index = start + jnp.arange(block)
    return body(out, group, start, ((index >= begin) & (index < ends[group]))[:, None])

  return jax.lax.fori_loop(0, last_block[-1], step, out)
