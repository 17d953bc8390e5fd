# SPDX-License-Identifier: Apache-2.0
"""Next-token cross-entropy over packed rows, and the losses beside it.

Letters: B rows, S positions, c positions of a chunk, D width, V vocabulary, M sources.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from mm1_jax.batch import Batch
from mm1_jax.config import RunConfig
from mm1_jax.models.decoder import Decoder
from mm1_jax.models.mm1 import MM1
from mm1_jax.models.moe import MoEStats
from mm1_jax.sharding import LAYOUT

CHUNK = 512  # positions whose logits exist at a time


class TokenSums(NamedTuple):
  """Sums over predicted tokens."""

  nll: Float[Array, " M"]  # nats, by source
  count: Float[Array, " M"]  # targets, by source
  z: Float[Array, ""]  # of the squared log normaliser


class Losses(NamedTuple):
  """What a (micro-)batch adds to the loss, and what is reported of it."""

  total: Float[Array, ""]  # what is differentiated
  tokens: TokenSums
  moe: MoEStats | None  # leaves stacked over units


def cross_entropy(
  decoder: Decoder, hidden: Float[Array, "B S D"], batch: Batch, num_sources: int
) -> TokenSums:
  """Sums -log p(target) where `loss_mask` is set, chunk by chunk along the row.

  Logits exist for a chunk only, in the forward and (recomputed) in the backward pass: [B, S, V] in
  float32 would be the largest array of the whole step.
  """
  num_parts = jax.sharding.get_abstract_mesh().shape["sequence"]  # that rows are split into
  size = math.gcd(hidden.shape[1] // num_parts, CHUNK)
  hidden = jax.sharding.reshard(hidden, LAYOUT.act_bs)
  weight = decoder.head_weight(hidden)

  def chunks(x):
    """Returns [chunks, B, parts x size, ...]: of every part of a row a piece at a time."""
    rows, *rest = x.shape[0], *x.shape[2:]
    x = jax.sharding.reshard(x, LAYOUT.act_bs)
    shape = (rows, num_parts, x.shape[1] // num_parts // size, size, *rest)
    x = jnp.moveaxis(jax.lax.reshape(x, shape, out_sharding=LAYOUT.act_bs), 2, 0)
    spec = P(None, *LAYOUT.act_bs)
    return jax.lax.reshape(x, (x.shape[0], rows, num_parts * size, *rest), out_sharding=spec)

  def chunk_sums(weight, hidden, targets, mask, sources) -> TokenSums:
    logits = decoder.logits(hidden, weight)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum, not a gather: the vocabulary may be split over chips.
    is_target = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
    nll = normaliser - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    by_source = jax.nn.one_hot(sources, num_sources) * mask[..., None]
    return TokenSums(
      nll=jnp.sum(by_source * nll[..., None], axis=(0, 1)),
      count=jnp.sum(by_source, axis=(0, 1)),
      z=jnp.sum(mask * normaliser**2),
    )

  # A row of one chunk has its logits whole in the backward pass in any case.
  of_chunk = jax.checkpoint(chunk_sums) if hidden.shape[1] > num_parts * size else chunk_sums

  def body(sums, xs):
    return jax.tree.map(jnp.add, sums, of_chunk(weight, *xs)), None

  zeros = TokenSums(jnp.zeros(num_sources), jnp.zeros(num_sources), jnp.zeros(()))
  xs = jax.tree.map(chunks, (hidden, batch.targets, batch.loss_mask, batch.source_ids))
  sums, _ = jax.lax.scan(body, zeros, xs)
  return sums


def loss_fn(
  model: MM1, batch: Batch, run: RunConfig, *, num_targets: jax.Array, share: float = 1.0
) -> Losses:
  """Returns the loss of one (micro-)batch.

  Args:
    model: with all its params.
    batch: rows on the mesh.
    run: for the weights of the losses.
    num_targets: targets of the whole batch, which the token losses are divided by, so that
      micro-batches of unequal length add up to exactly the batch's mean.
    share: of the batch that this is; weighs the router losses, which are means already.
  """
  output = model(batch)
  tokens = cross_entropy(model.decoder, output.hidden, batch, len(run.data.leaves) or 1)
  total = (jnp.sum(tokens.nll) + run.train.z_loss * tokens.z) / num_targets
  cfg = run.model.decoder.moe
  if cfg is not None and output.moe is not None:
    # Each sparse layer's losses count in full, as in ST-MoE and AXLearn.
    total += share * cfg.balance_loss * jnp.sum(output.moe.balance_loss)
    total += share * cfg.router_z_loss * jnp.sum(output.moe.router_z_loss)
  return Losses(total, tokens, output.moe)


def split_rows(batch: Batch, num: int) -> Batch:
  """Returns `num` micro-batches along a leading dim, each with rows of every chip."""

  def split(x):
    shape = (x.shape[0] // num, num, *x.shape[1:])
    return jnp.moveaxis(jax.lax.reshape(x, shape, out_sharding=LAYOUT.act_b), 1, 0)

  return jax.tree.map(split, batch)
