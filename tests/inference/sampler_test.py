# SPDX-License-Identifier: Apache-2.0
"""The cache gives what the full forward gives, and tokens are drawn as asked."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, reshard

from mm1_jax.batch import Batch
from mm1_jax.config import MeshConfig
from mm1_jax.inference.sampler import GREEDY, Draw, Sampling, decode, prefill, sample
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import LAYOUT, abstract_state, make_mesh
from tests.helpers import tiny
from tests.helpers.runs import TOKENS_PER_IMAGE, run_config

pytestmark = pytest.mark.compiles

IMAGE, EOS, VOCAB = 4, 2, 4160
SLOTS, NEW = 24, 6  # prompt slots, and tokens that follow
LENGTHS = np.array([24, 17, 9, 5], np.int32)
NUM_IMAGES = [2, 1, 1, 0]
ALLOWED = np.arange(VOCAB) >= 16
ALLOWED[EOS] = True


@pytest.fixture(autouse=True)
def mesh():
  with jax.set_mesh(tiny.mesh()):
    yield


@pytest.fixture(params=["dense", "moe"])
def params(request):
  return request.getfixturevalue(request.param)


def make_rows() -> tuple[np.ndarray, np.ndarray]:
  """Returns left-aligned tokens[B, SLOTS + NEW], pictures where NUM_IMAGES says, and images."""
  rng = np.random.default_rng(1)
  tokens = rng.integers(16, VOCAB, (len(LENGTHS), SLOTS + NEW), dtype=np.int32)
  for row, num in zip(tokens, NUM_IMAGES, strict=True):
    for i in range(num):  # a text token before each picture, and between two
      start = 1 + i * (TOKENS_PER_IMAGE + 2)
      row[start : start + TOKENS_PER_IMAGE] = IMAGE
  return tokens, rng.integers(0, 256, (len(LENGTHS), 2, 16, 16, 3), dtype=np.uint8)


def left_pad(tokens: np.ndarray, fill: int = 0) -> np.ndarray:
  padded = np.full((len(tokens), SLOTS), fill, np.int32)
  for row, length, tokens_of_row in zip(padded, LENGTHS, tokens, strict=True):
    row[SLOTS - length :] = tokens_of_row[:length]
  return padded


def place(*arrays: np.ndarray) -> list[jax.Array]:
  """Returns arrays split by rows, as the model takes them, on the mesh that is set."""
  return jax.device_put(list(arrays), NamedSharding(jax.sharding.get_mesh(), LAYOUT.act_b))


def full_logits(params, tokens, images):
  return np.asarray(_full_logits(params, *place(tokens, images)))


def prefill_logits(params, tokens, images):
  logits, cache = _prefill_logits(params, *place(tokens, images))
  return np.asarray(logits), cache


def decode_logits(params, tokens, positions, cache):
  logits, cache = _decode_logits(params, *place(tokens, positions), cache)
  return np.asarray(logits), cache


@jax.jit
def _full_logits(params, tokens, images):
  """Returns float32[B, S, V] of left-aligned rows; causal, so what follows changes nothing."""
  ones, rest = jnp.ones_like(tokens), [None] * 3
  positions = jnp.cumsum(ones, axis=1) - 1
  batch = Batch(
    tokens,
    rest[0],
    rest[1],
    positions,
    ones,
    rest[2],
    images,
    jnp.ones_like(images[:, :, 0, 0, 0], bool),
  )
  return params.decoder.logits(params(batch).hidden)


@jax.jit
def _packed_logits(params, tokens, positions, segments, images):
  rest = [None] * 3
  batch = Batch(
    tokens,
    rest[0],
    rest[1],
    positions,
    segments,
    rest[2],
    images,
    jnp.ones_like(images[:, :, 0, 0, 0], bool),
  )
  return params.decoder.logits(params(batch).hidden)


@jax.jit
def _prefill_logits(params, tokens, images):
  positions = np.arange(SLOTS)[None] - (SLOTS - LENGTHS[:, None])
  positions, segments = (reshard(x, LAYOUT.act_b) for x in (positions, np.int32(positions >= 0)))
  cache = params.decoder.init_cache(len(tokens), SLOTS + NEW)
  out = params.prefill(tokens, images, positions, segments, cache)
  return params.decoder.logits(out.hidden), out.cache


@jax.jit
def _decode_logits(params, tokens, positions, cache):
  out = params.decode(tokens, positions, cache)
  return params.decoder.logits(out.hidden), out.cache


def test_prefill_and_decode_give_the_logits_of_the_full_forward(params):
  tokens, images = make_rows()
  check_logits(params, full_logits(params, tokens, images))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_eight_devices_give_the_logits_of_one(kind, request):
  params = request.getfixturevalue(kind)
  expected = full_logits(params, *make_rows())
  tokens, _ = run_generate(params)
  run = run_config(moe=kind == "moe")
  sizes = MeshConfig(fsdp=2, expert=2, tensor=2) if kind == "moe" else MeshConfig(2, 2, 1, 2)
  eight = make_mesh(dataclasses.replace(run, mesh=sizes))
  placed = abstract_state(lambda: MM1(jax.random.key(0), run.model), eight)
  with jax.set_mesh(eight):
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, placed)
    check_logits(params, expected)
    again, _ = run_generate(params)
  np.testing.assert_array_equal(again, tokens)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 0]])
def test_packed_rows_give_the_logits_of_rows_alone(params, order):
  """What `generate` reads left-padded, training reads packed."""
  tokens, images = make_rows()
  alone = full_logits(params, tokens, images)
  packed = [
    np.concatenate([f(i, int(LENGTHS[i])) for i in order])[None].astype(np.int32)
    for f in (
      lambda i, length: tokens[i, :length],
      lambda _, length: np.arange(length),
      lambda i, length: np.full(length, 1 + order.index(i)),
    )
  ]
  pictures = np.concatenate([images[i, : NUM_IMAGES[i]] for i in order])[None]
  logits = np.asarray(_packed_logits(params, *place(*packed, pictures)))
  at = 0
  for i in order:
    close(logits[0, at : at + LENGTHS[i]], alone[i, : LENGTHS[i]], alone)
    at += LENGTHS[i]


def close(actual, expected, all_expected) -> None:
  """1e-5 of the largest logit: tokens meet in other groups, so experts add in another order."""
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(all_expected).max())


def check_logits(params, expected) -> None:
  """Asserts that every position has its logits, the prompts' by prefill, the others by decode."""
  tokens, images = make_rows()
  logits, cache = prefill_logits(params, left_pad(tokens), images)
  for i, length in enumerate(LENGTHS):
    close(logits[i, SLOTS - length :], expected[i, :length], expected)
  for step in range(NEW):
    at = LENGTHS[:, None] + step
    logits, cache = decode_logits(params, np.take_along_axis(tokens, at, axis=1), at, cache)
    for i, length in enumerate(LENGTHS):
      close(logits[i, 0], expected[i, length + step], expected)


def test_the_contents_of_padding_change_nothing(params):
  tokens, images = make_rows()
  logits, cache = prefill_logits(params, left_pad(tokens), images)
  other = images.copy()
  for i, num in enumerate(NUM_IMAGES):
    other[i, num:] = 255 - other[i, num:]
  other_logits, other_cache = prefill_logits(params, left_pad(tokens, fill=77), other)
  decoded = [
    decode_logits(params, np.full((len(LENGTHS), 1), 99), LENGTHS[:, None], c)[0]
    for c in (cache, other_cache)
  ]
  np.testing.assert_array_equal(decoded[0], decoded[1])
  for i, length in enumerate(LENGTHS):
    real = slice(SLOTS - length, None)
    np.testing.assert_array_equal(logits[i, real], other_logits[i, real])


def run_generate(
  params,
  sampling: Sampling = GREEDY,
  *,
  seed: int = 0,
  order=range(4),
  lengths=LENGTHS,
  allowed=ALLOWED,
  ends=(EOS,),
  parts=(NEW,),
  stopped=(False,) * 4,
):
  """Prefills, then decodes up to each of `parts`."""
  tokens, images = make_rows()
  keys = jax.random.split(jax.random.key(seed), len(LENGTHS))
  order = np.array(order)
  draw = Draw(sampling, jnp.array(allowed), jnp.array(ends), keys[order])
  rows = place(left_pad(tokens)[order], images[order], lengths[order])
  state = prefill(params, *rows, draw, num_slots=SLOTS + NEW)
  for until in parts:
    state = decode(params, state, draw, *place(np.array(stopped)[order]), until)
  return np.asarray(state.tokens), np.asarray(state.lengths)


def test_greedy_is_the_argmax_of_the_full_forward_step_by_step(params):
  tokens, images = make_rows()
  for step in range(NEW):
    logits = np.where(ALLOWED, full_logits(params, tokens, images), -np.inf)
    for i, length in enumerate(LENGTHS):
      tokens[i, length + step] = np.argmax(logits[i, length + step - 1])
  new, _ = run_generate(params)
  for i, length in enumerate(LENGTHS):
    np.testing.assert_array_equal(new[i, :NEW], tokens[i, length : length + NEW])


@pytest.mark.slow
def test_one_row_alone(moe):
  together, _ = run_generate(moe)
  alone, _ = run_generate(moe, order=[0])
  np.testing.assert_array_equal(alone[0], together[0])


def test_decoding_in_parts_changes_nothing(params):
  whole = run_generate(params)
  parts = run_generate(params, parts=(2, 3, NEW))
  np.testing.assert_array_equal(parts[0], whole[0])
  np.testing.assert_array_equal(parts[1], whole[1])


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True])
def test_a_new_token_moves_no_cache(moe):
  """Compiled, `decode` writes a token's slots where they are: nothing else makes a whole cache.

  A copy or a transposition for each token once made batches slower than PyTorch's.
  """
  model = run_config(moe=moe).model
  # Two units: XLA makes no loop of one, and then it copies.
  decoder = dataclasses.replace(model.decoder, depth=2 * model.decoder.layers_per_unit)
  model = dataclasses.replace(model, decoder=decoder)
  params = abstract_state(lambda: MM1(jax.random.key(0), model), tiny.mesh())
  tokens, images = make_rows()
  keys = jax.random.split(jax.random.key(0), len(LENGTHS))
  draw = Draw(GREEDY, jnp.array(ALLOWED), jnp.array([EOS]), keys)
  rows = place(left_pad(tokens), images, LENGTHS)
  state = jax.eval_shape(
    lambda params, *rows: prefill(params, *rows, draw, num_slots=SLOTS + NEW), params, *rows
  )
  program = decode.lower(params, state, draw, *place(np.zeros(len(LENGTHS), bool)), NEW).compile()
  stack = state.cache.layers[0].keys.shape
  made = collections.Counter(
    op
    for dims, op in re.findall(r"= f32\[([\d,]+)\]\S* ([\w-]+)\(", program.as_text())
    if (shape := [*map(int, dims.split(","))]) == [*stack] or sorted(shape) == sorted(stack[1:])
  )
  assert made["dynamic-update-slice"]
  assert not made.keys() & {"copy", "transpose", "broadcast", "concatenate"}, made


def test_a_stopped_row_gets_no_more_tokens(dense):
  greedy, _ = run_generate(dense)
  new, lengths = run_generate(dense, stopped=(True, False, False, False))
  assert lengths.tolist() == [1, NEW, NEW, NEW]
  np.testing.assert_array_equal(new[1:], greedy[1:])
  assert new[0, 0] == greedy[0, 0]
  assert (new[0, 1:] == EOS).all()


def test_no_more_tokens_than_asked_for(dense):
  new, lengths = run_generate(dense, parts=(3,))
  assert lengths.tolist() == [3, 3, 3, 3]
  assert (new[:, 3:] == EOS).all()


def test_top_k_of_1_is_greedy_and_rows_draw_on_their_own(dense):
  greedy, _ = run_generate(dense)
  one, _ = run_generate(dense, Sampling(temperature=1.0, top_k=1))
  np.testing.assert_array_equal(one, greedy)
  drawn, _ = run_generate(dense, Sampling(temperature=1.0))
  again, _ = run_generate(dense, Sampling(temperature=1.0))
  other, _ = run_generate(dense, Sampling(temperature=1.0), seed=1)
  turned, _ = run_generate(dense, Sampling(temperature=1.0), order=[3, 2, 1, 0])
  np.testing.assert_array_equal(drawn, again)
  np.testing.assert_array_equal(drawn, turned[::-1])
  assert (drawn != greedy).any()
  assert (drawn != other).any()


def test_a_row_ends_at_eos_while_others_continue(dense):
  greedy, _ = run_generate(dense)
  end = int(greedy[0, 2])
  new, lengths = run_generate(dense, ends=(EOS, end))
  expected = [[*row[:NEW], end].index(end) for row in greedy.tolist()]
  assert lengths.tolist() == expected
  assert expected[0] <= 2 < max(expected)
  for row, length, before in zip(new, lengths, greedy, strict=True):
    np.testing.assert_array_equal(row[:length], before[:length])
    assert (row[length:] == EOS).all()


def test_all_rows_end_at_once_if_only_eos_is_allowed(dense):
  new, lengths = run_generate(dense, allowed=np.arange(VOCAB) == EOS)
  assert lengths.tolist() == [0, 0, 0, 0]
  assert (new == EOS).all()


def test_a_row_of_length_0_is_done_from_the_start(dense):
  greedy, _ = run_generate(dense)
  new, lengths = run_generate(dense, lengths=np.array([*LENGTHS[:3], 0], np.int32))
  np.testing.assert_array_equal(new[:3], greedy[:3])
  assert lengths[3] == 0


draw = jax.jit(sample)


def draws(logits: list[float], sampling: Sampling, num: int = 4000, allowed=None) -> np.ndarray:
  """Returns the share of each token among `num` draws."""
  rows = jnp.broadcast_to(jnp.array(logits, jnp.float32)[None], (num, len(logits)))
  keys = jax.random.split(jax.random.key(0), num)
  allowed = np.ones(len(logits), bool) if allowed is None else allowed
  tokens = draw(rows, sampling, allowed, keys)
  return np.bincount(tokens, minlength=len(logits)) / num


def test_draws_follow_the_probabilities():
  probs = np.array([0.1, 0.2, 0.3, 0.4])
  shares = draws(np.log(probs).tolist(), Sampling(temperature=1.0))
  np.testing.assert_allclose(shares, probs, atol=0.03)
  sharper = draws(np.log(probs).tolist(), Sampling(temperature=0.5))
  np.testing.assert_allclose(sharper, probs**2 / np.sum(probs**2), atol=0.03)


@pytest.mark.parametrize(
  ("sampling", "expected"),
  [
    (Sampling(1.0, top_k=2), [0, 0, 3 / 7, 4 / 7]),
    (Sampling(1.0, top_p=0.4), [0, 0, 0, 1]),
    (Sampling(1.0, top_p=0.41), [0, 0, 3 / 7, 4 / 7]),
    (Sampling(1.0, top_p=1e-6), [0, 0, 0, 1]),
    # top_p counts among what top_k has left: 4/9, 3/9, 2/9.
    (Sampling(1.0, top_k=3, top_p=0.7), [0, 0, 3 / 7, 4 / 7]),
    (Sampling(1.0, top_k=100), [0.1, 0.2, 0.3, 0.4]),
    (Sampling(0.0), [0, 0, 0, 1]),
  ],
)
def test_top_k_and_top_p(sampling: Sampling, expected: list[float]):
  shares = draws(np.log([0.1, 0.2, 0.3, 0.4]).tolist(), sampling)
  np.testing.assert_allclose(shares, expected, atol=0.03)
  assert (shares[np.array(expected) == 0] == 0).all()


def test_ties_do_not_widen_top_k():
  assert np.count_nonzero(draws([0.0, 0.0, 0.0, 0.0], Sampling(1.0, top_k=2))) == 2


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0), Sampling(1e3, 0, 0.999)])
def test_what_is_not_allowed_is_never_drawn(sampling: Sampling):
  allowed = np.array([False, True, True, False])
  shares = draws([1e4, 0.0, 1.0, 1e4], sampling, allowed=allowed)
  assert shares[~allowed].sum() == 0
