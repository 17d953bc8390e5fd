# SPDX-License-Identifier: Apache-2.0
"""The decoder-only language model: a scan over units of k layers, the last of them sparse if MoE.

Letters: B rows, S positions, D width, F mlp, V vocabulary, U units, L layers a unit, C cache slots.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mm1_jax.config import DecoderConfig, ModelConfig
from mm1_jax.models.attention import KV, Attention, Place, branching_mask, packed_causal_mask
from mm1_jax.models.layers import RMSNorm, multiply, normal, rows_of, run_blocks, stack
from mm1_jax.models.lora import LoRA, merge
from mm1_jax.models.moe import MoE, MoEStats
from mm1_jax.sharding import LAYOUT, gather, spec_of


class KVCache(NamedTuple):
  """Keys and values of all layers for the slots filled so far."""

  layers: list[KV]  # of U layers, for each of the unit's L layers
  segment_ids: Int[Array, "B C"]  # 0 where a slot is empty or padding
  length: Int[Array, ""]  # slots filled


class DecoderOutput(NamedTuple):
  hidden: Float[Array, "B S D"]  # after the last norm
  moe: MoEStats | None  # leaves stacked over units
  cache: KVCache | None


class SwiGLU(nnx.Module):
  """silu(x W_gate) * (x W_up), projected back (arXiv 2002.05202)."""

  def __init__(self, key: jax.Array, cfg: DecoderConfig, out_std: float):
    gate, up, down = jax.random.split(key, 3)
    std = cfg.width**-0.5
    self.gate = normal(gate, (cfg.width, cfg.mlp_dim), LAYOUT.mlp_df, std)
    self.up = normal(up, (cfg.width, cfg.mlp_dim), LAYOUT.mlp_df, std)
    self.down = normal(down, (cfg.mlp_dim, cfg.width), LAYOUT.mlp_fd, out_std)

  def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    gate = multiply("bsd,df->bsf", x, gather(self.gate[...], x.dtype, rows=x))
    up = multiply("bsd,df->bsf", x, gather(self.up[...], x.dtype, rows=x))
    h = jax.nn.silu(checkpoint_name(gate, "mlp_gate")) * checkpoint_name(up, "mlp_up")
    down = gather(self.down[...], x.dtype, rows=x)
    return multiply("bsf,fd->bsd", h, down, out_sharding=spec_of(x))


class Layer(nnx.Module):
  """Pre-norm attention and a dense or sparse feed-forward network."""

  def __init__(self, key: jax.Array, cfg: DecoderConfig, *, sparse: bool):
    attention, mlp = jax.random.split(key)
    # Residual branches shrink with depth, so the stream's variance does not grow with it (GPT-2).
    scale = (2 * cfg.depth) ** -0.5
    self.attention_norm = RMSNorm(cfg.width, cfg.norm_eps)
    self.attention = Attention(
      attention,
      width=cfg.width,
      num_heads=cfg.num_heads,
      num_kv_heads=cfg.num_kv_heads,
      head_dim=cfg.head_dim,
      out_std=(cfg.num_heads * cfg.head_dim) ** -0.5 * scale,
      qkv_bias=cfg.qkv_bias,
      rope_theta=cfg.rope_theta,
      rope_scaling=cfg.rope_scaling,
      qk_norm_eps=cfg.norm_eps if cfg.qk_norm else None,
    )
    self.mlp_norm = RMSNorm(cfg.width, cfg.norm_eps)
    out_std = cfg.mlp_dim**-0.5 * scale
    if sparse:
      assert cfg.moe is not None
      self.mlp = MoE(mlp, cfg, cfg.moe, out_std)
    else:
      self.mlp = SwiGLU(mlp, cfg, out_std)
    self.lora = LoRA(jax.random.fold_in(key, 2), self, cfg.lora) if cfg.lora else None

  def __call__(self, x, *, valid, dropless: bool, cache: KV | None, **kwargs):
    """Returns the residual stream, the layer's MoE statistics (None if dense), and its cache.

    `kwargs` are the attention's: positions, and its mask or segments.
    """
    y, cache = self.attention(self.attention_norm(x), cache=cache, **kwargs)
    x = checkpoint_name(x + y, "residual")
    y = self.mlp_norm(x)
    if isinstance(self.mlp, MoE):
      y, stats = self.mlp(y, valid, dropless=dropless)
      return x + y, stats, cache
    return x + self.mlp(y), None, cache


class Unit(nnx.Module):
  """The layers that repeat: one dense layer, or k - 1 dense ones and a sparse one."""

  def __init__(self, key: jax.Array, cfg: DecoderConfig):
    num = cfg.layers_per_unit
    keys = jax.random.split(key, num)
    self.layers = nnx.List(
      [Layer(keys[i], cfg, sparse=cfg.moe is not None and i == num - 1) for i in range(num)]
    )

  def __call__(self, x, caches: list[KV] | None, **kwargs):
    """Returns the residual stream, the last layer's MoE statistics, and the caches."""
    stats, new_caches = None, []
    for i, layer in enumerate(self.layers):
      cache = caches[i] if caches is not None else None
      x, stats, cache = merge(layer)(x, cache=cache, **kwargs)
      new_caches.append(cache)
    return x, stats, new_caches if caches is not None else None


class Decoder(nnx.Module):
  """Token embedding, units, last norm, and the head."""

  def __init__(self, key: jax.Array, model: ModelConfig):
    cfg = model.decoder
    embed, units, head = jax.random.split(key, 3)
    self.cfg = model
    self.embedding = normal(embed, (cfg.vocab_size, cfg.width), LAYOUT.embed_vd, cfg.width**-0.5)
    self.units = stack(lambda key: Unit(key, cfg), units, cfg.depth // cfg.layers_per_unit)
    self.norm = RMSNorm(cfg.width, cfg.norm_eps)
    self.head = (
      None
      if cfg.tie_embeddings
      else normal(head, (cfg.vocab_size, cfg.width), LAYOUT.embed_vd, cfg.width**-0.5)
    )

  def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    table = gather(self.embedding[...], self.cfg.dtype, rows=tokens)
    return rows_of(table, tokens)

  def head_weight(self, hidden: Float[Array, "B S D"]) -> Float[Array, "V D"]:
    """Returns the output matrix in the compute dtype, whole along D, for `logits` of `hidden`."""
    weight = self.embedding if self.head is None else self.head
    return gather(weight[...], self.cfg.dtype, rows=hidden)

  def logits(
    self, hidden: Float[Array, "B S D"], weight: Float[Array, "V D"] | None = None
  ) -> Float[Array, "B S V"]:
    """Returns float32 logits; callers keep S small (the loss takes a chunk at a time).

    Args:
      hidden: what `__call__` returned, or positions of it.
      weight: `head_weight`, from a caller that needs it more than once.
    """
    weight = self.head_weight(hidden) if weight is None else weight
    return _logits(hidden, weight)

  def __call__(
    self,
    x: Float[Array, "B S D"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    cache: KVCache | None = None,
    *,
    dropless: bool = False,
    branch_ids: Int[Array, "B S"] | None = None,
  ) -> DecoderOutput:
    """Runs the units over embedded positions.

    With a `cache`, the S positions take its next slots and attend to the ones before; without one,
    to the row alone. Segment 0 is padding: no real position attends to it, and it is routed to no
    expert. With `dropless`, and always with a cache, experts take every token whatever their
    capacity. `branch_ids` (without a cache) make a tree of each segment: see `branching_mask`.
    """
    dropless |= cache is not None
    kwargs = {"positions": positions, "valid": segment_ids > 0, "dropless": dropless}
    run = functools.partial(run_blocks, remat=self.cfg.remat, scan=self.cfg.scan)
    if cache is None:
      if branch_ids is None:
        kwargs |= {"segment_ids": segment_ids}
      else:
        kwargs |= {"mask": branching_mask(segment_ids, branch_ids)}

      def body(x, unit):
        x, stats, _ = unit(x, None, **kwargs)
        return x, stats

      x, stats = run(body, x, self.units)
      return DecoderOutput(self.norm(x), stats, None)

    slot = cache.length
    key_segments = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, slot))
    kwargs |= {"mask": packed_causal_mask(segment_ids, key_segments, slot)}

    # The caches of all units are carried through the scan, and each unit writes its slots in place.
    # Unstacked and stacked again, as the units are, they would be copied for each token.
    def cached_body(x_and_caches, unit_and_number):
      unit, number = unit_and_number
      x, stats, caches = unit(*x_and_caches, place=Place(number, slot), **kwargs)
      return (x, caches), stats

    numbers = jnp.arange(len(cache.layers[0].keys))
    (x, layers), stats = run(cached_body, (x, cache.layers), (self.units, numbers))
    cache = KVCache(layers, key_segments, slot + x.shape[1])
    return DecoderOutput(self.norm(x), stats, cache)

  def init_cache(self, num_rows: int, num_slots: int) -> KVCache:
    """Returns an empty cache of `num_slots` positions for each of `num_rows` rows."""
    cfg = self.cfg.decoder
    shape = (cfg.depth // cfg.layers_per_unit, num_rows, cfg.num_kv_heads, num_slots, cfg.head_dim)

    def empty() -> Float[Array, "U B K C h"]:
      return jnp.zeros(shape, self.cfg.dtype, out_sharding=LAYOUT.cache_ubkch)

    segment_ids = jnp.zeros((num_rows, num_slots), jnp.int32, out_sharding=LAYOUT.act_b)
    layers = [KV(empty(), empty()) for _ in range(cfg.layers_per_unit)]
    return KVCache(layers, segment_ids, jnp.zeros((), jnp.int32))


@jax.custom_vjp
def _logits(hidden: Float[Array, "B S D"], weight: Float[Array, "V D"]) -> Float[Array, "B S V"]:
  """Returns a product in float32, whose gradients are products in the dtype of its factors.

  The gradient of float32 logits is float32, and would make float32 products of both: on an H100
  they took 1.8 and 3.1 times as long as bfloat16's.
  """
  return _head_product(hidden, weight, dtype=jnp.float32)


def _logits_forward(hidden, weight):
  return _logits(hidden, weight), (hidden, weight)


def _logits_backward(factors, grad):
  dtype = factors[0].dtype
  _, gradients = jax.vjp(functools.partial(_head_product, dtype=dtype), *factors)
  return gradients(grad.astype(dtype))


_logits.defvjp(_logits_forward, _logits_backward)


def _head_product(hidden, weight, *, dtype):
  rows, positions, _ = spec_of(hidden)
  out_sharding = P(rows, positions, "tensor")
  return multiply(
    "bsd,vd->bsv", hidden, weight, preferred_element_type=dtype, out_sharding=out_sharding
  )
