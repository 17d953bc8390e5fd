# SPDX-License-Identifier: Apache-2.0
"""The kernels of a GPU beside plain XLA: `python -m bench.gpu.kernels`.

Attention forward and backward, on packed rows with padding and on pictures; then the grouped
products of experts, evenly and unevenly loaded, with rows of no group at the end. In bfloat16;
errors are the largest difference from float32, as a share of its largest value. Ends with an error
where a kernel's is beyond what bfloat16 explains.
"""

import functools
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mm1_jax.config import RunConfig
from mm1_jax.configs import mm1_debug
from mm1_jax.models.attention import attend
from mm1_jax.models.cudnn import has_kernel
from mm1_jax.models.grouped_matmul import (
  grouped_matmul,
  grouped_outer,
  ragged_outer,
  ragged_product,
)
from mm1_jax.sharding import LAYOUT, make_mesh

TOLERANCE = 0.03
ATTENTION = {  # rows, positions, heads, kv heads, head dim, packed
  "rows of text": (8, 2048, 16, 16, 128, True),
  "grouped queries": (4, 4096, 24, 8, 128, True),
  "336 px, ViT-L": (32, 578, 16, 16, 64, False),
  "378 px, ViT-H": (32, 730, 16, 16, 80, False),
}
ROWS, IN, OUT = 32768, 1024, 2816  # of the grouped products
LOADS = {
  "even": [4096] * 8,
  "uneven": [9000, 0, 4001, 12, 10000, 4096, 2000, 3000],
}


def packed_segments(num_rows: int, num_positions: int) -> np.ndarray:
  """Returns int32[B, S]: examples of 30 to 700 positions, the last tenth of each row padding."""
  rng, segments = np.random.default_rng(0), np.zeros((num_rows, num_positions), np.int32)
  for row in segments:
    ends = np.cumsum(rng.integers(30, 700, num_positions // 30))
    row[:] = np.searchsorted(ends, np.arange(num_positions), side="right") + 1
    row[-num_positions // 10 :] = 0
  return segments


def loss_of(attention, queries, keys, values, segments, weights):
  out = attention(queries, keys, values, segment_ids=segments, causal=segments is not None)
  if segments is not None:
    out = jnp.where((segments > 0)[..., None, None], out, 0)  # outputs of padding are not read
  return jnp.sum(out.astype(jnp.float32) * weights), out


def milliseconds(function, *arrays, turns: int = 20) -> float:
  jax.block_until_ready(function(*arrays))
  begin = time.perf_counter()
  for _ in range(turns):
    result = function(*arrays)
  jax.block_until_ready(result)
  return 1e3 * (time.perf_counter() - begin) / turns


def measure_attention(shape: tuple[int, int, int, int, int, bool]) -> tuple[float, float, float]:
  """Returns the milliseconds of XLA and of the kernel, and the kernel's error."""
  num_rows, length, heads, kv_heads, head_dim, packed = shape
  rng = np.random.default_rng(1)

  def array(num_heads, dtype):
    values = rng.standard_normal((num_rows, length, num_heads, head_dim))
    return jax.device_put(jnp.asarray(values, dtype), LAYOUT.act_bshk)

  qkv = [array(n, jnp.bfloat16) for n in (heads, kv_heads, kv_heads)]
  weights = array(heads, jnp.float32)
  segments = None
  if packed:
    segments = jax.device_put(packed_segments(num_rows, length), LAYOUT.act_b)
  assert has_kernel(*qkv[:2]), "cuDNN does not serve this device"

  def plain(queries, keys, values, **kwargs):
    with mock.patch("mm1_jax.models.attention.has_kernel", return_value=False):
      return attend(queries, keys, values, **kwargs)

  def gradient(attention):
    loss = functools.partial(loss_of, attention)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

  (_, out), grads = gradient(attend)(*qkv, segments, weights)
  exact = [x.astype(jnp.float32) for x in qkv]
  (_, expected), expected_grads = gradient(attend)(*exact, segments, weights)  # XLA's: 32 bits
  error = largest_error((out, *grads), (expected, *expected_grads))
  times = (milliseconds(gradient(f), *qkv, segments, weights) for f in (plain, attend))
  return *times, error


def measure_products(name: str, sizes: list[int]) -> None:
  """Prints a line for each of the three products that a matrix of experts takes part in."""
  rng = np.random.default_rng(2)
  x, dy = (jnp.asarray(rng.standard_normal((ROWS, n)), jnp.bfloat16) for n in (IN, OUT))
  weights = jnp.asarray(rng.standard_normal((len(sizes), IN, OUT)) * IN**-0.5, jnp.bfloat16)
  real = jnp.arange(ROWS)[:, None] < sum(sizes)
  groups = jnp.asarray(sizes, jnp.int32)
  for product, ours, plain, arrays in (
    ("forward", grouped_matmul, ragged_product, (x, weights)),
    (
      "by rows",
      *(functools.partial(f, transpose=True) for f in (grouped_matmul, ragged_product)),
      (dy, weights),
    ),
    ("by weights", grouped_outer, ragged_outer, (x, dy)),
  ):
    # As the model calls them: on a device's own part of each array.
    ours, plain = (
      jax.jit(jax.shard_map(f, in_specs=P(), out_specs=P(), check_vma=False)) for f in (ours, plain)
    )
    out, exact = ours(*arrays, groups), plain(*(a.astype(jnp.float32) for a in arrays), groups)
    if product != "by weights":  # rows of no group are not read
      out, exact = (jnp.where(real, a, 0) for a in (out, exact))
    times = [milliseconds(f, *arrays, groups) for f in (plain, ours)]
    shape, flops = f"{ROWS}x{IN}x{OUT}, {len(sizes)}", 2 * sum(sizes) * IN * OUT
    line(f"{name}, {product}", shape, *times, largest_error([out], [exact]), flops)


def largest_error(actual, expected) -> float:
  pairs = zip(actual, expected, strict=True)
  return max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)


def line(name: str, shape: str, plain: float, kernel: float, error: float, flops=None) -> None:
  rate = f"{flops / kernel / 1e9:.0f}" if flops else ""
  times = f"{plain:.2f} | {kernel:.2f} | {plain / kernel:.1f}"
  print(f"| {name} | {shape} | {times} | {rate} | {error:.2%} |", flush=True)
  assert error < TOLERANCE, name


def main() -> None:
  run = RunConfig.from_dict(mm1_debug.get_config().to_dict())
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
  print("| | shape | XLA, ms | kernel, ms | times as fast | TFLOP/s | largest error |")
  print("|---|---|---|---|---|---|---|")
  with jax.set_mesh(make_mesh(run, jax.devices()[:1])):
    for name, shape in ATTENTION.items():
      line(name, "x".join(map(str, shape[:5])), *measure_attention(shape))
    for name, sizes in LOADS.items():
      measure_products(name, sizes)


if __name__ == "__main__":
  main()
