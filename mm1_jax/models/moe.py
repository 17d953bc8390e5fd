# SPDX-License-Identifier: Apache-2.0
"""Top-k mixture of experts (GShard, arXiv 2006.16668; ST-MoE, 2202.08906; MM1 section 3.4).

  1. route:    a softmax over experts per token; the k best, their weights renormalised to sum to 1.
               With k = 1 the weight is the probability itself (Switch Transformer, 2101.03961,
               eq. 2): renormalised it would be 1, and the loss would not reach the router.
  2. dispatch: tokens are copied into the rows of a buffer, sorted by expert.
  3. experts:  SwiGLU, each row with its expert's weights and times its router weight.
  4. combine:  each token sums its rows.

Two paths do 2 to 4 and agree where both have room:

  bounded   `capacity_factor` slots for each expert in each batch row. Tokens queue, all first
            choices before any second; a token beyond the capacity is dropped (it passes by the
            residual alone). The buffers cross the mesh to their experts by all-to-all. What a token
            gets depends on all of its row: with k > 1 also on what comes after it.
  dropless  as many rows for each expert as choose it, one after the other, and matrix products that
            go by group. Over an `expert` axis the tokens of all its chips come to each, which does
            its own experts' rows, and the sums go back.

Padding is not routed: it takes no row and counts in no loss and no statistic.
Letters: B rows, S positions, k choices, E experts, C capacity, D width, F mlp; and where all of a
chip's tokens are in one list, n tokens, m rows of a buffer.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mm1_jax.config import BATCH_AXES, DecoderConfig, MoEConfig
from mm1_jax.models.dispatch import collect, invert, places, spread, spread_weights
from mm1_jax.models.experts import swiglu
from mm1_jax.models.grouped_matmul import padded_rows
from mm1_jax.models.layers import normal
from mm1_jax.sharding import LAYOUT, gather, spec_of


class MoEStats(NamedTuple):
  """What a sparse layer reports, over all real tokens of the global batch."""

  balance_loss: Float[Array, ""]  # unweighted; 1 when the experts are used evenly
  router_z_loss: Float[Array, ""]  # unweighted
  load: Float[Array, " E"]  # share of the k choices of all tokens that fell on each expert
  dropped: Float[Array, ""]  # share of choices that found no room


class Routing(NamedTuple):
  """Who goes where: choices of each token."""

  weights: Float[Array, "B S k"]  # 0 on padding
  experts: Int[Array, "B S k"]


class MoE(nnx.Module):
  """A sparse SwiGLU layer."""

  def __init__(self, key: jax.Array, cfg: DecoderConfig, moe: MoEConfig, out_std: float):
    router, gate, up, down = jax.random.split(key, 4)
    shape = (moe.num_experts, cfg.width, cfg.mlp_dim)
    std = cfg.width**-0.5
    self.cfg = moe
    self.router = normal(router, (cfg.width, moe.num_experts), LAYOUT.router_de, std)
    self.gate = normal(gate, shape, LAYOUT.expert_edf, std)
    self.up = normal(up, shape, LAYOUT.expert_edf, std)
    self.down = normal(down, (shape[0], shape[2], shape[1]), LAYOUT.expert_efd, out_std)

  def __call__(
    self, x: Float[Array, "B S D"], valid: Bool[Array, "B S"], *, dropless: bool = False
  ) -> tuple[Float[Array, "B S D"], MoEStats]:
    """Returns the layer's output (0 at padding) and its statistics.

    `dropless` makes room for every token whatever the config says, as evaluation and generation do.
    """
    routing, probs, logits = self._route(x, valid)
    capacity = None if dropless else self._capacity(x.shape[1])
    weights = self.gate[...], self.up[...], self.down[...]
    run = jax.shard_map(
      functools.partial(_run, capacity=capacity, exchange_factor=self.cfg.exchange_factor),
      in_specs=(*(spec_of(x),) * 3, *map(spec_of, weights)),
      out_specs=(spec_of(x),) * 2,
      check_vma=False,  # Pallas kernels do not say over which axes their results vary
    )
    experts = jnp.where(valid[..., None], routing.experts, self.cfg.num_experts)
    y, kept = run(x, routing.weights, experts, *weights)
    return y, self._stats(routing, probs, logits, valid, kept)

  def _capacity(self, num_positions: int) -> int | None:
    cfg = self.cfg
    if cfg.capacity_factor is None:
      return None
    share = cfg.capacity_factor * cfg.top_k * num_positions / cfg.num_experts
    return min(num_positions, max(1, math.ceil(share)))

  def _route(self, x, valid) -> tuple[Routing, Float[Array, "B S E"], Float[Array, "B S E"]]:
    # Float32 throughout: in bfloat16 near ties change sides, and the losses lose their gradient. A
    # TPU multiplies float32 in bfloat16 unless it is asked not to.
    logits = jnp.einsum(
      "bsd,de->bse",
      x.astype(jnp.float32),
      gather(self.router[...], jnp.float32, rows=x),
      precision=jax.lax.Precision.HIGHEST,
    )
    probs = jax.nn.softmax(logits)
    weights, experts = jax.lax.top_k(probs, self.cfg.top_k)
    if self.cfg.top_k > 1:
      weights /= jnp.sum(weights, axis=-1, keepdims=True) + 1e-9
    return Routing(weights * valid[..., None], experts), probs, logits

  def _stats(self, routing, probs, logits, valid, kept) -> MoEStats:
    mask = valid.astype(jnp.float32)
    num_tokens = jnp.maximum(jnp.sum(mask), 1.0)
    chosen = jax.nn.one_hot(routing.experts, self.cfg.num_experts) * mask[..., None, None]
    first = jnp.sum(chosen[:, :, 0], axis=(0, 1)) / num_tokens
    mean_probs = jnp.sum(probs * mask[..., None], axis=(0, 1)) / num_tokens
    z = jax.nn.logsumexp(logits, axis=-1)
    choices = num_tokens * self.cfg.top_k
    return MoEStats(
      balance_loss=self.cfg.num_experts * jnp.sum(first * mean_probs),
      router_z_loss=jnp.sum(z * z * mask) / num_tokens,
      load=jnp.sum(chosen, axis=(0, 1, 2)) / choices,
      dropped=jnp.sum(mask[..., None] * ~kept) / choices,
    )


def _run(
  x, weights, experts, gate, up, down, *, capacity: int | None, exchange_factor: float
) -> tuple[Float[Array, "B S D"], Bool[Array, "B S k"]]:
  """Runs the experts over one chip's rows; every array here is a chip's own part.

  Args:
    x: [B, S, D].
    weights: [B, S, k], of the router.
    experts: [B, S, k]; E where a choice is not routed.
    gate: [E, D, F], split as it is stored, as `up` and `down` are.
    capacity: slots of each expert in each row; None drops nothing.
    exchange_factor: see `MoEConfig`.

  Returns:
    The output, and which choices got a row.
  """
  # Here, inside the rematerialised block: gathered outside of the scan, all layers' experts would
  # be whole at once. The gradient of the gather is a reduce-scatter in the compute dtype.
  stored = ((gate, LAYOUT.expert_edf), (up, LAYOUT.expert_edf), (down, LAYOUT.expert_efd))
  matrices = tuple(_gather_fsdp(w.astype(x.dtype), spec) for w, spec in stored)
  if capacity is not None:
    y, kept = _run_bounded((x, weights, experts), matrices, capacity)
  else:
    tokens = tuple(a.reshape(-1, a.shape[-1]) for a in (x, weights, experts))
    y = _run_dropless(tokens, matrices, exchange_factor)
    kept = jnp.ones(experts.shape, bool)
  return jax.lax.psum(y, "tensor").reshape(x.shape), kept


def _gather_fsdp(weight: Array, spec) -> Array:
  dim = next(i for i, axes in enumerate(spec) if axes is not None and "fsdp" in axes)
  return jax.lax.all_gather(weight, ("fsdp", "sequence"), axis=dim, tiled=True)


def _run_bounded(
  rows, matrices, capacity: int
) -> tuple[Float[Array, "B S D"], Bool[Array, "B S k"]]:
  """Runs a chip's rows (x, weights, experts) through buffers of equal size for all experts.

  In each batch row an expert's slots go to all first choices before any second. Where positions are
  split over `sequence`, they queue along their whole row all the same: its chips gather it, and
  each of them does its share of every expert's slots.

  Returns:
    The output, and which choices got a slot.
  """
  num_positions, chip = rows[0].shape[1], jax.lax.axis_index("sequence")
  share = -(-capacity // jax.lax.axis_size("sequence"))
  num_experts = matrices[0].shape[0] * jax.lax.axis_size("expert")
  x, weights, experts = (jax.lax.all_gather(a, "sequence", axis=1, tiled=True) for a in rows)
  place = _places_in_row(experts, num_experts)
  kept = (experts < num_experts) & (place < capacity)
  num_slots = num_experts * x.shape[0] * share
  row = jnp.arange(x.shape[0])[:, None, None]
  slots = (experts * x.shape[0] + row) * share + place % share
  slots = jnp.where(kept & (place // share == chip), slots, num_slots)
  tokens = tuple(a.reshape(-1, a.shape[-1]) for a in (x, weights, slots))
  y = _run_slots(tokens, matrices, num_slots).reshape(x.shape)
  kept = jax.lax.dynamic_slice_in_dim(kept, chip * num_positions, num_positions, axis=1)
  return jax.lax.psum_scatter(y, "sequence", scatter_dimension=1, tiled=True), kept


def _places_in_row(experts: Int[Array, "B S k"], num_experts: int) -> Int[Array, "B S k"]:
  """Returns how many of a row's choices are ahead of each one in its expert's queue."""
  num_rows, num_positions, top_k = experts.shape
  queue = experts.transpose(0, 2, 1).reshape(num_rows, top_k * num_positions)
  place, _ = jax.vmap(functools.partial(places, num_experts=num_experts))(queue)
  return place.reshape(num_rows, top_k, num_positions).transpose(0, 2, 1)


def _run_slots(tokens, matrices, num_slots: int) -> Float[Array, "n D"]:
  """Runs a chip's tokens (x, weights, slots) through the experts of all chips."""
  x, weights, slots = tokens
  owners = invert(slots, num_slots)

  # Chips lead in both directions, so that what crosses is never taken apart: with experts in front
  # of them, XLA for TPUs transposed the results through tiles of two rows, in a tenth of the step.
  def exchange(rows):  # [chips, ...], a part for each chip -> a part from each
    return jax.lax.all_to_all(rows, "expert", split_axis=0, concat_axis=0, tiled=True)

  num_chips, num_here = jax.lax.axis_size("expert"), matrices[0].shape[0]

  def to_experts(rows):  # [E B C, .] of this chip's rows -> its experts, all chips' rows
    parts = exchange(rows.reshape(num_chips, num_here, -1, rows.shape[-1]))
    return jnp.swapaxes(parts, 0, 1).reshape(num_here, -1, rows.shape[-1])

  rows = to_experts(spread(x, slots, owners))
  out: Any = swiglu(rows, to_experts(spread_weights(weights, slots, owners)), matrices)
  rows = out.reshape(num_here, num_chips, -1, x.shape[-1])
  rows = exchange(jnp.swapaxes(rows, 0, 1))
  return collect(rows.reshape(num_slots, -1), slots, owners)


def _run_experts(tokens, matrices, num_rows: int, named: bool = True) -> Float[Array, "n D"]:
  """Runs tokens (x, weights, experts) through the experts whose matrices these are.

  Choices of experts past the last are left out; the others must fit into `num_rows`. For `named`
  see `swiglu`.
  """
  x, weights, experts = tokens
  num_rows, num_experts = padded_rows(num_rows), matrices[0].shape[0]
  flat = experts.reshape(-1)
  routed = flat < num_experts
  place, sizes = places(flat, num_experts)
  first = jnp.cumsum(sizes) - sizes  # row of each expert's first token
  slots = jnp.where(routed, first.at[flat].get(mode="clip") + place, num_rows)
  slots = slots.reshape(experts.shape)
  owners = invert(slots, num_rows)
  rows = spread(x, slots, owners)
  rows = swiglu(rows, spread_weights(weights, slots, owners), matrices, sizes, named)
  return collect(rows, slots, owners)


def _run_dropless(tokens, matrices, exchange_factor: float) -> Float[Array, "n D"]:
  """Runs one chip's tokens, and drops none.

  Each chip of the `expert` axis holds a part of the experts, and has room for `exchange_factor`
  times the rows of an even load. Where any chip of the mesh would get more, all of them take their
  tokens in so many rounds that even all tokens of a round would fit on one chip.
  """
  num_chips, num_here = jax.lax.axis_size("expert"), matrices[0].shape[0]
  num_tokens, top_k = tokens[2].shape
  num_choices = num_tokens * top_k
  if num_chips == 1:
    return _run_experts(tokens, matrices, num_choices)
  num_rows = math.ceil(exchange_factor * num_choices)
  rounds = range(math.ceil(num_chips / exchange_factor), num_tokens + 1)
  num_rounds = next((r for r in rounds if num_tokens % r == 0), None)
  # Without rounds there are so few tokens, as in decoding, that room for all costs nothing.
  if num_rows >= num_chips * num_choices or num_rounds is None:
    return _exchange(tokens, matrices, num_chips * num_choices)

  def at_once(tokens, matrices):
    return _exchange(tokens, matrices, num_rows)

  def in_rounds(tokens, matrices):
    # Nothing of this way is kept: every layer has memory for both, whichever it goes.
    @jax.checkpoint
    def run(tokens):
      return _exchange(tokens, matrices, num_chips * tokens[2].size, named=False)

    parts = jax.tree.map(lambda a: a.reshape(num_rounds, -1, a.shape[1]), tokens)
    return jax.lax.map(run, parts).reshape(num_tokens, -1)

  wanted = jnp.arange(num_chips * num_here)[:, None] == tokens[2].reshape(1, -1)
  load = jax.lax.psum(jnp.sum(wanted, axis=1), "expert").reshape(num_chips, num_here).sum(axis=1)
  fits = jax.lax.pmax(jnp.max(load), (*BATCH_AXES, "sequence")) <= num_rows
  return jax.lax.cond(fits, at_once, in_rounds, tokens, matrices)


def _exchange(tokens, matrices, num_rows: int, named: bool = True) -> Float[Array, "n D"]:
  """Gathers the tokens of the `expert` axis, runs this chip's experts, and scatters the sums.

  With two choices a token, gathering moves no more than an all-to-all whose parts have room for
  uneven loads, up to about 8 chips; and there is no room on the way that could run out.
  """
  x, weights, experts = (jax.lax.all_gather(a, "expert", tiled=True) for a in tokens)
  num_here = matrices[0].shape[0]
  experts -= jax.lax.axis_index("expert") * num_here
  experts = jnp.where(experts < 0, num_here, experts)  # others' experts count as past the last
  y = _run_experts((x, weights, experts), matrices, num_rows, named)
  return jax.lax.psum_scatter(y, "expert", tiled=True)
