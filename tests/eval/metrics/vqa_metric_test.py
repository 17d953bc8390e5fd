# SPDX-License-Identifier: Apache-2.0
import pytest

from mm1_jax.eval.metrics.vqa import NORMALIZATIONS, normalize, vqa_accuracy


@pytest.mark.parametrize(
  ("text", "normal"),
  [
    ("The dog.", "dog"),
    ("two dogs", "2 dogs"),
    ("none", "0"),
    ("dont know", "don't know"),
    ("somebody'd", "somebodyd"),
    ("red, white and blue", "red white and blue"),
    ("black/white", "black white"),
    ("black /white", "black white"),
    ("1,000 a/b", "1000 ab"),  # a comma between digits: all marks go
    ("3.5 mi.", "3.5 mi"),
    ("a\tb\n", "b"),
  ],
)
def test_normalization(text, normal):
  assert normalize(text) == normal


def test_three_of_ten_people_make_an_answer_right():
  def accuracy(matches, normalization="lmms"):
    truths = ["cat"] * matches + ["dog"] * (10 - matches)
    return vqa_accuracy("cat", truths, normalization)

  assert accuracy(0) == 0
  assert accuracy(1) == pytest.approx(0.3)  # (9 * 1/3 + 0) / 10
  assert accuracy(2) == pytest.approx(0.6)
  assert accuracy(3) == pytest.approx(0.9)
  assert accuracy(4) == accuracy(10) == 1
  assert accuracy(3, "paligemma") == 1
  assert accuracy(2, "paligemma") == pytest.approx(2 / 3)


def test_normalizations_differ_where_they_should():
  def each(answer, truths):
    return {name: round(vqa_accuracy(answer, truths, name), 2) for name in NORMALIZATIONS}

  ten_equal = each("two", ["2"] * 10)
  expected = {"official": 1, "openflamingo": 0, "lmms": 1, "textvqa": 1, "paligemma": 0}
  assert ten_equal == expected
  # The official program leaves articles in the truths.
  articles = each("a dog", ["a dog"] * 9 + ["cat"])
  assert articles == dict.fromkeys(NORMALIZATIONS, 1) | {"official": 0}
  possessive = each("dog s", ["dog's"] * 9 + ["cat"])
  assert possessive == dict.fromkeys(NORMALIZATIONS, 0)
  assert each("Dog", ["dog"] * 9 + ["cat"]) == dict.fromkeys(NORMALIZATIONS, 1)


def test_bad_input_is_named():
  with pytest.raises(ValueError, match="'vqa', not one of"):
    vqa_accuracy("cat", ["cat"], "vqa")
  with pytest.raises(ValueError, match="without truths"):
    vqa_accuracy("cat", [])
