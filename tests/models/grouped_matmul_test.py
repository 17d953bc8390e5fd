# SPDX-License-Identifier: Apache-2.0
"""Every platform's grouped product against a loop over groups in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from mm1_jax.models import grouped_matmul as lib

pytestmark = pytest.mark.compiles

# Rows of each group: an empty one, one of a single row, one longer than a block; then of no group.
SIZES = np.array([37, 0, lib.CPU_BLOCK + 70, 1, 22])
IN, OUT = 24, 40
NUM_ROWS = lib.padded_rows(int(SIZES.sum()) + 5)

PRODUCTS = {
  "chosen": lib.grouped_matmul,
  "cpu": lib.blocked_product,
  "gpu": lib.ragged_product,
  "tpu": functools.partial(lib.megablox_product, interpret=True),
}
OUTERS = {
  "chosen": lib.grouped_outer,
  "cpu": lib.blocked_outer,
  "gpu": lib.ragged_outer,
  "tpu": functools.partial(lib.megablox_outer, interpret=True),
}


def draw(*shape: int, seed: int) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def groups():
  ends = np.cumsum(SIZES)
  return [slice(end - size, end) for size, end in zip(SIZES, ends, strict=True)]


@pytest.mark.parametrize("platform", PRODUCTS)
@pytest.mark.parametrize("transpose", [False, True])
def test_product_equals_a_loop_over_groups(platform, transpose):
  rows = draw(NUM_ROWS, OUT if transpose else IN, seed=0)
  weights = draw(len(SIZES), IN, OUT, seed=1)
  out = PRODUCTS[platform](
    jnp.asarray(rows), jnp.asarray(weights), jnp.asarray(SIZES, jnp.int32), transpose=transpose
  )
  for group, weight in zip(groups(), weights.astype(np.float64), strict=True):
    expected = rows[group] @ (weight.T if transpose else weight)
    np.testing.assert_allclose(out[group], expected, atol=1e-5)


@pytest.mark.parametrize("platform", OUTERS)
def test_outer_equals_a_loop_over_groups(platform):
  """Rows of no group hold NaN, as the TPU kernels leave them: they must not be read."""
  rows, grad = draw(NUM_ROWS, IN, seed=0), draw(NUM_ROWS, OUT, seed=1)
  if platform in ("cpu", "tpu"):
    rows[SIZES.sum() :] = grad[SIZES.sum() :] = np.nan
  out = OUTERS[platform](jnp.asarray(rows), jnp.asarray(grad), jnp.asarray(SIZES, jnp.int32))
  for e, group in enumerate(groups()):
    expected = rows[group].astype(np.float64).T @ grad[group]
    np.testing.assert_allclose(out[e], expected, atol=1e-4)
  assert not np.any(out[1])  # the empty group's is 0, not what was in memory


def test_no_row_at_all():
  rows, weights = jnp.ones((16, IN)), jnp.ones((2, IN, OUT))
  assert lib.blocked_product(rows, weights, jnp.zeros(2, jnp.int32)).shape == (16, OUT)
  assert not np.any(lib.blocked_outer(rows, rows, jnp.zeros(2, jnp.int32)))


def test_bfloat16_is_summed_in_float32():
  """1 + 256 x 2^-8 is 2; in bfloat16 each addition to 1 would be lost."""
  rows = jnp.full((16, 257), 2.0**-8, jnp.bfloat16).at[:, 0].set(1.0)
  out = lib.grouped_matmul(rows, jnp.ones((1, 257, 8), jnp.bfloat16), jnp.array([16], jnp.int32))
  assert out.dtype == jnp.bfloat16
  assert np.all(out == 2.0)


@pytest.mark.parametrize(("num_rows", "padded"), [(1, 16), (16, 16), (500, 512), (513, 1024)])
def test_padded_rows(num_rows, padded):
  assert lib.padded_rows(num_rows) == padded


def test_tiles_leave_no_remainder_where_they_can():
  assert lib._tiling(98304, 4096, 14336) == (512, 1024, 1024)
  assert lib._tiling(65536, 2560, 8064) == (512, 640, 896)
  assert lib._tiling(48, 24, 1500) == (48, 24, 1024)


def test_a_cpu_takes_the_loop():
  """Its work does not grow with the number of groups."""
  rows, sizes = jnp.ones((256, 64)), jnp.full(16, 16, jnp.int32)
  compiled = jax.jit(lib.grouped_matmul).lower(rows, jnp.ones((16, 64, 64)), sizes).compile()
  assert "while" in str(compiled.as_text())


@pytest.mark.parametrize(
  ("kind", "dtype", "num_out", "chosen"),
  [
    ("NVIDIA H100 80GB HBM3", "bfloat16", 384, True),
    ("NVIDIA H100 80GB HBM3", "float32", 384, False),
    ("NVIDIA H100 80GB HBM3", "bfloat16", 320, False),  # no whole tile
    ("NVIDIA A100-SXM4-80GB", "bfloat16", 384, False),
    ("cpu", "bfloat16", 384, False),
  ],
)
def test_mosaic_kernels_are_for_whole_tiles_on_hopper(kind, dtype, num_out, chosen):
  """What they compute is checked where there is one: bench/gpu/kernels.py."""
  device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
  mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
  rows, sizes = jax.ShapeDtypeStruct((256, 128), dtype), jax.ShapeDtypeStruct((4,), "int32")
  with jax.sharding.use_abstract_mesh(mesh):
    for transpose, shape in ((False, (4, 128, num_out)), (True, (4, num_out, 128))):
      product = jax.make_jaxpr(functools.partial(lib.grouped_matmul, transpose=transpose))
      jaxpr = product(rows, jax.ShapeDtypeStruct(shape, dtype), sizes)
      assert ("wgmma" in str(jaxpr)) == chosen
      few = product(
        jax.ShapeDtypeStruct((16, 128), dtype), jax.ShapeDtypeStruct(shape, dtype), sizes
      )
      assert "wgmma" not in str(few)
