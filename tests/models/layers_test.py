# SPDX-License-Identifier: Apache-2.0
"""Norms, activations, resized positions, initial values, and the scan over blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from mm1_jax.models.layers import (
  ACTIVATIONS,
  LayerNorm,
  RMSNorm,
  multiply,
  resize_grid,
  run_blocks,
)
from mm1_jax.models.mm1 import MM1
from tests.helpers import tiny

pytestmark = pytest.mark.compiles


@pytest.fixture(scope="module", autouse=True)
def mesh():
  mesh = tiny.mesh()
  with jax.set_mesh(mesh):
    yield mesh


def test_norms_by_hand():
  x = jnp.array([[3.0, -1.0, 1.0, 5.0]])
  rms, layer = RMSNorm(4, 1.0), LayerNorm(4, 1.0)
  # Mean of squares 9, mean 2, variance 5; epsilon 1.
  np.testing.assert_allclose(rms(x), np.array([[3, -1, 1, 5]]) / np.sqrt(10), rtol=1e-6)
  np.testing.assert_allclose(layer(x), np.array([[1, -3, -1, 3]]) / np.sqrt(6), rtol=1e-6)


def test_norms_run_in_float32_and_return_the_dtype_they_got():
  """A bfloat16 mean of 512 values near 100 is off by as much as they vary."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(100 + rng.standard_normal((1, 512)), jnp.bfloat16)
  out = LayerNorm(512)(x)
  assert out.dtype == jnp.bfloat16
  exact = np.asarray(x, np.float64)
  exact = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
  np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=0.02)


def test_products_on_one_device_are_those_of_einsum():
  """And their gradients."""
  shapes = {
    "bsd,df->bsf": ((2, 3, 4), (4, 5)),
    "bsd,vd->bsv": ((2, 3, 4), (5, 4)),
    "bsd,dhk->bshk": ((2, 3, 4), (4, 2, 5)),
    "bshk,hkd->bsd": ((2, 3, 2, 5), (2, 5, 4)),
    "...i,io->...o": ((2, 3, 2, 4), (4, 5)),
  }
  rng = np.random.default_rng(0)
  arrays = {s: [rng.standard_normal(d).astype(np.float32) for d in shapes[s]] for s in shapes}

  def all_of(product):
    def run(subscripts, x, weight):
      y = product(subscripts, x, weight)
      return jnp.sum(jnp.sin(y)), y

    grad = jax.grad(run, argnums=(1, 2), has_aux=True)
    return tiny.jit(lambda arrays: {s: grad(s, *a) for s, a in arrays.items()})(arrays)

  with jax.set_mesh(tiny.mesh(1, 1, 1, 1)):
    actual, expected = all_of(multiply), all_of(jnp.einsum)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected
  )


def test_activations_by_hand():
  x = jnp.array([-1.0, 0.0, 2.0])
  quick = [-1 / (1 + np.exp(1.702)), 0, 2 / (1 + np.exp(-3.404))]
  np.testing.assert_allclose(ACTIVATIONS["quick_gelu"](x), quick, rtol=1e-5)
  # The exact GELU, x Phi(x), not its tanh approximation.
  exact = [-0.15865525, 0, 2 * 0.97724987]
  np.testing.assert_allclose(ACTIVATIONS["gelu"](x), exact, rtol=1e-6)


def test_resize_to_the_same_grid_is_the_identity():
  grid = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 2)), jnp.float32)
  assert resize_grid(grid, (3, 4)) is grid


def test_resize_interpolates_each_dim_apart():
  """A ramp down the rows stays a ramp, away from the border; columns and channels do not mix."""
  ramp = jnp.broadcast_to(jnp.arange(8.0)[:, None, None], (8, 3, 1))
  grid = jnp.concatenate([ramp, jnp.full((8, 3, 1), 7.0)], axis=-1)
  out = resize_grid(grid, (16, 5))
  assert out.shape == (16, 5, 2)
  np.testing.assert_allclose(out[..., 1], 7.0, rtol=1e-5)
  np.testing.assert_allclose(
    out[4:-4, :, 0], np.arange(3.5, 11.5)[:, None] / 2 * np.ones(5), atol=0.02
  )


@pytest.mark.parametrize("side", [448, 560, 672])
def test_positions_for_higher_resolution_are_pillows_bicubic(side):
  """From MM1's 27 x 27 patches of 378 pixels to those of 448, 560 and 672 (section 4.1)."""
  grid = np.random.default_rng(side).standard_normal((27, 27, 2)).astype(np.float32)
  patches = side // 14
  out = resize_grid(jnp.asarray(grid), (patches, patches))
  for channel in range(2):
    image = PIL.Image.fromarray(grid[..., channel])  # of float32
    expected = image.resize((patches, patches), PIL.Image.Resampling.BICUBIC)
    np.testing.assert_allclose(out[..., channel], np.asarray(expected), atol=2e-5)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("scan", [True, False])
def test_blocks_run_in_order(remat, scan):
  """x -> 2 x + block, thrice; the outs are what each block saw."""
  blocks = jnp.array([1.0, 10.0, 100.0])

  def body(x, block):
    return 2 * x + block, {"seen": x, "nothing": None}

  x, outs = run_blocks(body, jnp.ones(()), blocks, remat=remat, scan=scan)
  assert float(x) == 8 + 4 + 20 + 100
  assert outs["seen"].tolist() == [1, 3, 16]
  assert outs["nothing"] is None


def test_initial_values_have_the_spread_that_their_use_needs():
  """Width^-1/2 on the way in; on the way out smaller by the root of twice the depth (GPT-2)."""
  cfg = tiny.model_config()
  model = tiny.jit(lambda: MM1(jax.random.key(0), cfg))()
  leaves = tiny.names(model)
  width, depth, mlp = cfg.decoder.width, cfg.decoder.depth, cfg.decoder.mlp_dim
  heads = cfg.decoder.num_heads * cfg.decoder.head_dim
  spread = {
    "decoder.embedding": width**-0.5,
    "decoder.units.layers.0.attention.query": width**-0.5,
    "decoder.units.layers.0.attention.out": (heads * 2 * depth) ** -0.5,
    "decoder.units.layers.0.mlp.gate": width**-0.5,
    "decoder.units.layers.0.mlp.down": (mlp * 2 * depth) ** -0.5,
    "vit.blocks.mlp.down": (cfg.vision.mlp_dim * 2 * cfg.vision.depth) ** -0.5,
    "vit.patch": (4 * 4 * 3) ** -0.5,
    "connector.readout.layers.0.weight": 0.02,
  }
  for name, expected in spread.items():
    assert leaves[name].std() == pytest.approx(expected, rel=0.15), name
  for name, leaf in leaves.items():
    assert leaf.dtype == np.float32
    if name.endswith("scale"):
      assert (leaf == 1).all(), name
    elif name.endswith("bias"):
      assert (leaf == 0).all(), name
    else:
      assert leaf.std() > 0, name
  stacked = leaves["decoder.units.layers.0.mlp.gate"]
  assert not np.array_equal(stacked[0], stacked[1])  # each block has a key of its own
