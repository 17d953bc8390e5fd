# SPDX-License-Identifier: Apache-2.0
import pytest

from mm1_jax.eval.metrics import yes_no


def test_pope_counts_what_is_no_answer():
  answers = ["yes", "Yes ", "no", "yes", "maybe", "No, it is not"]
  truths = ["yes", "no", "no", "yes", "yes", "no"]
  assert yes_no.pope(answers, truths) == {
    "accuracy": 0.5,
    "precision": pytest.approx(2 / 3),
    "recall": pytest.approx(2 / 3),
    "f1": pytest.approx(2 / 3),
    "yes_share": 0.5,
    "neither": 2,
  }
  assert yes_no.pope(answers, truths, "by_word")["neither"] == 1


def test_pope_without_a_yes_is_zero():
  scores = yes_no.pope(["no"] * 4, ["yes", "no"] * 2)
  assert [scores[k] for k in ("accuracy", "precision", "recall", "f1")] == [0.5, 0, 0, 0]


def test_mme_adds_questions_and_pictures():
  answers = ["yes", "No.", "yes", "yes", "n", "Yes"]
  truths = ["Yes", "No", "Yes", "No", "No", "Yes"]
  categories = ["OCR"] * 4 + ["code_reasoning"] * 2
  scores = yes_no.mme(answers, truths, categories, ["1", "1", "2", "2", "1", "1"])
  assert scores["OCR/accuracy"] == 75
  assert scores["OCR/accuracy+"] == 50
  assert scores["OCR"] == scores["perception"] == 125
  assert scores["cognition"] == 200
  assert scores["neither"] == 0


@pytest.mark.parametrize(
  ("truths", "categories", "pictures", "message"),
  [
    (["yes"], ["OCR"], ["1"], "1 of OCR has 1 questions"),
    (["yes", "no"], ["OCR", "OCR"], ["1", "2"], "has 1 questions"),
    (["yes", "no"], ["OCR", "ocr"], ["1", "1"], "'ocr' is no category"),
    (["yes", "perhaps"], ["OCR", "OCR"], ["1", "1"], "'perhaps'"),
    (["yes", "no"], ["OCR"], ["1", "1"], "lengths"),
  ],
)
def test_bad_mme_is_named(truths, categories, pictures, message):
  with pytest.raises(ValueError, match=message):
    yes_no.mme(["yes"] * len(truths), truths, categories, pictures)


def test_bad_pope_is_named():
  with pytest.raises(ValueError, match="2 for 1"):
    yes_no.pope(["yes", "no"], ["yes"])
  with pytest.raises(ValueError, match="'both'"):
    yes_no.pope(["yes"], ["both"])
