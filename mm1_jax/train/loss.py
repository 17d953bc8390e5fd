# SPDX-License-Identifier: Apache-2.0
"""Next-token cross-entropy over packed rows, and the losses beside it.

Letters: B rows, S positions, c positions of a chunk, D width, V vocabulary, M sources.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mm1_jax.batch import Batch
from mm1_jax.config import RunConfig
from mm1_jax.models.decoder import Decoder
from mm1_jax.models.mm1 import MM1
from mm1_jax.models.moe import MoEStats
from mm1_jax.sharding import LAYOUT, spec_of

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
  # Of the image tokens, see `models.mm1.image_spread`: summed over micro-batches with two pictures
  # or more, and how many those are.
  image_spread: tuple[Float[Array, ""], Float[Array, ""]]


def cross_entropy(
  decoder: Decoder,
  hidden: Float[Array, "B S D"],
  batch: Batch,
  num_sources: int,
  z_loss: float,
) -> tuple[Float[Array, ""], TokenSums]:
  """Sums -log p(target) where `loss_mask` is set, chunk by chunk along the row.

  Logits exist for a chunk only: [B, S, V] in float32 would be the largest array of the whole step.
  So that none are made twice, a chunk's gradients are taken while its logits are there, in the
  forward pass; the backward pass multiplies them by one number (Liger Kernel, arXiv 2410.10989).

  Args:
    decoder: for its head.
    hidden: what the decoder returned.
    batch: targets, their mask and their sources.
    num_sources: M.
    z_loss: weight of the squared log normalisers.

  Returns:
    What is to be differentiated, in nats, with the weighted squares; and the sums to report, which
    have no gradient.
  """
  num_parts = jax.sharding.get_abstract_mesh().shape["sequence"]  # that rows are split into
  size = math.gcd(hidden.shape[1] // num_parts, CHUNK)
  hidden = jax.sharding.reshard(hidden, LAYOUT.act_bs)

  def chunks(x):
    """Returns [chunks, B, parts x size, ...]: each chunk has a piece of every part of a row."""
    rows, *rest = x.shape[0], *x.shape[2:]
    x = jax.sharding.reshard(x, LAYOUT.act_bs)
    shape = (rows, num_parts, x.shape[1] // num_parts // size, size, *rest)
    x = jnp.moveaxis(jax.lax.reshape(x, shape, out_sharding=LAYOUT.act_bs), 2, 0)
    spec = P(None, *LAYOUT.act_bs)
    return jax.lax.reshape(x, (x.shape[0], rows, num_parts * size, *rest), out_sharding=spec)

  def of_chunk(factors, labels: _Labels) -> tuple[Float[Array, ""], TokenSums]:
    logits = decoder.logits(*factors)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum, not a gather: the vocabulary may be split over chips.
    is_target = jnp.arange(logits.shape[-1])[None, None] == labels.targets[..., None]
    nll = normaliser - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    by_source = jax.nn.one_hot(labels.sources, num_sources) * labels.mask[..., None]
    sums = TokenSums(
      nll=jnp.sum(by_source * nll[..., None], axis=(0, 1)),
      count=jnp.sum(by_source, axis=(0, 1)),
      z=jnp.sum(labels.mask * normaliser**2),
    )
    return jnp.sum(sums.nll) + z_loss * sums.z, sums

  labels = _Labels(batch.targets, batch.loss_mask, batch.source_ids)
  xs = jax.tree.map(chunks, (hidden, labels))
  return _sum_chunks(of_chunk, decoder.head_weight(hidden), *xs)


class _Labels(NamedTuple):
  targets: Int[Array, "B S"]
  mask: Float[Array, "B S"]
  sources: Int[Array, "B S"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_chunks(of_chunk, weight: Float[Array, "V D"], hidden, labels):
  """Returns the sum of `of_chunk((hidden, weight), labels)` over the first dim of both."""
  sums = jax.lax.map(lambda xs: of_chunk((xs[0], weight), xs[1]), (hidden, labels))
  return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


def _sum_chunks_forward(of_chunk, weight, hidden, labels):
  gradients = jax.value_and_grad(of_chunk, has_aux=True)

  def body(of_weight, xs):
    hidden, labels = xs
    sums, (of_hidden, more) = gradients((hidden, weight), labels)
    return of_weight + more.astype(jnp.float32), (sums, of_hidden)

  # Each chip has a sum of its own, see `gather`; in float32, see `layers.broadcast`.
  spec = spec_of(weight)
  where = P(*spec.partitions, unreduced=spec.reduced)
  zeros = jnp.zeros(weight.shape, jnp.float32, out_sharding=where)
  of_weight, (sums, of_hidden) = jax.lax.scan(body, zeros, (hidden, labels))
  of_weight = of_weight.astype(weight.dtype)
  return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums), (of_weight, of_hidden)


def _sum_chunks_backward(of_chunk, gradients, cotangents):
  del of_chunk
  factor, _ = cotangents  # the sums beside it are to report

  def scaled(x):  # in float32: the factor rounded would be off in one direction for all
    alike = jax.sharding.reshard(factor, P(reduced=spec_of(x).unreduced))
    return (x.astype(jnp.float32) * alike).astype(x.dtype)

  return *map(scaled, gradients), None


_sum_chunks.defvjp(_sum_chunks_forward, _sum_chunks_backward)


def loss_fn(
  model: MM1,
  batch: Batch,
  run: RunConfig,
  *,
  num_targets: jax.Array,
  share: float = 1.0,
  dropless: bool = False,
) -> Losses:
  """Returns the loss of one (micro-)batch.

  Args:
    model: with all its params.
    batch: rows on the mesh.
    run: for the weights of the losses.
    num_targets: targets of the whole batch, which the token losses are divided by, so that
      micro-batches of unequal length add up to exactly the batch's mean.
    share: of the batch that this is; weighs the router losses, which are means already.
    dropless: whether experts take every token whatever their capacity, as in evaluation.
  """
  output = model(batch, dropless=dropless)
  num_sources = len(run.data.leaves) or 1
  total, tokens = cross_entropy(model.decoder, output.hidden, batch, num_sources, run.train.z_loss)
  total /= num_targets
  cfg = run.model.decoder.moe
  if cfg is not None and output.moe is not None:
    # Each sparse layer's losses count in full, as in ST-MoE and AXLearn.
    total += share * cfg.balance_loss * jnp.sum(output.moe.balance_loss)
    total += share * cfg.router_z_loss * jnp.sum(output.moe.router_z_loss)
  several = jnp.float32(jnp.sum(batch.image_mask) > 1)
  return Losses(total, tokens, output.moe, (several * output.image_spread, several))


def split_rows(batch: Batch, num: int) -> Batch:
  """Returns `num` micro-batches along a leading dim, each with rows of every chip."""

  def split(x):
    shape = (x.shape[0] // num, num, *x.shape[1:])
    return jnp.moveaxis(jax.lax.reshape(x, shape, out_sharding=LAYOUT.act_b), 1, 0)

  return jax.tree.map(split, batch)
