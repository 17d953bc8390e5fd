# SPDX-License-Identifier: Apache-2.0
"""Beam search finds what trying every answer finds, and what a loop over full forwards finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from mm1_jax.batch import Batch
from mm1_jax.inference.beam import BeamSearch
from mm1_jax.inference.model import Model
from mm1_jax.inference.prompts import PromptError
from mm1_jax.sharding import LAYOUT

pytestmark = pytest.mark.compiles

LIMIT = 4  # new tokens
ROWS, POSITIONS = 8, 64  # of a full forward


@pytest.fixture(scope="module")
def few(model):
  """A model that may generate four tokens, two of them about as likely as the end."""
  one = Model(model.params, model.run, model.mesh)
  (start,) = next_log_probs(one, ["What is"], [()])
  ranks = np.argsort(-start).tolist()
  at = ranks.index(one.tokenizer.eos_id)
  allowed = np.zeros_like(model.answers.allowed)
  allowed[[one.tokenizer.eos_id, *ranks[at - 2 : at], *ranks[:2]]] = True
  one.answers = one.answers._replace(allowed=allowed)
  return one


@pytest.fixture
def prompts(pictures):
  return [["What is"], ["Once upon", pictures[0], "a time"], [pictures[1]]]


@jax.jit
def _logits(params, tokens, images):
  ones, rest = jnp.ones_like(tokens), [None] * 3
  batch = Batch(
    tokens,
    rest[0],
    rest[1],
    jnp.cumsum(ones, axis=1) - 1,
    ones,
    rest[2],
    images,
    jnp.ones_like(images[:, :, 0, 0, 0], bool),
  )
  return params.decoder.logits(params(batch).hidden)


def next_log_probs(model: Model, prompt: list, said: list[tuple[int, ...]]) -> np.ndarray:
  """Returns float64[N, V]: what may follow a prompt and N texts, from N full forwards."""
  request = model.encode(prompt)
  tokens = np.zeros((ROWS, POSITIONS), np.int32)
  images = np.zeros((ROWS, 1, *model.run.model.vision.image_size, 3), np.uint8)
  for row, ids in enumerate(said):
    tokens[row, : len(request.ids) + len(ids)] = [*request.ids, *ids]
    for i, picture in enumerate(request.images):
      images[row, i] = picture
  with jax.set_mesh(model.mesh):
    place = NamedSharding(model.mesh, LAYOUT.act_b)
    logits = _logits(model.params, *jax.device_put((tokens, images), place))
  last = [logits[row, len(request.ids) + len(ids) - 1] for row, ids in enumerate(said)]
  logits = np.where(model.answers.allowed, np.array(last, np.float64), -np.inf)
  top = logits.max(axis=1, keepdims=True)
  return logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))


def every_answer(model: Model, prompt: list, penalty: float) -> str:
  """Returns the best of all answers there are."""
  end = model.tokenizer.eos_id
  tokens = [t for t in np.flatnonzero(model.answers.allowed).tolist() if t != end]
  growing, ended = {(): 0.0}, {}
  for length in range(1, LIMIT + 1):
    grown = {}
    for part in [list(growing)[i : i + ROWS] for i in range(0, len(growing), ROWS)]:
      for ids, log_probs in zip(part, next_log_probs(model, prompt, list(part)), strict=True):
        ended[ids] = (growing[ids] + log_probs[end]) / length**penalty
        grown |= {(*ids, token): growing[ids] + log_probs[token] for token in tokens}
    growing = grown
  ended |= {ids: score / LIMIT**penalty for ids, score in growing.items()}
  return model.tokenizer.decode(list(max(ended, key=ended.__getitem__)))


def plain_search(model: Model, prompt: list, how: BeamSearch, limit: int, stop: str) -> str:
  """Returns what beam search finds that is never cut short, without a cache."""
  decode = model.tokenizer.decode
  growing, best = [(0.0, ())], (-np.inf, ())
  for length in range(1, limit + 1):
    if not growing:
      break
    log_probs = next_log_probs(model, prompt, [ids for _, ids in growing])
    candidates = [
      (score + row[token], (*ids, token))
      for (score, ids), row in zip(growing, log_probs, strict=True)
      for token in np.flatnonzero(model.answers.allowed).tolist()
    ]
    growing = []
    for rank, (score, ids) in enumerate(sorted(candidates, reverse=True)):
      said = ids[:-1] if ids[-1] == model.tokenizer.eos_id else ids
      if said == ids and length < limit:
        growing.append((score, ids))
      elif rank < how.num_beams:
        best = max(best, (score / length**how.length_penalty, said))
    growing = growing[: how.num_beams]
    for score, ids in [one for one in growing if stop in decode(list(one[1]))]:
      best = max(best, (score / length**how.length_penalty, ids))
      growing.remove((score, ids))
  return decode(list(best[1])).split(stop)[0]


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 3.0])
def test_enough_beams_find_the_best_of_all_answers(few, prompts, penalty):
  said = few.generate(
    prompts[:2], max_new_tokens=LIMIT, sampling=BeamSearch(64, length_penalty=penalty)
  )
  assert said == [every_answer(few, prompt, penalty) for prompt in prompts[:2]]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_few_beams_find_what_a_plain_loop_finds(model, few, prompts, penalty):
  how = BeamSearch(3, length_penalty=penalty)
  for one in (model, few):
    said = one.generate(prompts, max_new_tokens=12, sampling=how)
    assert said == [plain_search(one, prompt, how, 12, "never said") for prompt in prompts]
    if len(said[0]) > 2:
      stop = said[0][1:3]
      said = one.generate(prompts, max_new_tokens=12, sampling=how, stop=[stop])
      assert said == [plain_search(one, prompt, how, 12, stop) for prompt in prompts]


@pytest.mark.slow
def test_devices_search_as_one_does(model, workdir, prompts):
  how = BeamSearch(3)
  shared = Model.load(workdir, data=2, tensor=2)
  expected = model.generate(prompts, max_new_tokens=6, sampling=how)
  assert shared.generate(prompts, max_new_tokens=6, sampling=how) == expected
  assert model.generate(prompts, max_new_tokens=6, sampling=how, batch_size=1) == expected


@pytest.mark.slow
def test_one_kv_head_answers_as_a_plain_loop_does(prompts, tmp_path):
  """Prefill and decode, greedy and with beams, on one device and on four."""
  from tests.helpers.runs import make_params, run_config, save_run

  run = run_config(num_kv_heads=1)
  save_run(tmp_path / "run", run, make_params(run), steps=(1,))
  one = Model.load(tmp_path / "run")
  how = BeamSearch(3)
  expected = [plain_search(one, prompt, how, 8, "never said") for prompt in prompts]
  greedy = [plain_search(one, prompt, BeamSearch(1), 8, "never said") for prompt in prompts]
  for model in (one, Model.load(tmp_path / "run", data=2, fsdp=2)):
    assert model.generate(prompts, max_new_tokens=8, sampling=how) == expected
    assert model.generate(prompts, max_new_tokens=8) == greedy


def test_an_answer_that_is_searched_for_comes_whole(model, prompts):
  how = BeamSearch(3)
  (said,) = model.stream(prompts[0], max_new_tokens=6, sampling=how)
  assert [said] == model.generate(prompts[:1], max_new_tokens=6, sampling=how)


def test_a_stop_text_of_one_row_counts_though_others_have_none(few, prompts, monkeypatch):
  """A turn ends by the template's text where the tokenizer has no symbol for it; a document not."""
  how = BeamSearch(3, length_penalty=2.0)
  (whole,) = few.generate(prompts[:1], max_new_tokens=8, sampling=how, chat=True)
  stop = whole[1:3]
  assert len(stop) == 2
  monkeypatch.setattr(few, "answers", few.answers._replace(stop=(stop,)))
  requests = [few.encode(prompts[0], chat=chat) for chat in (False, True)]
  raw, said = few.generate(requests, max_new_tokens=8, sampling=how)
  assert [raw] == few.generate(requests[:1], max_new_tokens=8, sampling=how)
  assert [said] == few.generate(requests[1:], max_new_tokens=8, sampling=how)
  assert stop not in said


@pytest.mark.parametrize(
  ("how", "message"),
  [
    (BeamSearch(1), "num_beams is 1; it must be from 2 to 64"),
    (BeamSearch(65), "num_beams is 65"),
    (BeamSearch(2, float("nan")), "length_penalty is nan; it must be finite"),
  ],
)
def test_settings_out_of_range(model, how, message):
  with pytest.raises(PromptError, match=message):
    model.generate([["Hi"]], sampling=how)
