# SPDX-License-Identifier: Apache-2.0
"""Vision-language connectors: patch features to a fixed number of decoder tokens.

The C-Abstractor is Honeybee's (arXiv 2312.06742, section 3.2) block for block; the others are the
ones MM1 compares it with (section 3.2). All read any patch grid, square or not.

Letters: I images, h x w patch grid, T tokens per image, C channels, D decoder width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mm1_jax.config import ConnectorConfig, ModelConfig
from mm1_jax.models.attention import attend
from mm1_jax.models.layers import LayerNorm, Linear, broadcast, normal, resize_grid
from mm1_jax.sharding import LAYOUT, spec_of

STD = 0.02  # Honeybee's initialisation of every matrix and convolution


def adaptive_average_pool(
  x: Float[Array, "I h w C"], grid: tuple[int, int]
) -> Float[Array, "I t u C"]:
  """Averages over bins [floor(i n / m), ceil((i + 1) n / m)), PyTorch's AdaptiveAvgPool2d.

  Bins overlap where m does not divide n (27 -> 12). As two small matrices, so that it is the same
  matmul on every backend.
  """

  def bins(n: int, m: int) -> np.ndarray:
    start = np.arange(m) * n // m
    end = -(-(np.arange(m) + 1) * n // m)
    inside = (np.arange(n) >= start[:, None]) & (np.arange(n) < end[:, None])
    return inside / (end - start)[:, None]

  rows = jnp.asarray(bins(x.shape[1], grid[0]), jnp.float32)
  columns = jnp.asarray(bins(x.shape[2], grid[1]), jnp.float32)
  pooled = jnp.einsum("ihwc,th,uw->ituc", x.astype(jnp.float32), rows, columns)
  return pooled.astype(x.dtype)


def depthwise_conv(
  x: Float[Array, "I h w C"], kernel: Float[Array, "r s C"]
) -> Float[Array, "I h w C"]:
  """Convolves each channel with its own odd-sized kernel, zeros beyond the border.

  As shifted products rather than `conv_general_dilated`: on a mesh with both fsdp and tensor axes
  the partitioner counts that one's kernel gradient once per tensor shard (jax 0.10.2).
  """
  rows, columns = kernel.shape[:2]
  height, width = x.shape[1:3]
  x = jnp.pad(x, ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0)))
  out = jnp.zeros_like(x[:, :height, :width])
  for i in range(rows):
    for j in range(columns):
      shifted = x[:, i : i + height, j : j + width]
      out += shifted * broadcast(kernel[i, j], shifted)
  return out


class SqueezeExcite(nnx.Module):
  """Scales channels by a gate computed from their global mean (arXiv 1709.01507)."""

  def __init__(self, key: jax.Array, channels: int, reduced: int):
    down, up = jax.random.split(key)
    # Too small to be worth splitting, and `reduced` may not divide.
    self.down = Linear(down, channels, reduced, std=STD, spec=LAYOUT.replicated)
    self.up = Linear(up, reduced, channels, std=STD, spec=LAYOUT.replicated)

  def __call__(self, x: Float[Array, "I h w C"]) -> Float[Array, "I h w C"]:
    mean = jnp.mean(x, axis=(1, 2), keepdims=True)
    return x * broadcast(jax.nn.sigmoid(self.up(jax.nn.silu(self.down(mean)))), x)


class RegNetBlock(nnx.Module):
  """timm's RegNet bottleneck as Honeybee sets it: depth-wise, SiLU, LayerNorm over channels."""

  def __init__(self, key: jax.Array, in_dim: int, out_dim: int):
    keys = jax.random.split(key, 5)
    self.conv1 = Linear(keys[0], in_dim, out_dim, std=STD, bias=False)
    self.norm1 = LayerNorm(out_dim)
    self.conv2 = normal(keys[1], (3, 3, out_dim), LAYOUT.replicated, STD)
    self.norm2 = LayerNorm(out_dim)
    # timm reduces from the block's *input* width.
    self.squeeze_excite = SqueezeExcite(keys[2], out_dim, round(0.25 * in_dim))
    self.conv3 = Linear(keys[3], out_dim, out_dim, std=STD, bias=False)
    self.norm3 = LayerNorm(out_dim)
    changes = in_dim != out_dim
    self.shortcut = Linear(keys[4], in_dim, out_dim, std=STD, bias=False) if changes else None
    self.shortcut_norm = LayerNorm(out_dim) if changes else None

  def __call__(self, x: Float[Array, "I h w C"]) -> Float[Array, "I h w O"]:
    y = jax.nn.silu(self.norm1(self.conv1(x)))
    y = depthwise_conv(y, self.conv2[...])
    y = self.squeeze_excite(jax.nn.silu(self.norm2(y)))
    y = self.norm3(self.conv3(y))
    if self.shortcut is not None and self.shortcut_norm is not None:
      x = self.shortcut_norm(self.shortcut(x))
    return jax.nn.silu(x + y)


class CAbstractor(nnx.Module):
  """RegNet stage, adaptive average pooling to the token grid, RegNet stage."""

  def __init__(self, key: jax.Array, cfg: ConnectorConfig, in_dim: int):
    keys = jax.random.split(key, 2 * cfg.depth)
    dims = [in_dim] + [cfg.hidden] * (2 * cfg.depth)
    blocks = [RegNetBlock(keys[i], dims[i], dims[i + 1]) for i in range(2 * cfg.depth)]
    self.token_grid = cfg.token_grid
    self.stage1 = nnx.List(blocks[: cfg.depth])
    self.stage2 = nnx.List(blocks[cfg.depth :])

  def __call__(self, x: Float[Array, "I h w C"]) -> Float[Array, "I t u O"]:
    for block in self.stage1:
      x = block(x)
    x = adaptive_average_pool(x, self.token_grid)
    for block in self.stage2:
      x = block(x)
    return x


class AveragePool(nnx.Module):
  """Averages patches on the token grid; keeps them as they are where the grids are equal."""

  def __init__(self, cfg: ConnectorConfig):
    self.token_grid = cfg.token_grid

  def __call__(self, x: Float[Array, "I h w C"]) -> Float[Array, "I t u C"]:
    return x if x.shape[1:3] == self.token_grid else adaptive_average_pool(x, self.token_grid)


class AttentionPool(nnx.Module):
  """T learned queries attend to the patches (MM1 section 3.2)."""

  def __init__(self, key: jax.Array, cfg: ConnectorConfig, in_dim: int):
    queries, keys, values, out = jax.random.split(key, 4)
    self.cfg = cfg
    self.norm = LayerNorm(in_dim)
    self.queries = normal(queries, (cfg.num_tokens, cfg.hidden), LAYOUT.replicated, 1.0)
    self.key = Linear(keys, in_dim, cfg.hidden, std=STD)
    self.value = Linear(values, in_dim, cfg.hidden, std=STD)
    self.out = Linear(out, cfg.hidden, cfg.hidden, std=STD)

  def __call__(self, x: Float[Array, "I h w C"]) -> Float[Array, "I t u O"]:
    num, height, width, channels = x.shape
    cfg = self.cfg

    def heads(y: Float[Array, "I n O"]) -> Float[Array, "I n H h"]:
      return y.reshape(*y.shape[:2], cfg.num_heads, cfg.hidden // cfg.num_heads)

    x = self.norm(x.reshape(num, height * width, channels))
    keys = self.key(x)
    shape = (num, cfg.num_tokens, cfg.hidden)
    queries = broadcast(self.queries[...], jnp.zeros(shape, x.dtype, out_sharding=spec_of(keys)))
    pooled = attend(heads(queries), heads(keys), heads(self.value(x)), mask=None)
    return self.out(pooled.reshape(num, cfg.num_tokens, cfg.hidden)).reshape(
      num, *cfg.token_grid, cfg.hidden
    )


class Readout(nnx.Module):
  """Linear layers with an activation between them, from the connector's width to the decoder's."""

  def __init__(self, key: jax.Array, in_dim: int, out_dim: int, *, depth: int, activation: str):
    keys = jax.random.split(key, depth)
    dims = [in_dim] + [out_dim] * depth
    self.activation = activation
    self.layers = nnx.List([Linear(keys[i], dims[i], dims[i + 1], std=STD) for i in range(depth)])

  def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... D"]:
    for i, layer in enumerate(self.layers):
      x = layer(x if i == 0 else getattr(jax.nn, self.activation)(x))
    return x


class Connector(nnx.Module):
  """Learned positions, a pooling body by `cfg.kind`, and the read-out to the decoder's width."""

  def __init__(self, key: jax.Array, model: ModelConfig):
    cfg, width = model.connector, model.vision.width
    positions, body, readout = jax.random.split(key, 3)
    pooled = cfg.kind in ("c_abstractor", "attention_pool")
    # Honeybee adds positions before its abstractor; bins and projections need none.
    self.positions = (
      normal(positions, (*model.vision.position_grid, width), LAYOUT.replicated, STD)
      if pooled
      else None
    )
    if cfg.kind == "c_abstractor":
      self.body = CAbstractor(body, cfg, width)
    elif cfg.kind == "attention_pool":
      self.body = AttentionPool(body, cfg, width)
    else:
      self.body = AveragePool(cfg)
    self.readout = Readout(
      readout,
      cfg.hidden if pooled else width,
      model.decoder.width,
      depth=cfg.mlp_depth if cfg.kind in ("c_abstractor", "mlp") else 1,
      activation="silu" if cfg.kind == "c_abstractor" else "gelu",
    )

  def __call__(self, x: Float[Array, "I h w C"]) -> Float[Array, "I T D"]:
    if self.positions is not None:
      x += broadcast(resize_grid(self.positions[...], (x.shape[1], x.shape[2])), x)
    x = self.readout(self.body(x))
    return x.reshape(x.shape[0], -1, x.shape[-1])
