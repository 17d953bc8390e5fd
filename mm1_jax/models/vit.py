# SPDX-License-Identifier: Apache-2.0
"""ViT image encoder with CLIP's blocks (arXiv 2103.00020), as MM1 uses it.

Letters: I images, P patches, D width, F mlp.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt8

from mm1_jax.config import ModelConfig, VisionConfig
from mm1_jax.models.attention import Attention, filling
from mm1_jax.models.layers import (
  ACTIVATIONS,
  LayerNorm,
  broadcast,
  constant,
  multiply,
  normal,
  resize_grid,
  run_blocks,
  stack,
)
from mm1_jax.sharding import LAYOUT, gather, spec_of

# CLIP's statistics over RGB in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class MLP(nnx.Module):
  """Two layers with biases and CLIP's activation."""

  def __init__(self, key: jax.Array, cfg: VisionConfig, out_std: float):
    up, down = jax.random.split(key)
    self.activation = cfg.activation
    self.up = normal(up, (cfg.width, cfg.mlp_dim), LAYOUT.mlp_df, cfg.width**-0.5)
    self.up_bias = constant(0.0, cfg.mlp_dim)
    self.down = normal(down, (cfg.mlp_dim, cfg.width), LAYOUT.mlp_fd, out_std)
    self.down_bias = constant(0.0, cfg.width)

  def __call__(self, x: Float[Array, "I P D"]) -> Float[Array, "I P D"]:
    h = multiply("ipd,df->ipf", x, gather(self.up[...], x.dtype, rows=x))
    h = checkpoint_name(h + broadcast(self.up_bias[...], h), "vit_mlp_up")
    h = ACTIVATIONS[self.activation](h)
    y = multiply("ipf,fd->ipd", h, gather(self.down[...], x.dtype, rows=x), out_sharding=spec_of(x))
    return y + broadcast(self.down_bias[...], y)


class Block(nnx.Module):
  """Pre-norm attention and MLP."""

  def __init__(self, key: jax.Array, cfg: VisionConfig):
    attention, mlp = jax.random.split(key)
    scale = (2 * cfg.depth) ** -0.5
    self.attention_norm = LayerNorm(cfg.width, cfg.norm_eps)
    self.attention = Attention(
      attention,
      width=cfg.width,
      num_heads=cfg.num_heads,
      num_kv_heads=cfg.num_heads,
      head_dim=cfg.width // cfg.num_heads,
      out_std=cfg.width**-0.5 * scale,
      qkv_bias=True,
      out_bias=True,
    )
    self.mlp_norm = LayerNorm(cfg.width, cfg.norm_eps)
    self.mlp = MLP(mlp, cfg, cfg.mlp_dim**-0.5 * scale)

  def __call__(
    self, x: Float[Array, "I P D"], segment_ids: Int[Array, "I P"] | None
  ) -> Float[Array, "I P D"]:
    y, _ = self.attention(self.attention_norm(x), segment_ids=segment_ids, causal=False)
    x = checkpoint_name(x + y, "residual")
    return x + self.mlp(self.mlp_norm(x))


class ViT(nnx.Module):
  """Pixels to patch features: one block's output, before any last norm, class token dropped."""

  def __init__(self, key: jax.Array, cfg: ModelConfig):
    vision = cfg.vision
    patch, positions, cls, cls_position, blocks = jax.random.split(key, 5)
    side, width = vision.patch_size, vision.width
    self.cfg = cfg
    self.patch = normal(patch, (side * side * 3, width), LAYOUT.dense_io, (side * side * 3) ** -0.5)
    self.positions = normal(positions, (*vision.position_grid, width), LAYOUT.replicated, 0.02)
    if vision.class_token:
      self.class_token = normal(cls, (width,), LAYOUT.replicated, 0.02)
      self.class_position = normal(cls_position, (width,), LAYOUT.replicated, 0.02)
    self.pre_norm = LayerNorm(width, vision.norm_eps) if vision.pre_norm else None
    self.blocks = stack(lambda key: Block(key, vision), blocks, vision.num_blocks)

  def __call__(self, images: UInt8[Array, "I H W 3"]) -> Float[Array, "I h w D"]:
    """Returns features on the patch grid of the images, whatever grid the position table has."""
    cfg = self.cfg
    x = self._patches(images)
    x = multiply("ihwp,pd->ihwd", x, gather(self.patch[...], x.dtype, rows=x))
    num, height, width, dim = x.shape
    x += broadcast(resize_grid(self.positions[...], (height, width)), x)
    x = x.reshape(num, height * width, dim)
    if cfg.vision.class_token:
      cls = broadcast(self.class_token[...] + self.class_position[...], x[:, :1])
      x = jnp.concatenate([cls, x], axis=1)
    if self.pre_norm is not None:
      x = self.pre_norm(x)
    last, segment_ids = x.shape[1], None
    if more := filling(last):
      # Whole blocks of positions for attention, once for all layers; the mask hides those added.
      x = jnp.pad(x, ((0, 0), (0, more), (0, 0)))
      real = (jnp.arange(x.shape[1]) < last).astype(jnp.int32)
      segment_ids = jnp.broadcast_to(real[None], x.shape[:2], out_sharding=LAYOUT.act_i)
    x, _ = run_blocks(
      lambda x, block: (block(x, segment_ids), None), x, self.blocks, remat=cfg.remat, scan=cfg.scan
    )
    return x[:, last - height * width : last].reshape(num, height, width, dim)

  def _patches(self, images: UInt8[Array, "I H W 3"]) -> Float[Array, "I h w p"]:
    """Normalises pixels and cuts them into patches of p = patch_size^2 x 3 numbers."""
    num, height, width, _ = images.shape
    side = self.cfg.vision.patch_size
    x = images.astype(jnp.float32) / 255
    x = (x - broadcast(jnp.array(PIXEL_MEAN), x)) / broadcast(jnp.array(PIXEL_STD), x)
    grid = (height // side, width // side)
    x = jax.lax.reshape(
      x, (num, grid[0], side, grid[1], side, 3), out_sharding=LAYOUT.act_i
    ).transpose(0, 1, 3, 2, 4, 5)
    x = jax.lax.reshape(x, (num, *grid, side * side * 3), out_sharding=LAYOUT.act_i)
    return x.astype(self.cfg.dtype)
