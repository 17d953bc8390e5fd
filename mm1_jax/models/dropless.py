# SPDX-License-Identifier: Apache-2.0
"""Experts that drop no token: for each as many rows as choices fell on it, sorted by expert.

  expert     each chip gathers the tokens of all chips, and runs its own experts on them
  rows       sorted by expert, multiplied by group
  back       the sums of each token are scattered to its chip

Every array here is a chip's own part. Letters as in `models.moe`.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mm1_jax.config import BATCH_AXES
from mm1_jax.models.dispatch import collect, invert, places, spread, spread_weights
from mm1_jax.models.experts import swiglu
from mm1_jax.models.grouped_matmul import padded_rows


def run_dropless(tokens, matrices, exchange_factor: float) -> Float[Array, "n D"]:
  """Runs one chip's tokens, and drops none.

  Each chip of the `expert` axis holds a part of the experts, and has room for `exchange_factor`
  times the rows of an even load. Where any chip of the mesh would get more, all of them split their
  tokens into so many rounds that even all tokens of a round would fit on one chip.
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
    # The backward pass keeps nothing of the rounds: both branches of the conditional have memory.
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
  uneven loads, up to about 8 chips; and it has no buffer that an uneven load could overflow.
  """
  x, weights, experts = (jax.lax.all_gather(a, "expert", tiled=True) for a in tokens)
  num_here = matrices[0].shape[0]
  experts -= jax.lax.axis_index("expert") * num_here
  experts = jnp.where(experts < 0, num_here, experts)  # other chips' count as past the last
  y = _run_experts((x, weights, experts), matrices, num_rows, named)
  return jax.lax.psum_scatter(y, "expert", tiled=True)


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
