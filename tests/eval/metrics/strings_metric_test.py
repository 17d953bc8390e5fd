# SPDX-License-Identifier: Apache-2.0
import pytest

from mm1_jax.eval.metrics import strings


@pytest.mark.parametrize(
  ("a", "b", "distance"),
  [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("abc", "abc", 0), ("flaw", "lawn", 2)],
)
def test_edit_distance(a, b, distance):
  assert strings.edit_distance(a, b) == strings.edit_distance(b, a) == distance


def test_anls_is_the_nearest_truths_similarity():
  assert strings.anls("Hello  World", ["x", "hello world"]) == 1
  assert strings.anls("hello", ["hallo"]) == pytest.approx(0.8)
  assert strings.anls("he", ["hello"]) == 0  # 0.4 is below the threshold
  assert strings.anls("he", ["hello"], threshold=0.3) == pytest.approx(0.4)
  assert strings.anls("ab", ["abcd"]) == 0.5
  assert strings.anls("", ["yes"]) == strings.anls(" " * 1000, ["yes"]) == 0
  with pytest.raises(ValueError, match="without truths"):
    strings.anls("a", [])


@pytest.mark.parametrize(
  ("answer", "truth", "right"),
  [
    ("104", "100", 1),
    ("105", "100", 1),
    ("105.1", "100", 0),
    ("5%", "0.05", 1),
    ("-100", "100", 0),
    ("0.01", "0", 0),
    ("0", "0", 1),
    ("0.0", "0", 0),
    ("Blue", "blue", 1),
    ("nan", "5", 0),
    ("inf", "inf", 0),
  ],
)
def test_relaxed_accuracy(answer, truth, right):
  assert strings.relaxed_accuracy(answer, truth) == right


def test_exact_matches():
  assert strings.exact_match("The U.S.", ["the us"]) == 1
  assert strings.exact_match("the us", ["us"]) == 0
  assert strings.exact_match("The U.S.", ["u s"], "triviaqa") == 1
  assert strings.exact_match("the_cat", ["CAT"], "triviaqa") == 1
  assert strings.exact_match("Cat", ["cat"], "exact") == 0
  with pytest.raises(ValueError, match="'squad', not one of"):
    strings.exact_match("a", ["a"], "squad")


def test_mathvista_reads_letters_numbers_and_quotes():
  choices = ["circle", "square", "triangle"]
  assert strings.math_vista_extract('So. The answer is "squares".', choices, "text") == "squares"
  assert strings.math_vista_normalize("squares", choices, "text") == "square"
  assert strings.math_vista_normalize("(c) triangle", choices, "text") == "triangle"
  assert strings.math_vista_normalize("B", choices, "text") == "square"
  assert strings.math_vista_extract(" 7 ", [], "integer") == "7"
  assert strings.math_vista_normalize("7.9", [], "integer") == "7"
  assert strings.math_vista_normalize("1.257", [], "float", 2.0) == "1.26"
  assert strings.math_vista_normalize("seven", [], "integer") is None
  assert strings.math_vista_normalize("inf", [], "integer") is None
