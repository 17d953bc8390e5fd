# SPDX-License-Identifier: Apache-2.0
"""From prompts on the mesh to new tokens: prefill into a KV cache, then decode until all rows end.

  1. prefill:  the prompts, left-padded so that all end at the same slot, go through once.
  2. sample:   the next token of each row, from the logits of its last one.
  3. decode:   that token goes through alone, seeing the cache; then 2. again.

Letters: B rows, S prompt positions, G new tokens, N image slots a row, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import reshard
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mm1_jax.models.decoder import KVCache
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import LAYOUT


class Sampling(NamedTuple):
  """How the next token is drawn; first the temperature acts, then `top_k`, then `top_p`."""

  temperature: float | Float[Array, ""] = 0.0  # 0 always takes the likeliest token
  top_k: int | Int[Array, ""] = 0  # draws among this many likeliest; 0 among all
  top_p: float | Float[Array, ""] = 1.0  # the fewest tokens that hold this share of probability


GREEDY = Sampling()


class Generated(NamedTuple):
  """New tokens by row."""

  tokens: Int[Array, "B G"]  # `eos_id` from the end of a row on
  lengths: Int[Array, " B"]  # tokens before the end


class _Loop(NamedTuple):
  step: Int[Array, ""]  # tokens written
  last: Int[Array, " B"]  # the newest of them, not read by the model yet
  done: Bool[Array, " B"]
  tokens: Int[Array, "B G"]
  cache: KVCache


def sample(
  logits: Float[Array, "B V"],
  sampling: Sampling,
  allowed: Bool[Array, " V"],
  keys: Key[Array, " B"],
) -> Int[Array, " B"]:
  """Returns one token a row, never one that is not `allowed`; each row draws with its own key."""
  logits = jnp.where(allowed[None], logits, -jnp.inf)

  def likeliest() -> Int[Array, " B"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)

  def drawn() -> Int[Array, " B"]:
    # Tokens by rank, so that ties cannot let in more than `top_k`.
    order = jnp.argsort(logits, axis=-1, descending=True).astype(jnp.int32)
    rank = jnp.arange(logits.shape[-1])[None]
    top_k = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[-1])
    ranked = jnp.take_along_axis(logits, order, axis=-1) / sampling.temperature
    ranked = jnp.where(rank < top_k, ranked, -jnp.inf)
    probs = jax.nn.softmax(ranked)
    before = jnp.cumsum(probs, axis=-1) - probs
    # Rounding may bring `before` to 1 in front of the last tokens; a top_p of 1 keeps them.
    ranked = jnp.where((before < sampling.top_p) | (sampling.top_p >= 1), ranked, -jnp.inf)
    choice = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0]

  return jax.lax.cond(sampling.temperature > 0, drawn, likeliest)


@functools.partial(jax.jit, static_argnames="num_slots")
def generate(
  model: MM1,
  tokens: Int[Array, "B S"],
  images: UInt8[Array, "B N H W 3"],
  lengths: Int[Array, " B"],
  *,
  num_slots: int,
  max_new_tokens: int | Int[Array, ""],
  sampling: Sampling,
  allowed: Bool[Array, " V"],
  eos_id: int | Int[Array, ""],
  keys: Key[Array, " B"],
) -> Generated:
  """Goes on from prompts until every row has drawn `eos_id`, or `max_new_tokens` are there.

  Compiles once for each shape of `tokens` and `images` and each `num_slots`, whatever the rest.

  Args:
    model: its params on the mesh that is set.
    tokens: prompts, left-padded with anything but image placeholders; it changes nothing.
    images: the rows' pictures in order; a slot beyond a row's last picture changes nothing.
    lengths: positions of each prompt; 0 marks a row that only fills the batch.
    num_slots: the new tokens there is room for (G).
    max_new_tokens: at most `num_slots`.
    sampling: how tokens are drawn.
    allowed: tokens that may be drawn, `eos_id` among them.
    eos_id: the token that ends a row.
    keys: a random key for each row, so that rows do not depend on each other.
  """
  num_rows, num_positions = tokens.shape
  positions = jnp.arange(num_positions)[None] - (num_positions - lengths[:, None])
  segment_ids = (positions >= 0).astype(jnp.int32)
  cache = model.decoder.init_cache(num_rows, num_positions + num_slots)
  weight = model.decoder.head_weight()

  def draw(hidden: Float[Array, "B 1 D"], done, step) -> Int[Array, " B"]:
    # Every device draws for all rows: a sort along a sharded vocabulary would cost more.
    logits = reshard(model.decoder.logits(hidden, weight)[:, 0], LAYOUT.replicated)
    token = sample(logits, sampling, allowed, jax.vmap(jax.random.fold_in, (0, None))(keys, step))
    return jnp.where(done, eos_id, reshard(token, LAYOUT.act_b))

  def write(written, token, step) -> Int[Array, "B G"]:
    return jax.lax.dynamic_update_slice(written, token[:, None], (0, step))

  def unfinished(loop: _Loop) -> Bool[Array, ""]:
    return (loop.step < max_new_tokens) & ~jnp.all(loop.done)

  def decode(loop: _Loop) -> _Loop:
    step, last = loop.step, loop.last
    out = model.decode(last[:, None], (lengths + step - 1)[:, None], loop.cache)
    assert out.cache is not None
    token = draw(out.hidden, loop.done, step)
    done = loop.done | (token == eos_id)
    return _Loop(step + 1, token, done, write(loop.tokens, token, step), out.cache)

  out = model.prefill(tokens, images, jnp.maximum(positions, 0), segment_ids, cache)
  assert out.cache is not None
  token = draw(out.hidden[:, -1:], lengths == 0, 0)
  ended = jnp.full((num_rows, num_slots), eos_id, jnp.int32, out_sharding=LAYOUT.act_b)
  first = _Loop(jnp.array(1), token, token == eos_id, write(ended, token, 0), out.cache)
  written = jax.lax.while_loop(unfinished, decode, first).tokens
  return Generated(written, jnp.sum(jnp.cumprod(written != eos_id, axis=1), axis=1))
