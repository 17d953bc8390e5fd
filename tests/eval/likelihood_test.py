# SPDX-License-Identifier: Apache-2.0
"""Packed trees score as each continuation alone, on any mesh; ids are split as in lm-eval."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from mm1_jax.batch import Batch
from mm1_jax.eval import likelihood
from mm1_jax.eval.likelihood import Continuation, continuations, log_likelihoods, rolling
from mm1_jax.eval.task import Likelihood
from mm1_jax.inference.model import Model
from mm1_jax.inference.prompts import PromptError
from mm1_jax.sharding import LAYOUT

pytestmark = pytest.mark.compiles

WORDS = ["the", "quick", "brown", "fox", "finds", "bread", "in", "seven", "small", "houses"]


def alone(model: Model, asked: Continuation) -> Likelihood:
  """Scores one continuation in a row of its own, through the whole vocabulary."""
  ids, images = [*asked.context.ids, *asked.target], np.array(asked.context.images, np.uint8)
  size = model.run.data.seq_len + 1
  row = np.zeros((1, size), np.int32)
  row[0, : len(ids)] = ids
  here = np.arange(size)[None]
  images = np.zeros((1, 4, 16, 16, 3), np.uint8)
  mask = np.zeros((1, 4), bool)
  for i, image in enumerate(asked.context.images):
    images[0, i], mask[0, i] = image, True
  segments = (here < len(ids)).astype(np.int32)
  batch = Batch(row, row, row, here.astype(np.int32), segments, row, images, mask)
  with jax.set_mesh(model.mesh):
    place = NamedSharding(model.mesh, LAYOUT.act_b)
    log_probs = np.asarray(_log_probs(model.params, jax.device_put(batch, place)))[0]
  at = len(asked.context.ids) - 1 + np.arange(len(asked.target))
  greedy = (log_probs[at].argmax(-1) == asked.target).all()
  return Likelihood(log_probs[at, asked.target].sum(), bool(greedy), len(asked.target))


@jax.jit
def _log_probs(params, batch):
  return jax.nn.log_softmax(params.decoder.logits(params(batch, dropless=True).hidden))


def questions(model: Model, pictures: list[bytes], num: int = 12) -> list[Continuation]:
  """Returns continuations of 1 to 9 words after contexts with and without pictures."""
  rng = np.random.default_rng(1)
  asked = []
  for i in range(num):
    context = [*pictures[: i % 3], " ".join(rng.choice(WORDS, rng.integers(1, 20))) + " is"]
    choices = [" " + " ".join(rng.choice(WORDS, rng.integers(1, 10))) for _ in range(1 + i % 4)]
    asked += continuations(model, context, choices)
  return asked


def assert_equal(found: list[Likelihood], expected: list[Likelihood]) -> None:
  assert [f.num_tokens for f in found] == [e.num_tokens for e in expected]
  assert [f.greedy for f in found] == [e.greedy for e in expected]
  np.testing.assert_allclose(
    [f.log_prob for f in found], [e.log_prob for e in expected], rtol=2e-5, atol=2e-4
  )


def test_packed_trees_score_as_each_continuation_alone(model, pictures):
  asked = questions(model, pictures)
  likeliest = _greedy_continuation(model, asked[0])
  asked.insert(5, likeliest)
  found = log_likelihoods(model, asked)
  assert_equal(found, [alone(model, a) for a in asked])
  assert found[5].greedy


def _greedy_continuation(model: Model, asked: Continuation, num: int = 3) -> Continuation:
  """Returns what greedy decoding says after a context."""
  target = ()
  for _ in range(num):
    options = [Continuation(asked.context, (*target, i)) for i in range(4160)]
    scores = [x.log_prob for x in log_likelihoods(model, options)]
    target = options[int(np.argmax(scores))].target
  return Continuation(asked.context, target)


def test_a_mesh_changes_nothing(workdir, model, pictures):
  asked = questions(model, pictures)
  split = Model.load(workdir, data=2, fsdp=2, tensor=2)
  assert_equal(log_likelihoods(split, asked), log_likelihoods(model, asked))
  one = asked[1:2]  # one picture, which two chips share
  assert_equal(log_likelihoods(split, one), log_likelihoods(model, one))


def test_what_is_scored_beside_a_continuation_changes_nothing(model, pictures):
  asked = questions(model, pictures)
  apart = [log_likelihoods(model, [a])[0] for a in asked[:3]]
  assert_equal(log_likelihoods(model, asked[::-1])[::-1][:3], apart)


def test_continuations_of_one_context_share_it(model, pictures, monkeypatch):
  read = []
  lay_out = likelihood._lay_out

  def spy(model, rows, shape):
    read.append(sum(len(tree) for row in rows for tree in row))
    return lay_out(model, rows, shape)

  monkeypatch.setattr(likelihood, "_lay_out", spy)
  asked = continuations(model, [pictures[0], " ".join(WORDS)], [" a fox", " bread", " a house"])
  log_likelihoods(model, asked)
  assert read == [len(asked[0].context.ids) + sum(len(a.target) - 1 for a in asked)]


def test_ids_are_those_of_context_and_text_as_one(model):
  encode = model.tokenizer.encode
  (found,) = continuations(model, ["The answer is "], ["bread"], chat=False)
  assert [*found.context.ids, *found.target] == [
    model.tokenizer.bos_id,
    *encode("The answer is bread"),
  ]
  assert found.context.ids[1:] == encode("The answer is")  # the space counts to the text
  (found,) = continuations(model, [], ["bread"], chat=False)
  assert found.context.ids == [model.tokenizer.bos_id]
  (found,) = continuations(model, [], ["bread"], chat=False, bos=False)
  assert found.context.ids == [model.tokenizer.eos_id]
  (found,) = continuations(model, ["So"], [" it is"], chat=False, bos=False)
  assert [*found.context.ids, *found.target] == encode("So it is")


def test_a_document_without_bos_has_none_in_front_of_pictures_either(model, pictures):
  context = [pictures[0], "It is"]
  (with_bos,) = continuations(model, context, [" bread"], chat=False)
  (without,) = continuations(model, context, [" bread"], chat=False, bos=False)
  assert with_bos.context.ids == [model.tokenizer.bos_id, *without.context.ids]
  assert with_bos.target == without.target


def test_a_conversation_scores_the_assistants_words(model):
  (found,) = continuations(model, ["Is it?"], [" yes"], chat=True)
  record = {
    "turns": [
      {"role": "user", "content": [{"text": "Is it?"}]},
      {"role": "assistant", "content": [{"text": "yes"}]},
    ]
  }
  example = model.encoder.encode_record(record)
  end = len(model.encoder.answer_end)
  trained = np.flatnonzero(example.loss_mask)[:-end]
  assert list(found.target) == example.targets[trained].tolist()
  assert found.context.ids == example.tokens[: trained[0] + 1].tolist()


def test_a_text_of_any_length_is_predicted_once(model):
  text = " ".join(WORDS * 40)
  ids, size = model.tokenizer.encode(text), model.run.data.seq_len
  parts = rolling(model, text)
  assert len(parts) > 2
  assert [i for part in parts for i in part.target] == ids
  assert all(len(p.context.ids) + len(p.target) - 1 <= size for p in parts)
  assert parts[0].context.ids == [model.tokenizer.bos_id]
  assert len(parts[-1].context.ids) + len(parts[-1].target) - 1 == size  # context that fits
  scores = log_likelihoods(model, parts)
  assert sum(s.num_tokens for s in scores) == len(ids)


def test_a_text_is_no_list_of_texts(model):
  with pytest.raises(PromptError, match="texts is ' is'; it must be a list of texts"):
    continuations(model, ["What"], " is")


@pytest.mark.parametrize(
  ("context", "text", "message"),
  [
    (["Is"], "", "no tokens"),
    (["word " * 200], " is", "exceed|positions"),
    ([b"no"], "a", "image"),
  ],
)
def test_what_cannot_be_scored_is_refused(model, context, text, message):
  with pytest.raises(PromptError, match=message):
    continuations(model, context, [text], chat=False)
