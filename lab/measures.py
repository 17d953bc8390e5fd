# SPDX-License-Identifier: Apache-2.0
"""What runs are measured at: functions of a model that return a value for each held-out item.

The items of a measure are the same for all runs, so differences are paired. Accuracy is that of
teacher-forced greedy answers, or of the likeliest of some answers where a run may not know their
form; `text` is nats per token.
"""

from collections.abc import Sequence

import numpy as np

from lab import documents
from lab.documents import AskedStrings, Bound, Document, Named, Pairs, Prose, Strings, Themed, bare
from lab.pictures import KINDS
from lab.stream import items
from mm1_jax.eval.likelihood import Continuation, log_likelihoods
from mm1_jax.inference.model import Model
from mm1_jax.inference.prompts import Request

ITEMS = 400
SEED = 10**6  # of held-out items; training's seeds are below


def ask(model: Model, context: Document, answers: Sequence[str]) -> list[Continuation]:
  """Returns answers as continuations of a document."""
  ids, images = model.encoder.encode_prefix(items(context))
  request = Request(ids, images, chat=False)
  return [Continuation(request, tuple(model.tokenizer.encode(answer))) for answer in answers]


def greedy(model: Model, asked: Sequence[tuple[Document, str]]) -> np.ndarray:
  """Returns 1 where each token of the answer is the likeliest after those before it."""
  continuations = [c for context, answer in asked for c in ask(model, context, [answer])]
  return np.array([float(x.greedy) for x in log_likelihoods(model, continuations)])


def choice(model: Model, asked: Sequence[tuple[Document, Sequence[str], str]]) -> np.ndarray:
  """Returns 1 where the right one of some answers is the likeliest."""
  continuations = [c for context, answers, _ in asked for c in ask(model, context, answers)]
  scores = iter(log_likelihoods(model, continuations))
  found = []
  for _, answers, right in asked:
    likelihoods = [next(scores).log_prob for _ in answers]
    found.append(float(answers[int(np.argmax(likelihoods))] == right))
  return np.array(found)


def draws(stream, model: Model, side: str = "heldout", num: int = ITEMS) -> list[Document]:
  """Returns documents that are the same for every model, but for the size of their pictures."""
  pixels = model.run.model.vision.image_size[0]
  return [stream.draw(np.random.default_rng([SEED, i]), pixels, side) for i in range(num)]


def strings(model: Model, *, other: bool = False) -> np.ndarray:
  """Returns the share of digits of each string that are right; `other`: with the next picture."""
  drawn = draws(Strings(), model)
  shown = [d[0] for d in drawn]
  if other:
    shown = shown[1:] + shown[:1]
  return _digits(
    model, [([image], digits) for image, (_, *digits) in zip(shown, drawn, strict=True)]
  )


def answered_strings(model: Model) -> np.ndarray:
  """Returns the share of digits that are right in the answer to a question."""
  drawn = draws(AskedStrings(), model)
  return _digits(model, [(document[:2], document[2:]) for document in drawn])


def _digits(model: Model, asked: Sequence[tuple[Document, Sequence[str]]]) -> np.ndarray:
  """Returns the share of each answer's digits that are right after those before them."""
  each = [
    ([*context, *digits[:i]], digits[i]) for context, digits in asked for i in range(len(digits))
  ]
  return greedy(model, each).reshape(len(asked), -1).mean(axis=1)


def number(model: Model) -> np.ndarray:
  """Returns where a digit in ink is read right, its ink given."""
  named = draws(Named(digits=1.0), model)
  asked = [([image, name[:-2]], name[-2:]) for image, name in named]
  return greedy(model, asked)


def kind(model: Model, *, other: bool = False) -> np.ndarray:
  """Returns where the kind of a thing, in a look not seen, is the likeliest of all kinds."""
  named = draws(Named(digits=0.0), model)
  shown = [image for image, _ in named]
  if other:
    shown = shown[1:] + shown[:1]
  kinds = [f"{bare(k)}:" for k in KINDS]
  asked = [
    ([image], kinds, name[: name.index(":") + 1])
    for image, (_, name) in zip(shown, named, strict=True)
  ]
  return choice(model, asked)


def zero_shot(model: Model) -> np.ndarray:
  """Returns where the kind of a thing in a look not seen is the likeliest caption of all kinds."""
  kinds = [bare(k) for k in KINDS]
  named = draws(Named(digits=0.0), model)
  asked = [([image], kinds, name[: name.index(":")]) for image, name in named]
  return choice(model, asked)


def few_shot(model: Model, shots: int) -> np.ndarray:
  """Returns where a digit in ink not seen is answered right after so many shots of one theme.

  The theme is one of four, so without shots it can only be guessed.
  """
  drawn = draws(Themed(shots=max(shots, 1), prose=False, digit=True), model)
  return greedy(model, [(d[-2 * shots - 2 : -1], d[-1]) for d in drawn])


def bound(model: Model, shots: int, *, novel: bool = True, num: int = ITEMS) -> np.ndarray:
  """Returns where the letter of a picture's class follows from a document of so many shots.

  Two classes, so chance is a half, also at no shots.
  """
  asked = []
  stream = Bound(shots=max(shots, 2), equal=True, novel=novel, prose=False)
  for document in draws(stream, model, num=num):
    *context, letter = document
    context = context if shots else context[-1:]
    asked.append((context, sorted({*document[1::2]}), letter))
  return choice(model, asked)


def pairs(model: Model, *, ways: int = 4, shots: int = 12) -> np.ndarray:
  """Returns where a word's letter follows from the text before it; chance is 1 / ways."""
  asked = []
  for document in draws(Pairs(ways=ways, shots=shots, equal=True), model):
    *context, letter = document
    asked.append((context, sorted({*document[1::2]}), letter))
  return choice(model, asked)


def recall(model: Model, *, num: int = 960) -> np.ndarray:
  """Returns where a fact that was trained on is said right, to the last letter."""
  return greedy(model, [(documents.fact(2 * i)[:1], documents.fact(2 * i)[1]) for i in range(num)])


def text(model: Model, *, num: int = 150) -> np.ndarray:
  """Returns nats per token of passages of held-out textbooks."""
  continuations = []
  for (passage,) in draws(Prose(characters=240), model, num=num):
    ids = tuple(model.tokenizer.encode(passage)[: model.run.data.seq_len])
    continuations.append(Continuation(Request([model.tokenizer.bos_id], [], chat=False), ids))
  return np.array([-x.log_prob / x.num_tokens for x in log_likelihoods(model, continuations)])
