# SPDX-License-Identifier: Apache-2.0
"""Connectors: literal pooling bins, the convolution against XLA's, every kind's shape and values.

The C-Abstractor as a whole is compared with Honeybee's in `parity_test.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm1_jax.config import ConnectorConfig
from mm1_jax.models.connector import Connector, adaptive_average_pool, depthwise_conv
from tests.helpers import tiny

pytestmark = pytest.mark.compiles


@pytest.fixture(scope="module", autouse=True)
def mesh():
  mesh = tiny.mesh()
  with jax.set_mesh(mesh):
    yield mesh


def test_bins_overlap_where_the_grids_do_not_divide():
  """5 -> 3: rows [0, 2), [1, 4), [3, 5)."""
  x = jnp.array([1.0, 2, 4, 8, 16]).reshape(1, 5, 1, 1)
  out = adaptive_average_pool(x, (3, 1))
  np.testing.assert_allclose(
    out[0, :, 0, 0], [(1 + 2) / 2, (2 + 4 + 8) / 3, (8 + 16) / 2], rtol=1e-6
  )


def test_bins_of_27_and_12_are_pytorchs():
  """MM1's own grids; a column holds its number, so a bin's mean tells its ends."""
  columns = jnp.arange(27.0).reshape(1, 1, 27, 1)
  out = adaptive_average_pool(columns, (1, 12))[0, 0, :, 0]
  bins = [
    (0, 3),
    (2, 5),
    (4, 7),
    (6, 9),
    (9, 12),
    (11, 14),
    (13, 16),
    (15, 18),
    (18, 21),
    (20, 23),
    (22, 25),
    (24, 27),
  ]
  np.testing.assert_allclose(out, [(a + b - 1) / 2 for a, b in bins], rtol=1e-5)


def test_pool_of_a_multiple_is_the_plain_mean():
  x = np.random.default_rng(0).standard_normal((2, 4, 6, 3)).astype(np.float32)
  expected = x.reshape(2, 2, 2, 3, 2, 3).mean((2, 4))
  np.testing.assert_allclose(adaptive_average_pool(jnp.asarray(x), (2, 3)), expected, atol=1e-6)


def test_depthwise_conv_and_its_gradients_equal_xlas():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, 5, 4, 3)), jnp.float32)
  kernel = jnp.asarray(rng.standard_normal((3, 3, 3)), jnp.float32)
  direction = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

  def reference(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel[:, :, None],
      (1, 1),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=3,
    )

  for conv in (depthwise_conv, reference):
    assert conv(x, kernel).shape == x.shape
  np.testing.assert_allclose(depthwise_conv(x, kernel), reference(x, kernel), atol=1e-5)
  ours, theirs = (
    jax.grad(lambda x, k, conv=conv: jnp.sum(conv(x, k) * direction), (0, 1))(x, kernel)
    for conv in (depthwise_conv, reference)
  )
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def make(mesh, **changes) -> Connector:
  cfg = tiny.model_config()
  cfg = dataclasses.replace(cfg, connector=dataclasses.replace(cfg.connector, **changes))
  return tiny.place(lambda: Connector(jax.random.key(0), cfg), mesh, tiny.draw)


PATCHES = np.random.default_rng(0).standard_normal((2, 2, 3, 16)).astype(np.float32)


def apply(connector: Connector, x: np.ndarray, mesh) -> np.ndarray:
  return np.asarray(tiny.jit(lambda connector, x: connector(x))(connector, tiny.put(x, mesh)))


KINDS = {
  "c_abstractor": (1, 2),
  "average_pool": (1, 2),
  "attention_pool": (1, 2),
  "linear": (2, 3),
  "mlp": (2, 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_makes_its_tokens(kind, mesh):
  grid = KINDS[kind]
  out = apply(make(mesh, kind=kind, token_grid=grid), PATCHES, mesh)
  assert out.shape == (2, grid[0] * grid[1], 32)
  assert np.isfinite(out).all()
  assert np.abs(out[0] - out[1]).max() > 0.01


@pytest.mark.parametrize("kind", ["c_abstractor", "attention_pool", "average_pool"])
def test_a_finer_grid_than_trained_on_is_read(kind, mesh):
  """SFT at a higher resolution: learned positions are resized, tokens stay as many."""
  finer = np.random.default_rng(0).standard_normal((2, 5, 4, 16)).astype(np.float32)
  assert apply(make(mesh, kind=kind), finer, mesh).shape == (2, 2, 32)


def test_average_pool_by_hand(mesh):
  connector = make(mesh, kind="average_pool")
  weights = tiny.names(connector)
  assert set(weights) == {"readout.layers.0.weight", "readout.layers.0.bias"}
  # 3 columns -> 2 bins: [0, 2) and [1, 3).
  pooled = np.stack([PATCHES[:, :, :2].mean((1, 2)), PATCHES[:, :, 1:].mean((1, 2))], axis=1)
  expected = pooled @ weights["readout.layers.0.weight"] + weights["readout.layers.0.bias"]
  np.testing.assert_allclose(apply(connector, PATCHES, mesh), expected, atol=1e-4)


def test_mlp_by_hand(mesh):
  connector = make(mesh, kind="mlp", token_grid=(2, 3))
  w = tiny.names(connector)
  x = PATCHES.reshape(2, 6, 16)
  x = x @ w["readout.layers.0.weight"] + w["readout.layers.0.bias"]
  x = np.asarray(jax.nn.gelu(x)) @ w["readout.layers.1.weight"] + w["readout.layers.1.bias"]
  np.testing.assert_allclose(apply(connector, PATCHES, mesh), x, atol=1e-4)


def test_tokens_run_along_rows_first(mesh):
  """The order in which patches are flattened is the order the decoder reads."""
  x = PATCHES.copy()
  x[:, 0, 1] += 10.0
  connector = make(mesh, kind="linear", token_grid=(2, 3))
  changed = np.abs(apply(connector, x, mesh) - apply(connector, PATCHES, mesh)).max((0, 2)) > 0.1
  assert changed.tolist() == [False, True, False, False, False, False]


def test_attention_pool_by_hand(mesh):
  connector = make(mesh, kind="attention_pool")
  w = {name: leaf.astype(np.float64) for name, leaf in tiny.names(connector).items()}
  positions = np.asarray(jax.image.resize(jnp.asarray(w["positions"]), (2, 3, 16), "bicubic"))
  x = (PATCHES + positions).reshape(2, 6, 16)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  x = x * w["body.norm.scale"] + w["body.norm.bias"]
  keys, values = (x @ w[f"body.{n}.weight"] + w[f"body.{n}.bias"] for n in ("key", "value"))
  pooled = np.zeros((2, 2, 8))
  for head in (slice(0, 4), slice(4, 8)):
    logits = np.einsum("td,ipd->itp", w["body.queries"][:, head], keys[..., head]) / 2
    probs = np.exp(logits)
    pooled[..., head] = probs / probs.sum(-1, keepdims=True) @ values[..., head]
  expected = pooled @ w["body.out.weight"] + w["body.out.bias"]
  expected = expected @ w["readout.layers.0.weight"] + w["readout.layers.0.bias"]
  assert tiny.largest_difference(apply(connector, PATCHES, mesh), expected) < 1e-4


def test_defaults_are_mm1s():
  assert ConnectorConfig().kind == "c_abstractor"
  assert ConnectorConfig().num_tokens == 144
