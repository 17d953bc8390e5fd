# SPDX-License-Identifier: Apache-2.0
"""MM1: pictures become decoder tokens at their placeholders, and one decoder reads the row.

Letters: B rows, S positions, N image slots a row, T tokens per image, D width.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from mm1_jax.batch import Batch
from mm1_jax.config import ModelConfig
from mm1_jax.models.connector import Connector
from mm1_jax.models.decoder import Decoder, DecoderOutput, KVCache
from mm1_jax.models.vit import ViT
from mm1_jax.sharding import LAYOUT, spec_of


class MM1(nnx.Module):
  """ViT, connector and decoder: the three parts that a stage trains or freezes."""

  def __init__(self, key: jax.Array, cfg: ModelConfig):
    vit, connector, decoder = jax.random.split(key, 3)
    self.cfg = cfg
    self.vit = ViT(vit, cfg)
    self.connector = Connector(connector, cfg)
    self.decoder = Decoder(decoder, cfg)

  def embed_text(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    return self.decoder.embed(tokens)

  def embed_image(self, images: UInt8[Array, "B N H W 3"]) -> Float[Array, "B N*T D"]:
    """Returns the tokens of a row's pictures, in slot order.

    The pictures are spread over all chips: over the ones that share a row, too.
    """
    num_rows, num_images = images.shape[:2]
    mesh = jax.sharding.get_abstract_mesh().shape
    shared = mesh["tensor"] * mesh["sequence"]
    # Empty slots, only if the chips that share rows could not share their pictures evenly.
    num_slots = num_images + -num_images % (shared // math.gcd(num_rows, shared))
    images = jnp.pad(images, ((0, 0), (0, num_slots - num_images), *((0, 0),) * 3))
    images = jax.sharding.reshard(images.reshape(-1, *images.shape[2:]), LAYOUT.act_i)
    tokens = jax.sharding.reshard(self.connector(self.vit(images)), LAYOUT.act_b)
    shape = (num_rows, num_slots * tokens.shape[1], tokens.shape[2])
    tokens = jax.lax.reshape(tokens, shape, out_sharding=LAYOUT.act_b)
    return tokens[:, : num_images * self.cfg.connector.num_tokens]

  def merge(
    self,
    text: Float[Array, "B S D"],
    images: Float[Array, "B N*T D"],
    tokens: Int[Array, "B S"],
  ) -> Float[Array, "B S D"]:
    """Puts the i-th image token of a row at its i-th placeholder."""
    # Counted over whole rows, picked where the positions live.
    spec = spec_of(tokens)
    placeholder = jax.sharding.reshard(tokens, LAYOUT.act_b) == self.cfg.image_token_id
    index = jnp.maximum(jnp.cumsum(placeholder, axis=1) - 1, 0)
    placeholder, index = (jax.sharding.reshard(x, spec) for x in (placeholder, index))

    @functools.partial(jax.shard_map, in_specs=(LAYOUT.act_b, spec), out_specs=spec)
    def pick(images, index):
      return jnp.take_along_axis(images, index[..., None], axis=1)

    picked = pick(images, index)
    return jnp.where(placeholder[..., None], picked, text)

  def embed(
    self, tokens: Int[Array, "B S"], images: UInt8[Array, "B N H W 3"]
  ) -> Float[Array, "B S D"]:
    """Returns the decoder's input. A batch without image slots runs no encoder at all."""
    text = self.embed_text(tokens)
    return self.merge(text, self.embed_image(images), tokens) if images.shape[1] else text

  def __call__(self, batch: Batch) -> DecoderOutput:
    tokens, positions, segment_ids = (
      jax.sharding.reshard(x, LAYOUT.act_bs)
      for x in (batch.tokens, batch.positions, batch.segment_ids)
    )
    return self.decoder(self.embed(tokens, batch.images), positions, segment_ids)

  def prefill(
    self,
    tokens: Int[Array, "B S"],
    images: UInt8[Array, "B N H W 3"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    cache: KVCache,
  ) -> DecoderOutput:
    """Reads prompts (left-padded with segment 0) into the cache."""
    return self.decoder(self.embed(tokens, images), positions, segment_ids, cache)

  def decode(
    self, tokens: Int[Array, "B 1"], positions: Int[Array, "B 1"], cache: KVCache
  ) -> DecoderOutput:
    """Reads one more token a row."""
    return self.decoder(self.embed_text(tokens), positions, jnp.ones_like(tokens), cache)
