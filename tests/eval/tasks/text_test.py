# SPDX-License-Identifier: Apache-2.0
"""Text tasks: contexts and continuations are lm-eval's, and so are scores."""

import json

import numpy as np
import pytest

from mm1_jax.eval import tasks
from mm1_jax.eval.task import EvalError, Likelihood
from mm1_jax.eval.tasks import text

CAR = [" heavy", " fast", " red", " old"]
RIDE = "Question: What is a car?\nAnswer:"
SUPPORT = "Light is fast.\nQuestion: What is fast?\nAnswer:"


@pytest.mark.parametrize(
  ("name", "number", "contexts", "continuations", "right"),
  [
    ("arc_easy", 0, [RIDE] * 4, CAR, 1),
    ("arc_challenge", 1, [RIDE] * 4, CAR, 2),
    ("openbookqa", 0, ["What is a car?"] * 4, CAR, 1),
    (
      "piqa",
      1,
      ["Question: Dry a shoe\nAnswer:"] * 2,
      [" in the fridge", " in the sun"],
      1,
    ),
    (
      "social_iqa",
      0,
      ["Q: Tracy didn't go home. What does Tracy need to do before this?\nA:"] * 3,
      [" make a plan", " Go home", " Find somewhere"],
      2,
    ),
    (
      "hellaswag",
      0,
      ["Roof shingle removal: How to. A man is on a roof. He"] * 4,
      [" sleeps now.", " is ripping.", " is rappelling.", " starts. pulling."],
      3,
    ),
    (
      "winogrande",
      1,
      ["Sarah was better than Maria so Sarah", "Sarah was better than Maria so Maria"],
      [" always got the easier cases."] * 2,
      1,
    ),
    (
      "boolq",
      1,
      ["It is green.\nQuestion: is it red?\nAnswer:"] * 2,
      [" no", " yes"],
      1,
    ),
    ("lambada", 0, ["He took out his gun and aimed at "], [" Megan"], -1),
    ("lambada", 1, ["She said\nyes,"], [" Will"], -1),
    ("sciq", 0, [SUPPORT] * 4, [" tree", " sand", " stone", " light"], 3),
    (
      "sciq",
      1,
      ["\nQuestion: What is fast?\nAnswer:"] * 4,
      [" tree", " sand", " stone", " light"],
      3,
    ),
    (
      "webqs",
      0,
      ["Question: what does jamaica speak?\nAnswer:"],
      [" Jamaican English"],  # the other one begins with it
      -1,
    ),
    ("webqs", 1, ["Question: who is it?\nAnswer:"] * 2, [" 1972", ' Mc "Q"'], -1),
  ],
)
def test_requests_are_those_of_lm_eval(name, number, contexts, continuations, right, items):
  item = items(name)[number]
  options = tasks.get_task(name).forms["text"].options
  assert options
  assert options(item) == [([c], t) for c, t in zip(contexts, continuations, strict=True)]
  assert item.right == right


@pytest.mark.parametrize(
  ("name", "question", "choices", "contexts", "continuations"),
  [
    ("arc_easy", "Why?", ["a", "b"], ["Question: Why?\nAnswer:"] * 2, [" a", " b"]),
    ("piqa", "Why?", ["a", "b"], ["Question: Why?\nAnswer:"] * 2, [" a", " b"]),
    ("boolq", "is it?", ["true", "false"], ["Question: is it?\nAnswer:"] * 2, [" true", " false"]),
    ("social_iqa", "He ran. Why?", ["a", "b"], ["Q: He ran. Why?\nA:"] * 2, [" a", " b"]),
    ("openbookqa", "Fog is in", ["a", "b"], ["Fog is in"] * 2, [" a", " b"]),
    ("sciq", "Why?", ["a", "b"], ["Question: Why?\nAnswer:"] * 2, [" a", " b"]),
    ("hellaswag", "He", ["a", "b"], ["He"] * 2, [" a", " b"]),
    ("winogrande", "So _ got it.", ["a", "b"], ["So a", "So b"], [" got it."] * 2),
  ],
)
def test_plain_json_lines(name, question, choices, contexts, continuations, tmp_path):
  task = tasks.get_task(name)
  row = {"id": f"{name}/0", "question": question, "choices": choices}
  names = {"arc_easy": "arc-easy", "social_iqa": "social_i_qa"}
  path = tmp_path / f"{names.get(name, name)}.jsonl"
  path.write_text(json.dumps({**row, "answer": choices[1], "answer_index": 1}) + "\n")
  (item,) = tasks.read_items(task, tmp_path)
  assert (item.id, item.right, item.answers) == (f"{name}/0", 1, (choices[1],))
  options = task.forms["text"].options
  assert options
  assert options(item) == [([c], t) for c, t in zip(contexts, continuations, strict=True)]


def likelihoods(*log_probs: float) -> tuple[Likelihood, ...]:
  return tuple(Likelihood(log_prob, False, 2) for log_prob in log_probs)


def test_choices_are_compared_by_sum_characters_and_bytes():
  items = [
    text.choice_item("0", "?", ["ab", "abcd"], 1),
    text.choice_item("1", "?", ["éé", "abc"], 0),
    text.choice_item("2", "?", ["same", "same"], 1),
  ]
  replies = [likelihoods(-3, -4), likelihoods(-4, -4.5), likelihoods(-1, -1)]
  scores = text.choice_score(items, replies)
  # Sums: 0, 0, 0. A character: -1.5 -1, -2 -1.5. A byte: -1.5 -1, -1 -1.5. Ties go to the first.
  means = {name: value.mean * 3 for name, value in scores.values.items()}
  assert means == pytest.approx({"acc": 1, "acc_norm": 1, "acc_bytes": 2})
  np.testing.assert_array_equal(scores.per_item, [0, 1, 0])


def test_lambada_is_greedy_accuracy_and_perplexity(items):
  replies = [(Likelihood(-1.0, True, 1),), (Likelihood(-3.0, False, 2),)]
  scores = text.lambada_score(items("lambada"), replies)
  assert scores.values["acc"].mean == 0.5
  assert scores.values["perplexity"].mean == pytest.approx(np.exp(2))
  assert scores.values["perplexity"].standard_error > 0


def test_webqs_counts_any_accepted_answer(items):
  replies = [(Likelihood(-9.0, True, 1),), (Likelihood(-1.0, False, 1), Likelihood(-8.0, True, 1))]
  assert text.webqs_score(items("webqs"), replies).values["exact_match"].mean == 1.0


def test_triviaqa_accepts_aliases(items):
  score = tasks.get_task("triviaqa").score
  assert score
  scores = score(items("triviaqa"), [" harry SINCLAIR lewis", "york"])
  np.testing.assert_array_equal(scores.per_item, [1, 0])
  # Punctuation is removed, and makes no space.
  scores = score(items("triviaqa"), ["sinclair-lewis", "New York!"])
  np.testing.assert_array_equal(scores.per_item, [0, 1])


def test_labels_must_fit_their_questions(official):
  folder = official("piqa")
  (folder / "valid-labels.lst").write_text("0\n")
  with pytest.raises(EvalError, match=r"valid-labels.lst' has 1 labels for the 2 rows of"):
    tasks.read_items(tasks.get_task("piqa"), folder)
  (folder / "valid-labels.lst").unlink()
  with pytest.raises(EvalError, match=r"valid.jsonl', entry 1 is not .* \(it has no 'label'\)"):
    tasks.read_items(tasks.get_task("piqa"), folder)


def test_a_label_beyond_the_choices(official):
  folder = official("piqa")
  (folder / "valid-labels.lst").write_text("0\n2\n")
  with pytest.raises(EvalError, match="entry 2: the right choice is number 2 of 2"):
    tasks.read_items(tasks.get_task("piqa"), folder)
