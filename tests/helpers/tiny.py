# SPDX-License-Identifier: Apache-2.0
"""A model of a few thousand params, its meshes, and a packed batch with pictures and padding.

Params are drawn with numpy and put in place by name: nothing is compiled to make a model, norms and
biases are not at their initial 1 and 0, and every mesh gets the very same numbers.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from mm1_jax.batch import Batch
from mm1_jax.config import (
  MESH_AXES,
  ConnectorConfig,
  DataConfig,
  DecoderConfig,
  ModelConfig,
  MoEConfig,
  RunConfig,
  SourceConfig,
  VisionConfig,
)
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import LAYOUT, abstract_state
from mm1_jax.train.loss import loss_fn

# Compiles many times faster; at these sizes nothing has to run fast.
jit = functools.partial(
  jax.jit,
  compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False},
)

IMAGE = 4  # placeholder id
TOKENS = 2  # of an image
# Compiles faster than the C-Abstractor.
POOLED = ConnectorConfig("average_pool", token_grid=(1, TOKENS), hidden=8)


def model_config(moe: MoEConfig | None = None, **changes: Any) -> ModelConfig:
  """Returns a model with dims that all divide over a mesh of 1 x 2 x 2 x 2."""
  cfg = ModelConfig(
    vision=VisionConfig(
      image_size=(8, 12),
      patch_size=4,
      width=16,
      depth=2,
      num_heads=2,
      mlp_dim=24,
      position_grid=(3, 2),
    ),
    connector=ConnectorConfig(token_grid=(1, 2), hidden=8, depth=1, num_heads=2),
    decoder=DecoderConfig(
      vocab_size=48,
      width=32,
      depth=2,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      mlp_dim=24,
      moe=moe,
    ),
    image_token_id=IMAGE,
    dtype="float32",
    remat="none",
  )
  return dataclasses.replace(cfg, **changes)


def run_config(moe: MoEConfig | None = None, **changes: Any) -> RunConfig:
  return RunConfig(
    model=model_config(moe, **changes),
    data=DataConfig(
      sources=(SourceConfig("captions", "x"), SourceConfig("text", "x")),
      seq_len=16,
      batch_size=8,
      images_per_row=2,
    ),
  )


SPARSE = MoEConfig(num_experts=4, every=2, top_k=2, capacity_factor=None)
BOUNDED = dataclasses.replace(SPARSE, capacity_factor=1.25)


def mesh(*sizes: int) -> Mesh:
  """Returns a mesh of these axis lengths over the first devices; 1 where none is given."""
  sizes += (1,) * (len(MESH_AXES) - len(sizes))
  return jax.make_mesh(
    sizes,
    MESH_AXES,
    axis_types=(AxisType.Explicit,) * len(MESH_AXES),
    devices=jax.devices()[: math.prod(sizes)],
  )


def names(tree: Any) -> dict[str, np.ndarray]:
  """Returns the leaves of a module by dotted name, without nnx.Param's own `value`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {name(path): np.asarray(leaf) for path, leaf in leaves}


def name(path) -> str:
  parts = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path]
  return ".".join(parts[:-1] if parts[-1] == "value" else parts)


def place(make: Callable[[], Any], on: Mesh, values: Callable[[str, tuple], np.ndarray]) -> Any:
  """Returns what `make()` would, its arrays being `values(name, shape)`, sharded as it says."""

  def put(path, leaf):
    value = np.asarray(values(name(path), leaf.shape), leaf.dtype)
    assert value.shape == leaf.shape, f"{name(path)}: {value.shape} is not {leaf.shape}"
    return jax.device_put(value, leaf.sharding)

  return jax.tree_util.tree_map_with_path(put, abstract_state(make, on))


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns random values of a sensible size for a param, the same for the same name."""
  noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
  kind = name.split(".")[-1]
  if kind == "scale":
    return 1 + 0.2 * noise
  if kind.endswith("bias"):
    return 0.2 * noise
  if kind in ("positions", "class_token", "class_position", "embedding"):
    return 0.5 * noise
  if kind in ("query", "key", "value") and len(shape) > 2:
    return noise * shape[-3] ** -0.5
  return noise * math.prod(shape[-2 if kind != "out" else -3 : -1]) ** -0.5


def make_model(cfg: ModelConfig, on: Mesh) -> MM1:
  return place(lambda: MM1(jax.random.key(0), cfg), on, draw)


def row(*examples: str, seed: int, num_positions: int = 16, num_images: int = 2) -> dict:
  """Returns one packed row; an example is a string of `t` (text) and `i` (an image's run)."""
  rng = np.random.default_rng(seed)
  tokens, positions, segments = [], [], []
  count = 0
  for segment, example in enumerate(examples, start=1):
    kinds = example.replace("i", "i" * TOKENS)
    tokens += [IMAGE if kind == "i" else int(rng.integers(5, 48)) for kind in kinds]
    positions += range(len(kinds))
    segments += [segment] * len(kinds)
    count += example.count("i")
  padding = num_positions - len(tokens)
  assert padding >= 0
  assert count <= num_images
  targets = np.array([*tokens[1:], 0] + [0] * padding)
  last = np.array([a != b for a, b in zip(segments, [*segments[1:], 0], strict=True)])
  last = np.concatenate([last, np.ones(padding, bool)])
  images = np.zeros((num_images, 8, 12, 3), np.uint8)
  images[:count] = rng.integers(0, 256, (count, 8, 12, 3))
  return {
    "tokens": np.array(tokens + [0] * padding, np.int32),
    "targets": targets.astype(np.int32),
    "loss_mask": ((targets != IMAGE) & ~last).astype(np.float32),
    "positions": np.array([*positions, *[0] * padding], np.int32),
    "segment_ids": np.array(segments + [0] * padding, np.int32),
    "source_ids": np.array([s % 2 for s in segments] + [0] * padding, np.int32),
    "images": images,
    "image_mask": np.arange(num_images) < count,
  }


def stack(rows: list[dict]) -> Batch:
  return Batch(**{key: np.stack([row[key] for row in rows]) for key in rows[0]})


# Two pictures, one, none; full rows and half empty ones.
BATCH = stack(
  [
    row("tttitt", "titt", seed=0),
    row("itttttttt", "ttt", seed=1),
    row("ttttttttttt", seed=2),
    row("tit", "tttt", "ti", seed=3),
    row("tiittttttttt", seed=4),
    row("t", "tt", "ittt", "ttt", seed=5),
    row("tttt", seed=6),
    row("tttttttt", "itttit", seed=7),
  ]
)


def put(batch: Any, on: Mesh) -> Any:
  """Puts a batch, or any arrays with rows as their first dim, on the mesh."""
  return jax.device_put(batch, NamedSharding(on, LAYOUT.act_b))


@functools.cache
def loss_and_gradients(run: RunConfig) -> Callable[[MM1, Batch], tuple[jax.Array, MM1]]:
  """Returns the compiled function from model and batch to the loss and its gradient."""

  @jit
  def compute(model, batch):
    def total(model):
      return loss_fn(model, batch, run, num_targets=jnp.sum(batch.loss_mask)).total

    return jax.value_and_grad(total)(model)

  return compute


def largest_difference(a: Any, b: Any) -> float:
  """Returns the largest difference, relative to the largest value of `b`."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  assert a.shape == b.shape
  return float(np.max(np.abs(a - b), initial=0) / max(np.max(np.abs(b), initial=0), 1e-12))
