# SPDX-License-Identifier: Apache-2.0
"""Packed trees score as each continuation alone, on any mesh; ids are split as lm-eval splits them."""

import jax
import jax.numpy as jnp
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

WORDS = "the quick brown fox jumps over a lazy dog and finds bread in seven small houses".split()


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
    options = [Continuation(asked.context, (*target, i)) for i in range(16, 4096)]
    scores = [x.log_prob for x in log_likelihoods(model, options)]
    target = options[int(np.argmax(scores))].target
  return Continuation(asked.context, target)
