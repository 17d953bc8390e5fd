# SPDX-License-Identifier: Apache-2.0
"""No answer is so long or so odd that a metric crashes, or takes long over it."""

import itertools

import metric_cases
import pytest
from metric_cases import OURS, Case

from mm1_jax.eval.metrics import boxes, captions, limits, strings, vqa

LONG = 10_000_000
# Each is repeated: the patterns of some metric could take a time that grows with the square.
REPEATED = [
  "9.",
  "1,",
  "1,000,",
  "<",
  "[1, ",
  "(",
  "a.",
  "A ",
  '"',
  "-",
  "@",
  "a@",
]
REPEATED += [
  'The answer is "',
  "is ",
  "=",
  "\n",
  " ",
  ".",
  ". ",
  "a/",
  "a-",
  "&",
  "_",
  "9a",
  "1e",
  ":(",
]
ODD = [
  "",
  "\x00",
  "\ud800",
  "\udfff\ud800",
  "\u0663\u0664",
  "\u0663.\u0665%",
  "\u2028",
  "İ",
  "ﬀ",
  "K",
  "²",
  "a\ud800. b",
]


def case(reply: str) -> Case:
  return Case(reply, ("yes", "a cat", "7", *["dog"] * 7), ("a cat", "dog", "7", "none"))


@pytest.mark.parametrize(
  "piece", ["a ", "9", "'s", *(pytest.param(piece, marks=pytest.mark.slow) for piece in REPEATED)]
)
def test_ten_million_characters_are_read_as_far_as_stated(piece):
  reply = (piece * (LONG // len(piece) + 1))[:LONG]
  beginning = case(limits.cut(reply))
  for metric, ours in OURS.items():
    assert ours(case(reply)) == ours(beginning), metric
  boxes.parse_boxes(reply)
  captions.rouge_l([reply], [["a cat"]])
  captions.cider_d([reply, "a"], [["a cat"], ["dog"]])
  assert limits.is_cut(reply)


@pytest.mark.parametrize("reply", ODD, ids=ascii)
def test_odd_characters_are_scored(reply):
  for ours in OURS.values():
    ours(case(reply))
  assert vqa.vqa_accuracy(reply, [reply] * 10) == 1
  assert strings.exact_match(reply, [reply], "triviaqa") == 1
  assert boxes.parse_boxes(f"[{reply}]").shape == (0, 4)
  captions.cider_d([reply, reply], [[reply], ["dog"]])


def test_random_pairs_never_crash():
  texts = [*metric_cases.random_strings(3, 60), *ODD]
  for a, b in itertools.product(texts, texts[:20]):
    assert 0 <= strings.anls(a, [b]) <= 1
    assert strings.relaxed_accuracy(a, b) in (0, 1)
