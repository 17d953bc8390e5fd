# SPDX-License-Identifier: Apache-2.0
"""Top-k mixture of experts (GShard, arXiv 2006.16668; ST-MoE, 2202.08906; MM1 section 3.4).

  1. route:    a softmax over experts per token; the k best, their weights renormalised to sum to 1.
               With k = 1 the weight is the probability itself (Switch Transformer, 2101.03961,
               eq. 2): renormalised it would be 1, and the loss would not reach the router.
  2. dispatch: tokens are copied into the rows of a buffer, sorted by expert.
  3. experts:  SwiGLU, each row with its expert's weights and times its router weight.
  4. combine:  each token sums its rows.

Two paths do 2 to 4 and agree where both have room:

  `models.bounded`   `capacity_factor` slots for each expert in each batch row. Tokens queue, all
                     first choices before any second; a token beyond the capacity is dropped (it
                     passes by the residual alone). The buffers cross the mesh to their experts by
                     all-to-all. A token's output depends on its whole row: with k > 1 also on the
                     tokens after it.
  `models.dropless`  for each expert as many rows as choices fell on it, and grouped matrix
                     products. Over an `expert` axis each chip gathers the tokens of all chips, runs
                     the rows of its own experts, and the sums are scattered back.

Padding is not routed: it takes no row and counts in no loss and no statistic.
Letters: B rows, S positions, k choices, E experts, C capacity, D width, F mlp; and where all of a
chip's tokens are in one list, n tokens, m rows of a buffer.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mm1_jax.config import DecoderConfig, MoEConfig
from mm1_jax.models.bounded import run_bounded
from mm1_jax.models.dropless import run_dropless
from mm1_jax.models.layers import normal
from mm1_jax.sharding import LAYOUT, gather, spec_of


class MoEStats(NamedTuple):
  """What a sparse layer reports, over all real tokens of the global batch."""

  balance_loss: Float[Array, ""]  # unweighted; 1 when the experts are used evenly
  router_z_loss: Float[Array, ""]  # unweighted
  load: Float[Array, " E"]  # share of the k choices of all tokens that fell on each expert
  dropped: Float[Array, ""]  # share of choices that found no room


class Routing(NamedTuple):
  """The experts that each token is sent to, and their weights."""

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
    # Float32 throughout: in bfloat16 near ties are decided otherwise, and the losses lose their
    # gradient. A TPU multiplies float32 in bfloat16 unless the precision is set.
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
  # Gathered here, inside the rematerialised block: outside of the scan, the whole experts of all
  # layers would be in memory at once. The gradient is a reduce-scatter in the compute dtype.
  stored = ((gate, LAYOUT.expert_edf), (up, LAYOUT.expert_edf), (down, LAYOUT.expert_efd))
  matrices = tuple(_gather_fsdp(w.astype(x.dtype), spec) for w, spec in stored)
  if capacity is not None:
    y, kept = run_bounded((x, weights, experts), matrices, capacity)
  else:
    tokens = tuple(a.reshape(-1, a.shape[-1]) for a in (x, weights, experts))
    y = run_dropless(tokens, matrices, exchange_factor)
    kept = jnp.ones(experts.shape, bool)
  return jax.lax.psum(y, "tensor").reshape(x.shape), kept


def _gather_fsdp(weight: Array, spec) -> Array:
  dim = next(i for i, axes in enumerate(spec) if axes is not None and "fsdp" in axes)
  return jax.lax.all_gather(weight, ("fsdp", "sequence"), axis=dim, tiled=True)
