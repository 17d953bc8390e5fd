# SPDX-License-Identifier: Apache-2.0
"""From prompts on the mesh to new tokens: prefill into a KV cache, then decode until all rows end.

  1. prefill:  the prompts, left-padded so that all end at the same slot, go through once.
  2. sample:   the next token of each row, from the logits of its last one.
  3. decode:   that token goes through alone and attends to the cache; then 2. again, in a
               `while_loop`.

`decode` may be called in parts: between them the host reads the new tokens, for stop strings and
streaming. That compiles nothing anew.

Letters: B rows, S prompt positions, C cache slots, N image slots a row, V vocabulary.
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


class Draw(NamedTuple):
  """How tokens are drawn, for all rows."""

  sampling: Sampling
  allowed: Bool[Array, " V"]  # tokens that may be drawn, `ends` among them
  ends: Int[Array, " E"]  # tokens that end a row
  keys: Key[Array, " B"]  # a random key for each row, so that rows do not depend on each other


class Decoding(NamedTuple):
  """The state of the rows."""

  tokens: Int[Array, "B C"]  # new ones from slot 0; `ends[0]` from the end of a row on
  lengths: Int[Array, " B"]  # new tokens before the end
  done: Bool[Array, " B"]
  step: Int[Array, ""]  # tokens written in every row
  last: Int[Array, " B"]  # the newest of them, not read by the model yet
  prompt_lengths: Int[Array, " B"]
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
    # Rounding may bring `before` to 1 ahead of the last tokens; a top_p of 1 keeps them.
    ranked = jnp.where((before < sampling.top_p) | (sampling.top_p >= 1), ranked, -jnp.inf)
    choice = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0]

  return jax.lax.cond(sampling.temperature > 0, drawn, likeliest)


def read_prompts(
  model: MM1,
  tokens: Int[Array, "B S"],
  images: UInt8[Array, "B N H W 3"],
  lengths: Int[Array, " B"],
  num_slots: int,
) -> tuple[Float[Array, "B 1 D"], KVCache]:
  """Returns the last hidden state of left-padded prompts, and the cache after them."""
  num_rows, num_positions = tokens.shape
  positions = jnp.arange(num_positions)[None] - (num_positions - lengths[:, None])
  segment_ids = (positions >= 0).astype(jnp.int32)
  cache = model.decoder.init_cache(num_rows, num_slots)
  out = model.prefill(tokens, images, jnp.maximum(positions, 0), segment_ids, cache)
  assert out.cache is not None
  return out.hidden[:, -1:], out.cache


def next_logits(model: MM1, hidden: Float[Array, "B 1 D"]) -> Float[Array, "B V"]:
  """Returns the logits of the next tokens, of all rows on every device.

  Ranking tokens along a vocabulary that is split would cost more.
  """
  logits = model.decoder.logits(hidden)[:, 0]
  return reshard(logits, LAYOUT.replicated)


@functools.partial(jax.jit, static_argnames="num_slots")
def prefill(
  model: MM1,
  tokens: Int[Array, "B S"],
  images: UInt8[Array, "B N H W 3"],
  lengths: Int[Array, " B"],
  draw: Draw,
  *,
  num_slots: int,
) -> Decoding:
  """Reads prompts and draws the first token of each row.

  Compiles once for each shape of `tokens` and `images` and each `num_slots`.

  Args:
    model: its params on the mesh that is set.
    tokens: prompts, left-padded with anything but image placeholders; it changes nothing.
    images: the rows' pictures in order; a slot beyond a row's last picture changes nothing.
    lengths: positions of each prompt; 0 marks a row that only fills the batch.
    draw: how tokens are drawn.
    num_slots: of the cache (C): room for S and for the new tokens.
  """
  hidden, cache = read_prompts(model, tokens, images, lengths, num_slots)
  shape = (len(tokens), num_slots)
  blank = jnp.full(shape, draw.ends[0], jnp.int32, out_sharding=LAYOUT.act_b)
  zeros = jnp.zeros_like(lengths)
  start = Decoding(blank, zeros, lengths == 0, jnp.array(0), zeros, lengths, cache)
  return _write(model, start, hidden, draw)


@functools.partial(jax.jit, donate_argnames="state")
def decode(
  model: MM1, state: Decoding, draw: Draw, stopped: Bool[Array, " B"], until: Int[Array, ""] | int
) -> Decoding:
  """Decodes until every row has ended, or has `until` tokens.

  Compiles once for each number of rows and of cache slots.

  Args:
    model: as in `prefill`.
    state: from `prefill` or `decode`; its memory is used up.
    draw: as in `prefill`.
    stopped: rows that end here, whatever their last token.
    until: at most C less the prompts' S positions.
  """

  def unfinished(state: Decoding) -> Bool[Array, ""]:
    return (state.step < until) & ~jnp.all(state.done)

  def body(state: Decoding) -> Decoding:
    positions = (state.prompt_lengths + state.step - 1)[:, None]
    out = model.decode(state.last[:, None], positions, state.cache)
    assert out.cache is not None
    return _write(model, state._replace(cache=out.cache), out.hidden, draw)

  return jax.lax.while_loop(unfinished, body, state._replace(done=state.done | stopped))


def _write(model: MM1, state: Decoding, hidden: Float[Array, "B 1 D"], draw: Draw) -> Decoding:
  """Draws each row's next token from the last hidden state, and writes it to the state."""
  keys = jax.vmap(jax.random.fold_in, (0, None))(draw.keys, state.step)
  drawn = sample(next_logits(model, hidden), draw.sampling, draw.allowed, keys)
  token = jnp.where(state.done, draw.ends[0], reshard(drawn, LAYOUT.act_b))
  done = state.done | jnp.any(token[:, None] == draw.ends[None], axis=1)
  return state._replace(
    tokens=jax.lax.dynamic_update_slice(
      state.tokens, jnp.where(done, draw.ends[0], token)[:, None], (0, state.step)
    ),
    lengths=state.lengths + ~done,
    done=done,
    step=state.step + 1,
    last=token,
  )
