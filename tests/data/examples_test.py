# SPDX-License-Identifier: Apache-2.0
"""Ids, targets and loss masks, written out by hand."""

import numpy as np
import pytest

from mm1_jax.data.examples import Encoder, Span, cut
from tests.helpers.records import conversation, document, items

BOS, EOS, IMG, START, END = 1, 2, 4, 5, 6


@pytest.fixture
def encoder(tokenizer):
  return Encoder(tokenizer, tokens_per_image=2)


def test_document_with_images(encoder, tokenizer):
  (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
  example = encoder.encode_record(document("x", "a", b"one", b"two", "b"))
  # a is predicted from <s>, b from the second picture's end; pictures are not predicted.
  assert example.tokens.tolist() == [BOS, a, START, IMG, IMG, END, START, IMG, IMG, END, b]
  assert example.targets.tolist() == [a, START, IMG, IMG, END, START, IMG, IMG, END, b, EOS]
  assert example.loss_mask.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
  assert example.images == (b"one", b"two")
  assert example.spans == (Span(2, 6), Span(6, 10))
  assert example.tokens.dtype == example.targets.dtype == np.int32
  assert example.loss_mask.dtype == np.float32


def test_without_delimiters(tokenizer):
  (a,) = tokenizer.encode("a")
  encoder = Encoder(tokenizer, tokens_per_image=2, image_delimiters=False)
  example = encoder.encode_record(document("x", b"one", b"two", "a"))
  assert example.tokens.tolist() == [BOS, IMG, IMG, IMG, IMG, a]
  assert example.loss_mask.tolist() == [0, 0, 0, 0, 1, 1]
  assert example.spans == (Span(1, 3), Span(3, 5))


def test_image_symbols_in_a_text_are_text(encoder, tokenizer):
  example = encoder.encode_record(document("x", "<image_start><image><image_end></s>"))
  assert not tokenizer.special_ids.intersection(example.tokens[1:].tolist())
  assert example.spans == ()
  assert example.loss_mask.all()
  assert tokenizer.decode(example.tokens) == "<image_start><image><image_end></s>"


def test_conversation_of_two_turns(encoder, tokenizer):
  """Loss on the answers and their ends; a picture as the third item of the second question."""
  user, assistant, newline = (tokenizer.encode(t) for t in ("USER:", "ASSISTANT:", "\n"))
  hi, ho = tokenizer.encode(" a"), tokenizer.encode(" b")
  one, two, yes = tokenizer.encode(" c"), tokenizer.encode("d"), tokenizer.encode(" e")
  record = conversation("x", ["a"], ["b"], ["c", "d", b"jpeg"], ["e"])
  example = encoder.encode_record(record)
  parts = [  # ids, and whether each is to be predicted
    ([BOS], 0),
    (user + hi + newline, 0),
    (assistant, 0),
    ([*ho, EOS], 1),
    (user + one + two + [START, IMG, IMG, END] + newline, 0),
    (assistant, 0),
    ([*yes, EOS], 1),
  ]
  ids = [i for part, _ in parts for i in part]
  predict = [p for part, p in parts for _ in part]
  assert example.tokens.tolist() == ids[:-1]
  assert example.targets.tolist() == ids[1:]
  assert example.loss_mask.tolist() == predict[1:]
  assert example.images == (b"jpeg",)


@pytest.mark.parametrize("answer", ["True", " two spaces", "", "x\ny"])
def test_prompt_and_answer_have_the_ids_of_training(encoder, answer):
  turns = conversation("x", [b"jpeg", "What?"], ["That."], ["And", b"png"], [answer])["turns"]
  prompt = encoder.encode_prompt(turns[:-1])
  example = encoder.encode_record({"turns": turns})
  ids = [BOS, *example.targets.tolist()]
  assert prompt.ids + encoder.encode_answer(items(answer)) == ids
  assert prompt.images == [b"jpeg", b"png"]
  assert example.loss_mask[: len(prompt.ids) - 1].sum() == len(
    encoder.encode_answer(items("That."))
  )
  assert example.loss_mask[len(prompt.ids) - 1 :].all()


def test_prefix_has_the_ids_of_training(encoder):
  prefix = encoder.encode_prefix(items(b"jpeg", "A photo of"))
  example = encoder.encode_record(document("x", b"jpeg", "A photo of"))
  assert [*prefix.ids, EOS] == [BOS, *example.targets.tolist()]


def test_images_in_an_answer_are_not_predicted(encoder):
  example = encoder.encode_record(conversation("x", ["draw"], ["here", b"jpeg"]))
  assert not example.loss_mask[np.isin(example.targets, [IMG, START, END])].any()
  assert example.loss_mask[-1] == 1  # its end is


def test_cut_loses_nothing(encoder):
  example = encoder.encode_record(document("x", "a b c d", b"one", "e f", b"two", "g"))
  first, second = example.spans
  parts = [
    cut(example, start, stop)
    for start, stop in [(0, 2), (2, first.start), (first.start, second.stop), (second.stop, None)]
    for stop in [stop or len(example)]
  ]
  for field in ("tokens", "targets", "loss_mask"):
    joined = np.concatenate([getattr(part, field) for part in parts])
    np.testing.assert_array_equal(joined, getattr(example, field))
  assert [part.images for part in parts] == [(), (), (b"one", b"two"), ()]
  assert parts[2].spans[0] == Span(0, 4)
  assert cut(example, 0, len(example)).spans == example.spans


def test_cut_through_a_picture_is_refused(encoder):
  example = encoder.encode_record(document("x", "a", b"one"))
  span = example.spans[0]
  for at in range(span.start + 1, span.stop):
    with pytest.raises(ValueError, match="cut through a picture"):
      cut(example, 0, at)
    with pytest.raises(ValueError, match="cut through a picture"):
      cut(example, at, len(example))
