# SPDX-License-Identifier: Apache-2.0
"""The shipped sample's held-out shards as tasks."""

import pathlib

import numpy as np
import pytest

import mm1_jax
from mm1_jax.data.sources import write_shards
from mm1_jax.eval import tasks
from mm1_jax.eval.task import EvalError, Likelihood

SAMPLE = pathlib.Path(mm1_jax.__file__).parent / "data" / "sample"


def test_captions_are_pictures_to_caption():
  task = tasks.get_task("records:captions")
  items = tasks.read_items(task, SAMPLE)
  assert len(items) > 300
  assert all(len(item.pictures) == 1 and item.answers[0] for item in items)
  assert task.forms["mm1"].prompt(items[0]) == [items[0].pictures[0]]
  assert task.score is not None
  scores = task.score(items, [item.answers[0] for item in items])
  assert scores.values["cider_ptb"].mean > 500
  train = tasks.read_items(task, SAMPLE, "train")
  assert not {item.id for item in train} & {item.id for item in items}


def test_conversations_are_asked_their_questions():
  task = tasks.get_task("records:sft")
  items = tasks.read_items(task, SAMPLE)
  assert {item.details["kind"] for item in items} == {"answers"}
  with_picture = next(item for item in items if item.pictures)
  content = task.forms["sft"].prompt(with_picture)
  assert with_picture.pictures[0] in content
  assert with_picture.question == "".join(part for part in content if isinstance(part, str))
  assert task.score is not None
  wrong = [f"{item.answers[0].upper()}." if i % 2 else "" for i, item in enumerate(items)]
  scores = task.score(items, wrong)
  np.testing.assert_array_equal(scores.per_item, np.arange(len(items)) % 2)
  by_source = {name for name in scores.values if "/" in name}
  assert by_source == {f"exact_match/{item.details['source']}" for item in items}
  assert scores.counts["empty"] == (len(items) + 1) // 2


def test_each_question_of_a_conversation_is_asked_by_itself(tmp_path):
  def turn(role, *parts):
    return {"role": role, "content": [{kind: value} for kind, value in parts]}

  record = {
    "id": "7",
    "source": "zoo",
    "asks": ["kind", "colour"],
    "turns": [
      turn("system", ("text", "Be brief.")),
      turn("user", ("image", b"a"), ("text", "What is it?")),
      turn("assistant", ("text", "A cat")),
      turn("user", ("text", "Its colour?")),
      turn("assistant", ("text", "black")),
    ],
  }
  write_shards([record], str(tmp_path / "talk-heldout"), 1)
  first, second = tasks.read_items(tasks.get_task("records:talk"), tmp_path)
  assert (first.id, second.id) == ("7/1", "7/2")
  assert (first.details["source"], second.details["source"]) == ("kind", "colour")
  prompt = tasks.get_task("records:talk").forms["sft"].prompt
  assert prompt(first) == [b"a", "What is it?"]
  assert prompt(second) == [b"a", "Its colour?"]
  assert (first.answers, second.answers) == (("A cat",), ("black",))
  demonstration = tasks.get_task("records:talk").forms["mm1"].demonstration
  assert demonstration is not None
  assert demonstration(first) == " A cat\n"


def test_true_texts_are_scored_in_nats_per_token():
  task = tasks.get_task("records:sft")
  items = tasks.read_items(task, SAMPLE)[:3]
  options = task.forms["sft_nats"].options
  assert options is not None
  assert options(items[0]) == [(task.forms["sft"].prompt(items[0]), f" {items[0].answers[0]}")]
  assert task.score is not None
  replies = [(Likelihood(-6.0, False, 3),), (Likelihood(-1.0, True, 2),), (Likelihood(0, True, 1),)]
  scores = task.score(items, replies)
  assert scores.values["nats_per_token"].mean == pytest.approx((2 + 0.5 + 0) / 3)
  assert scores.right is not None
  assert scores.right.tolist() == [False, True, True]


@pytest.mark.parametrize(
  ("name", "message"), [("gone", "no file matches"), ("text", "none of .* is a caption or a conv")]
)
def test_shards_that_cannot_be_asked(name, message):
  with pytest.raises(EvalError, match=message):
    tasks.read_items(tasks.get_task(f"records:{name}"), SAMPLE)
