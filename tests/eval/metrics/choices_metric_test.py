# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from mm1_jax.eval.metrics import choices

TEXTS = {"A": "a cat", "B": "two dogs", "C": "rain"}


def test_first_letters():
  assert choices.first_letter(" b. dogs") == "B"
  assert choices.first_letter("  ") is None


@pytest.mark.parametrize(
  ("reply", "letter"),
  [("B", "B"), (" b ", "B"), ("B. dogs", "B"), ("b. dogs", None), ("B dogs", None), ("", None)],
)
def test_scienceqa_takes_a_letter_or_a_letter_and_a_full_stop(reply, letter):
  assert choices.science_qa(reply) == letter


@pytest.mark.parametrize(
  ("reply", "letter"),
  [
    ("B", "B"),
    ("The answer is B", "B"),
    ("(C)", "C"),
    ("B.", "B"),
    ("A or B", None),
    ("A dog is in the rain", "C"),  # A is an article
    ("Two Dogs", "B"),
    ("two dogs and a cat", None),
    ("", None),
  ],
)
def test_mmbench_infers_letters_and_texts(reply, letter):
  assert choices.can_infer(reply, TEXTS) == letter


def test_circular_accuracy_wants_every_rotation():
  assert choices.circular([[True, True], [True, False], [False]]).tolist() == [1, 0, 0]
  with pytest.raises(ValueError, match="no rotations"):
    choices.circular([[True], []])


@pytest.mark.parametrize(
  ("reply", "letter"),
  [
    ("(A) or rather (C)", "C"),
    ("It is B but A is near", "A"),
    ("B.", "B"),
    ("I believe it must be two dogs then", "B"),
  ],
)
def test_mmmu_takes_the_last_letter(reply, letter):
  assert choices.mmmu_choice(reply, list(TEXTS.values()), np.random.default_rng(0)) == letter


def test_mmmu_guesses_repeatably():
  def guesses(seed):
    random = np.random.default_rng(seed)
    return [choices.mmmu_choice("?", ["x", "y", "z"], random) for _ in range(20)]

  assert guesses(1) == guesses(1) != guesses(2)
  assert set(guesses(1)) == {"A", "B", "C"}


def test_mmmu_finds_open_answers_at_the_end_of_lines():
  assert choices.mmmu_open("First so.\nThe answer is 1,234.567") == [1234.57, 1234.0, 234.57]
  assert choices.mmmu_open_accuracy("The result is 5 m", ["5"]) == 1
  assert choices.mmmu_open_accuracy("x = 3.14159", ["3.14"]) == 1
  assert choices.mmmu_open_accuracy("It is the Red Cross", ["red cross"]) == 1
  assert choices.mmmu_open_accuracy("banana", ["a"]) == 0  # a single letter needs a space
  assert choices.mmmu_open_accuracy("", ["5"]) == 0
