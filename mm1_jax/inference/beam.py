# SPDX-License-Identifier: Apache-2.0
"""Beam search: of all continuations of a prompt, the K likeliest are kept at each step.

A finished answer scores log p / length ** penalty, its end token counted: Wu et al. (arXiv
1609.08144, section 7) divide by ((5 + length) / 6) ** penalty, transformers as here. A row is
searched until nothing that still grows can beat its best answer (transformers:
`early_stopping="never"`).

Letters: B rows, K beams, S prompt positions, C cache slots, N image slots a row, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import reshard
from jaxtyping import Array, Bool, Float, Int, UInt8

from mm1_jax.inference.sampler import next_logits, read_prompts
from mm1_jax.models.decoder import KVCache
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import LAYOUT


class BeamSearch(NamedTuple):
  """Searches for the likeliest answer, instead of drawing one."""

  num_beams: int = 4  # continuations that are kept at each step
  length_penalty: float = 1.0  # 0 compares sums of log p; the larger, the longer the answers


class Search(NamedTuple):
  """Settings of the search, for all rows."""

  penalty: Float[Array, ""]
  limit: Int[Array, ""]  # new tokens, the end token included
  allowed: Bool[Array, " V"]  # tokens that may be said, `ends` among them
  ends: Int[Array, " E"]  # tokens that end an answer


class Beams(NamedTuple):
  """The state of the rows; on every device whole, but for the cache."""

  tokens: Int[Array, "B K C"]  # new ones of unfinished beams, from slot 0
  scores: Float[Array, "B K"]  # log p; -inf for a beam that is not in use
  best: Int[Array, "B C"]  # of the finished answers
  best_score: Float[Array, " B"]  # -inf before there is one
  best_length: Int[Array, " B"]  # of `best`, its end token left out
  step: Int[Array, ""]  # tokens of every beam
  cache: KVCache  # B * K rows, those of a prompt side by side


@functools.partial(jax.jit, static_argnames=("num_slots", "num_beams"))
def prefill(
  model: MM1,
  tokens: Int[Array, "B S"],
  images: UInt8[Array, "B N H W 3"],
  lengths: Int[Array, " B"],
  search: Search,
  *,
  num_slots: int,
  num_beams: int,
) -> Beams:
  """Reads each prompt once, and begins K beams with its K likeliest tokens.

  For the arguments see `sampler.prefill`; compiles once more for each `num_beams`.
  """
  hidden, cache = read_prompts(model, tokens, images, lengths, num_slots)
  logits = next_logits(model, hidden)
  num_rows = len(tokens)
  # All beams are still equal: the first one has all the probability.
  first = jnp.where(jnp.arange(num_beams)[None] == 0, 0.0, -jnp.inf)
  begun = reshard(lengths, LAYOUT.replicated) > 0
  start = Beams(
    tokens=jnp.zeros((num_rows, num_beams, num_slots), jnp.int32),
    scores=jnp.where(begun[:, None], first, -jnp.inf),
    best=jnp.zeros((num_rows, num_slots), jnp.int32),
    best_score=jnp.full(num_rows, -jnp.inf),
    best_length=jnp.zeros(num_rows, jnp.int32),
    step=jnp.array(0),
    cache=cache,
  )
  return _grow(start, jnp.repeat(logits, num_beams, axis=0), search)


@functools.partial(jax.jit, donate_argnames="beams")
def decode(
  model: MM1,
  beams: Beams,
  lengths: Int[Array, " B"],
  search: Search,
  stopped: Bool[Array, "B K"],
  until: Int[Array, ""] | int,
) -> Beams:
  """Decodes until no row's best answer can improve, or every beam has `until` tokens.

  Args:
    model: as in `prefill`.
    beams: from `prefill` or `decode`; its memory is used up.
    lengths: positions of each prompt.
    search: as in `prefill`.
    stopped: beams that end here, whatever their last token.
    until: at most C less the prompts' S positions.
  """

  def body(beams: Beams) -> Beams:
    last = jax.lax.dynamic_index_in_dim(beams.tokens, beams.step - 1, axis=2, keepdims=False)
    positions = jnp.repeat(reshard(lengths, LAYOUT.replicated), last.shape[1]) + beams.step - 1
    tokens, positions = (reshard(x.reshape(-1, 1), LAYOUT.act_b) for x in (last, positions))
    out = model.decode(tokens, positions, beams.cache)
    assert out.cache is not None
    return _grow(beams._replace(cache=out.cache), next_logits(model, out.hidden), search)

  def unfinished(beams: Beams) -> Bool[Array, ""]:
    return (beams.step < until) & ~jnp.all(finished(beams, search))

  length = jnp.broadcast_to(beams.step, stopped.shape)
  beams = _keep_best(beams, beams.tokens, beams.scores, length, length, stopped, search)
  beams = beams._replace(scores=jnp.where(stopped, -jnp.inf, beams.scores))
  return jax.lax.while_loop(unfinished, body, beams)


def finished(beams: Beams, search: Search) -> Bool[Array, " B"]:
  """Returns which rows cannot improve: log p only falls, and a length is at most `limit`."""
  length = jnp.where(search.penalty > 0, search.limit, beams.step + 1)
  return jnp.max(beams.scores, axis=1) / length**search.penalty <= beams.best_score


def _grow(beams: Beams, logits: Float[Array, "BK V"], search: Search) -> Beams:
  """Gives every beam its next token, and keeps the K best of a row that have not ended."""
  num_rows, num_beams = beams.scores.shape
  log_probs = jax.nn.log_softmax(jnp.where(search.allowed[None], logits, -jnp.inf))
  log_probs = beams.scores[..., None] + log_probs.reshape(num_rows, num_beams, -1)
  # Each beam has at most E ends, so K candidates of these have not ended.
  num = num_beams * (1 + len(search.ends))
  scores, index = jax.lax.top_k(log_probs.reshape(num_rows, -1), num)
  parents, token = jnp.divmod(index, logits.shape[-1])
  tokens = jnp.take_along_axis(beams.tokens, parents[..., None], axis=1)
  tokens = jax.lax.dynamic_update_slice(tokens, token[..., None], (0, 0, beams.step))

  length = jnp.full_like(token, beams.step + 1)
  said_end = jnp.any(token[..., None] == search.ends[None, None], axis=-1)
  ended = said_end | (length >= search.limit)
  # A candidate that ends counts only if it is among the K best; the others are for the next step.
  counts = ended & (jnp.arange(num)[None] < num_beams)
  beams = _keep_best(beams, tokens, scores, length, length - said_end, counts, search)

  scores, kept = jax.lax.top_k(jnp.where(ended, -jnp.inf, scores), num_beams)
  return beams._replace(
    tokens=jnp.take_along_axis(tokens, kept[..., None], axis=1),
    scores=scores,
    step=beams.step + 1,
    cache=_follow(beams.cache, jnp.take_along_axis(parents, kept, axis=1)),
  )


def _keep_best(
  beams: Beams,
  tokens: Int[Array, "B N C"],
  scores: Float[Array, "B N"],
  lengths: Int[Array, "B N"],  # as the penalty counts them
  said: Int[Array, "B N"],  # without an end token
  ended: Bool[Array, "B N"],
  search: Search,
) -> Beams:
  """Returns the beams, with `best` the best of the old one and of those that have `ended`."""
  scores = jnp.where(ended, scores / lengths**search.penalty, -jnp.inf)
  at = jnp.argmax(scores, axis=1)[:, None]
  score, length = (jnp.take_along_axis(x, at, axis=1)[:, 0] for x in (scores, said))
  better = score > beams.best_score
  new = jnp.take_along_axis(tokens, at[..., None], axis=1)[:, 0]
  return beams._replace(
    best=jnp.where(better[:, None], new, beams.best),
    best_score=jnp.where(better, score, beams.best_score),
    best_length=jnp.where(better, length, beams.best_length),
  )


def _follow(cache: KVCache, parents: Int[Array, "B K"]) -> KVCache:
  """Returns the cache of beams that continue their `parents`; no row changes its device.

  A cache has a row for each beam, or one row for the prompt, which all beams continue.
  """

  def take(layers, segment_ids, parents):
    first = jnp.arange(len(parents)) * (len(segment_ids) // len(parents))
    rows = (first[:, None] + parents).reshape(-1)
    return jax.tree.map(lambda x: x[:, rows], layers), segment_ids[rows]

  kept = LAYOUT.cache_ubkch, LAYOUT.act_b
  take = jax.shard_map(take, in_specs=(*kept, LAYOUT.act_b), out_specs=kept)
  layers, segments = take(cache.layers, cache.segment_ids, reshard(parents, LAYOUT.act_b))
  return KVCache(layers, segments, cache.length)
