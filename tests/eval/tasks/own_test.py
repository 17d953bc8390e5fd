# SPDX-License-Identifier: Apache-2.0
"""A JSON-lines file of one's own is a task."""

import json

import numpy as np
import pytest
from etils import epath

from mm1_jax.config import UserError
from mm1_jax.eval import tasks
from mm1_jax.eval.task import EvalError, Likelihood
from tests.helpers import fuzz


@pytest.fixture
def own(tmp_path):
  """Returns a function from rows to the task of their file, and its items."""

  def make(*rows):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tasks.get_task(str(path))
    return task, tasks.read_items(task, tmp_path)

  return make


def test_captions(own, tmp_path):
  rows = [
    {"id": f"coco/{i}", "source": "coco", "image": f"images/{i}.jpg", "captions": captions}
    for i, captions in enumerate(
      [["A man rides.", "A man on a horse."], ["Two red cups.", "Cups."]]
    )
  ]
  task, items = own(*rows)
  assert items[0].pictures == (epath.Path(tmp_path) / "images/0.jpg",)
  assert list(task.forms) == ["mm1", "openflamingo", "sft"]
  assert task.demonstrations == "all"
  assert task.score
  assert task.score(items, ["A man rides.", "Two red cups."]).values["cider_ptb"].mean > 50


def test_true_or_false(own):
  """NLVR's form."""
  rows = [
    {"id": str(i), "image": "a.png", "question": "It is blue.", "choices": ["True", "False"]}
    | {"answer": answer}
    for i, answer in enumerate(("True", "False"))
  ]
  task, items = own(*rows)
  assert [item.right for item in items] == [0, 1]
  assert list(task.forms) == ["mm1", "openflamingo", "sft", "text"]
  options = task.forms["text"].options
  assert options
  context = [*items[0].pictures, "\nQuestion: It is blue.\nAnswer:"]
  assert options(items[0]) == [(context, " True"), (context, " False")]
  assert task.score
  replies = ["True", "The answer is False."]
  np.testing.assert_array_equal(task.score(items, replies).per_item, [1, 1])
  compared = [(Likelihood(-1, True, 1), Likelihood(-2, False, 1))] * 2
  np.testing.assert_array_equal(task.score(items, compared).per_item, [1, 0])


def test_questions_with_and_without_choices(own):
  """MATH-Vision's form: the answer is a letter; parts of the one picture have places, too."""
  task, items = own(
    {"id": "1", "image": "a.jpg", "question": "How many?\n<image>", "choices": [], "answer": "60"},
    {
      "id": "2",
      "image": "b.jpg",
      "question": "Which?\n<image1>\n<image2>",
      "choices": ["10:00", "2:30"],
      "answer": "B",
    },
  )
  assert [item.question for item in items] == ["How many?\n<image>", "Which?\n<image>"]
  assert items[1].answers == ("2:30",)
  prompt = task.forms["mm1"].prompt(items[0])
  assert prompt == ["Question:How many?\n", items[0].pictures[0], " Short answer:"]
  assert task.forms["sft"].prompt(items[1])[2] == (
    "\nA. 10:00\nB. 2:30\nAnswer with the option's letter from the given choices directly."
  )
  assert task.score
  np.testing.assert_array_equal(task.score(items, ["60.", "(B)"]).per_item, [1, 1])
  np.testing.assert_array_equal(task.score(items, ["-60", "2:30"]).per_item, [0, 1])


def test_rows_for_fine_tuning(own):
  """VQA-RAD in LLaVA's form: questions with one answer each, told by type too."""
  task, items = own(
    {
      "id": "vqarad/1",
      "images": ["images/a.jpg"],
      "type": "yesno",
      "conversations": [{"from": "human", "value": "<image>\nIs it?"}],
      "question": "Is it?",
      "answer": "No",
    },
    {"id": "vqarad/2", "images": ["b.jpg"], "type": "open", "question": "Where?", "answer": "Left"},
  )
  assert task.score
  values = task.score(items, ["no", "right"]).values
  means = {name: value.mean for name, value in values.items()}
  assert means == {"accuracy": 0.5, "accuracy/open": 0.0, "accuracy/yesno": 1.0}


def test_text_alone_is_compared_by_likelihood_first(own):
  row = {"question": "Why?", "choices": ["a", "b"], "answer": "b", "answer_index": 1}
  task, items = own(row)
  assert list(task.forms) == ["text", "sft"]
  options = task.forms["text"].options
  assert options
  assert options(items[0]) == [
    (["Question: Why?\nAnswer:"], " a"),
    (["Question: Why?\nAnswer:"], " b"),
  ]


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ([{"image": "../a.jpg", "captions": ["a"]}], "entry 1: the picture '../a.jpg' is not in"),
    ([{"id": "7", "question": "?"}], "entry 1: it has none of captions, answers, answer"),
    ([{"question": "?", "choices": ["a", "b"], "answer": "c"}], "the answer 'c' is none of the"),
    ([{"question": "?", "choices": ["a"], "answer_index": 1}], "entry 1 is not of the form"),
    ([{"captions": ["a"]}], "item '0' has neither a question nor a picture"),
    (
      [{"image": "a.jpg", "captions": ["a"]}, {"question": "?", "answer": "b"}],
      "item '1' has a question, and '0' has none",
    ),
  ],
)
def test_damage_is_told(rows, message, own):
  with pytest.raises(EvalError, match=message):
    own(*rows)


def test_a_file_that_is_not_there(tmp_path):
  with pytest.raises(EvalError, match=r"none.jsonl' is not there"):
    tasks.get_task(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
  "row",
  [
    {"id": "1", "image": "a.jpg", "captions": ["A cat.", "A cat on a mat."]},
    {"id": "2", "images": ["a.jpg", "b.jpg"], "question": "<image>?", "answer": "two", "level": 3},
    {"id": "3", "image": "a.jpg", "question": "?", "answers": ["two", "2"], "source": "x"},
    {"id": "4", "question": "?", "choices": ["cat", "dog"], "answer": "dog", "type": "y"},
  ],
)
def test_changed_lines_by_seed(tmp_path, row):
  def read(data: bytes) -> None:
    (tmp_path / "own.jsonl").write_bytes(data)
    task = tasks.get_task(str(tmp_path / "own.jsonl"))
    assert task.score
    task.score(items := tasks.read_items(task, tmp_path), ["two"] * len(items))

  cases = fuzz.mutations(json.dumps(row).encode(), 200, seed=0)
  assert fuzz.strays(cases, read, UserError) == []
