# SPDX-License-Identifier: Apache-2.0
"""Top-k mixture of experts (GShard, arXiv 2006.16668; ST-MoE, 2202.08906; MM1 section 3.4).

  1. route:    a softmax over experts per token; the k best, their weights renormalised to sum to 1.
  2. dispatch: in each row, tokens queue for their experts, all first choices before any second;
               a token beyond an expert's capacity is dropped (it passes by the residual alone).
  3. experts:  the buffers cross the mesh to their experts (all-to-all), SwiGLU, and come back.
  4. combine:  each token sums its experts' outputs by weight.

Padding is not routed: it takes no capacity and counts in no loss and no statistic.
Letters: B rows, S positions, k choices, E experts, C capacity, D width, F mlp.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard
from jaxtyping import Array, Bool, Float, Int

from mm1_jax.config import DecoderConfig, MoEConfig
from mm1_jax.models.layers import normal
from mm1_jax.sharding import LAYOUT, gather


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

    `dropless` makes room for every token whatever the config says, as generation needs.
    """
    routing, probs, logits = self._route(x, valid)
    capacity = self._capacity(x.shape[1], dropless)
    slots, kept = _assign(routing.experts, valid, self.cfg.num_experts, capacity)
    num_rows, num_experts, width = x.shape[0], self.cfg.num_experts, x.shape[2]
    owners = _invert(slots, num_experts * capacity)
    buffer = _reshape(_dispatch(x, slots, owners), num_rows, num_experts, capacity, width)
    outputs = _reshape(self._experts(buffer), num_rows, num_experts * capacity, width)
    y = _combine(outputs, routing.weights, slots, owners)
    return y, self._stats(routing, probs, logits, valid, kept)

  def _capacity(self, num_positions: int, dropless: bool) -> int:
    cfg = self.cfg
    if dropless or cfg.capacity_factor is None:
      return num_positions
    share = cfg.capacity_factor * cfg.top_k * num_positions / cfg.num_experts
    return min(num_positions, max(1, math.ceil(share)))

  def _route(self, x, valid) -> tuple[Routing, Float[Array, "B S E"], Float[Array, "B S E"]]:
    # Float32 throughout: in bfloat16 near ties change sides, and the losses lose their gradient. A
    # TPU multiplies float32 in bfloat16 unless it is asked not to.
    logits = jnp.einsum(
      "bsd,de->bse",
      x.astype(jnp.float32),
      self.router[...],
      precision=jax.lax.Precision.HIGHEST,
    )
    probs = jax.nn.softmax(logits)
    weights, experts = jax.lax.top_k(probs, self.cfg.top_k)
    weights /= jnp.sum(weights, axis=-1, keepdims=True) + 1e-9
    return Routing(weights * valid[..., None], experts), probs, logits

  def _experts(self, x: Float[Array, "B E C D"]) -> Float[Array, "B E C D"]:
    num_rows, num_experts, capacity, dim = x.shape
    x = reshard(x, LAYOUT.act_becd)  # all-to-all: rows' buffers to their experts
    # Experts first, rows and slots as one dim: one batch of plain matrix products.
    x = x.transpose(1, 0, 2, 3).reshape(num_experts, num_rows * capacity, dim)
    gate, up, down = (
      gather(w[...], x.dtype, keep="expert") for w in (self.gate, self.up, self.down)
    )
    h = jax.nn.silu(jnp.einsum("end,edf->enf", x, gate))
    h *= jnp.einsum("end,edf->enf", x, up)
    y = jnp.einsum("enf,efd->end", h, down, out_sharding=LAYOUT.act_end)
    shape = (num_experts, num_rows, capacity, dim)
    y = jax.lax.reshape(y, shape, out_sharding=LAYOUT.act_ebcd).transpose(1, 0, 2, 3)
    return reshard(y, LAYOUT.act_b)  # all-to-all: back

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


def _reshape(x: Array, *shape: int) -> Array:
  """Reshapes all but the rows; says that they stay split, which JAX forgets of a single one."""
  return jax.lax.reshape(x, shape, out_sharding=LAYOUT.act_b)


def _assign(
  experts: Int[Array, "B S k"], valid: Bool[Array, "B S"], num_experts: int, capacity: int
) -> tuple[Int[Array, "B S k"], Bool[Array, "B S k"]]:
  """Returns each choice's slot in its row's E x C buffer, and which have one (slot E x C: none)."""
  num_rows, num_positions, top_k = experts.shape
  # In queue order: every first choice, then every second one.
  queue = _reshape(experts.transpose(0, 2, 1), num_rows, top_k * num_positions)
  waiting = jnp.tile(valid, (1, top_k))
  onehot = jax.nn.one_hot(queue, num_experts, dtype=jnp.int32) * waiting[..., None]
  ahead = jnp.cumsum(onehot, axis=1) - onehot
  place = jnp.sum(ahead * onehot, axis=-1)
  kept = waiting & (place < capacity)
  slots = jnp.where(kept, queue * capacity + place, num_experts * capacity)

  def by_token(x):
    return _reshape(x, num_rows, top_k, num_positions).transpose(0, 2, 1)

  return by_token(slots), by_token(kept)


def _invert(slots: Int[Array, "B S k"], num_slots: int) -> Int[Array, "B EC"]:
  """Returns the choice (s k + j) that has each slot; S k where none has."""
  choices = _reshape(slots, slots.shape[0], slots.shape[1] * slots.shape[2])
  num_choices = choices.shape[1]

  def invert(row: Int[Array, " Sk"]) -> Int[Array, " EC"]:
    empty = jnp.full((num_slots,), num_choices)
    return empty.at[row].set(jnp.arange(num_choices), mode="drop")

  return jax.vmap(invert)(choices)


def _dispatch(
  x: Float[Array, "B S D"], slots: Int[Array, "B S k"], owners: Int[Array, "B EC"]
) -> Float[Array, "B EC D"]:
  """Copies each token into its slots; a slot nobody has is 0."""
  return jax.vmap(_take)(x, owners // slots.shape[-1], slots)


def _combine(
  outputs: Float[Array, "B EC D"],
  weights: Float[Array, "B S k"],
  slots: Int[Array, "B S k"],
  owners: Int[Array, "B EC"],
) -> Float[Array, "B S D"]:
  """Sums each token's expert outputs by weight; a dropped choice adds nothing."""
  choices = _reshape(slots, slots.shape[0], slots.shape[1] * slots.shape[2])
  chosen = jax.vmap(_take)(outputs, choices, owners[..., None])
  chosen = _reshape(chosen, *slots.shape, outputs.shape[-1])
  return jnp.einsum("bskd,bsk->bsd", chosen, weights.astype(outputs.dtype))


@jax.custom_vjp
def _take(
  x: Float[Array, "n D"], index: Int[Array, " m"], inverse: Int[Array, "n r"]
) -> Float[Array, "m D"]:
  """Returns rows of x, 0 where the index is n or more.

  `inverse` names the results that each row went to (m or more: none), so that the gradient is a
  gather too: the scatter-add that JAX would use is far slower on every backend.
  """
  return x.at[index].get(mode="fill", fill_value=0)


def _take_forward(x, index, inverse):
  return _take(x, index, inverse), inverse


def _take_backward(inverse, grad):
  rows = grad.at[inverse].get(mode="fill", fill_value=0)
  return jnp.sum(rows, axis=1), None, None


_take.defvjp(_take_forward, _take_backward)
