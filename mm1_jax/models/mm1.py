# SPDX-License-Identifier: Apache-2.0
"""MM1: pictures become decoder tokens at their placeholders, and one decoder reads the row.

Letters: B rows, S positions, N image slots a row, T tokens per image, D width.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt8

from mm1_jax.batch import Batch
from mm1_jax.config import ModelConfig
from mm1_jax.models.connector import Connector
from mm1_jax.models.decoder import Decoder, DecoderOutput, KVCache
from mm1_jax.models.moe import MoEStats
from mm1_jax.models.vit import ViT
from mm1_jax.sharding import LAYOUT, num_row_shards, spec_of

# Params that are computed with in float32 whatever `model.dtype` is; the others are cast before
# they are used, so that casting them when they are read changes no result.
IN_FLOAT32 = {"scale", "bias", "positions", "class_token", "class_position", "router"}


class MM1Output(NamedTuple):
  hidden: Float[Array, "B S D"]  # after the decoder's last norm
  moe: MoEStats | None  # leaves stacked over units
  image_spread: Float[Array, ""]  # see `image_spread`; 0 where there are fewer than two pictures


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

  def embed_image(
    self, images: UInt8[Array, "B N H W 3"], mask: Bool[Array, "B N"] | None = None
  ) -> Float[Array, "B NT D"]:
    """Returns the tokens of a row's pictures, in slot order: N * T of them (NT).

    The pictures are split over all chips, also over those that share a row. `mask` says which slots
    hold one; with it, `ModelConfig.image_group` may leave out slots that do not.
    """
    num_rows, num_images = images.shape[:2]
    mesh = jax.sharding.get_abstract_mesh()
    shared = mesh.shape["tensor"] * mesh.shape["sequence"]
    # Empty slots, only if the chips that share rows could not share their pictures evenly.
    rows_each = num_rows // num_row_shards(mesh)
    num_slots = num_images + -num_images % (shared // math.gcd(rows_each, shared))

    def spread(x):
      x = jnp.pad(x, ((0, 0), (0, num_slots - num_images), *((0, 0),) * (x.ndim - 2)))
      return jax.sharding.reshard(x.reshape(-1, *x.shape[2:]), LAYOUT.act_i)

    size = self.cfg.image_group
    if size is None or mask is None:
      tokens = self._encode(spread(images))
    else:
      pictures = spread(images), spread(mask)
      tokens = in_groups(self._encode, *pictures, size, scan=self.cfg.scan)
    tokens = jax.sharding.reshard(tokens, LAYOUT.act_b)
    shape = (num_rows, num_slots * tokens.shape[1], tokens.shape[2])
    tokens = jax.lax.reshape(tokens, shape, out_sharding=LAYOUT.act_b)
    return tokens[:, : num_images * self.cfg.connector.num_tokens]

  def _encode(self, images: UInt8[Array, "I H W 3"]) -> Float[Array, "I T D"]:
    return self.connector(self.vit(images))

  def merge(
    self,
    text: Float[Array, "B S D"],
    images: Float[Array, "B NT D"],
    tokens: Int[Array, "B S"],
  ) -> Float[Array, "B S D"]:
    """Puts the i-th image token of a row at its i-th placeholder."""
    # Counted over whole rows, then gathered where the positions are split.
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
    if not images.shape[1]:
      return text
    return self.merge(text, self.embed_image(images), tokens)

  def __call__(
    self,
    batch: Batch,
    *,
    dropless: bool = False,
    branch_ids: Int[Array, "B S"] | None = None,
  ) -> MM1Output:
    """Reads whole rows; `dropless` and `branch_ids` are the decoder's."""
    tokens, positions, segment_ids = (
      jax.sharding.reshard(x, LAYOUT.act_bs)
      for x in (batch.tokens, batch.positions, batch.segment_ids)
    )
    embedded, spread = self.embed_text(tokens), jnp.zeros(())
    if batch.images.shape[1]:
      images = self.embed_image(batch.images, batch.image_mask)
      spread = image_spread(images, batch.image_mask)
      embedded = self.merge(embedded, images, tokens)
    output = self.decoder(
      embedded, positions, segment_ids, dropless=dropless, branch_ids=branch_ids
    )
    return MM1Output(output.hidden, output.moe, spread)

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


def image_spread(tokens: Float[Array, "B NT D"], mask: Bool[Array, "B N"]) -> Float[Array, ""]:
  """Returns by how much image tokens differ between pictures: their RMS deviation over their RMS.

  The deviation is from the mean over all pictures of the batch, token by token of a picture. At 0
  the decoder gets the same of each picture: encoder or connector have collapsed, and no gradient
  brings them back, while the loss looks as it would without pictures. Sums are float32.
  """
  tokens = jax.lax.stop_gradient(tokens).astype(jnp.float32)
  num_rows, num_images = mask.shape
  shape = (num_rows, num_images, tokens.shape[1] // num_images, tokens.shape[2])
  tokens = jax.lax.reshape(tokens, shape, out_sharding=LAYOUT.act_b)
  weights = mask.astype(jnp.float32)
  weights /= jnp.maximum(jnp.sum(weights), 1.0)
  mean = jnp.sum(weights[..., None, None] * tokens, axis=(0, 1))
  deviation = jnp.mean(jnp.square(tokens - mean[None, None]), axis=(2, 3))
  square = jnp.mean(jnp.square(tokens), axis=(2, 3))
  deviation, square = (jnp.sum(weights * x) for x in (deviation, square))
  return jnp.sqrt(deviation / jnp.maximum(square, 1e-30))


def in_groups(
  encode: Callable[[Array], Array],
  images: UInt8[Array, "I H W 3"],
  mask: Bool[Array, " I"],
  size: int,
  *,
  scan: bool,
) -> Float[Array, "I T D"]:
  """Encodes pictures in groups of `size` a chip, and leaves out groups that hold none on any chip.

  Each chip puts its filled slots first, so that it has as few groups with a picture as can be. The
  tokens of a group that was left out are 0. Without `scan` the groups are unrolled: a loop copies
  all that the backward pass needs of each.
  """
  slots, grouped = LAYOUT.act_i, P(None, *LAYOUT.act_i)

  @functools.partial(jax.shard_map, in_specs=(slots, slots), out_specs=(grouped, grouped, slots))
  def split(images, mask):
    order = jnp.argsort(~mask)  # stable
    more = -len(order) % size
    images, mask = (
      jnp.pad(x[order], ((0, more), *((0, 0),) * (x.ndim - 1))).reshape(-1, size, *x.shape[1:])
      for x in (images, mask)
    )
    return images, mask, jnp.argsort(order)

  @functools.partial(jax.shard_map, in_specs=(grouped, slots), out_specs=slots)
  def join(tokens, place):
    tokens = tokens.reshape(-1, *tokens.shape[2:])
    return tokens.at[place].get(unique_indices=True, mode="promise_in_bounds")

  def nothing(images):
    tokens: Any = jax.eval_shape(encode, images)
    return jnp.zeros(tokens.shape, tokens.dtype, out_sharding=slots)

  def group(_, images_and_mask):
    images, mask = images_and_mask
    return None, jax.lax.cond(jnp.any(mask), encode, nothing, images)

  images, mask, place = split(images, mask)
  _, tokens = jax.lax.scan(group, None, (images, mask), unroll=not scan)
  return join(tokens, place)
