# SPDX-License-Identifier: Apache-2.0
"""The demo's questions: read from the sample, controls that know nothing, and the scores."""

import math

import numpy as np
import pytest

from launch import demo, questions
from mm1_jax.data.build.world import ASKS
from mm1_jax.eval import tasks
from mm1_jax.eval.evaluate import Job, Result
from mm1_jax.eval.metrics.statistics import estimate
from mm1_jax.eval.replies import Answered, other_pictures
from mm1_jax.eval.task import Item, Scores
from mm1_jax.eval.tasks.scoring import is_accepted

FORM = tasks.get_task(questions.TASK).forms["sft"]


@pytest.fixture(scope="module")
def items() -> list[Item]:
  return questions.held_out()


def make_item(asks: str, answer: str, number: int = 0) -> Item:
  return Item(str(number), "?", answers=(answer,), details={"source": asks})


def test_each_question_is_asked_alone_with_its_pictures(items):
  for asks in ASKS:
    group = questions.of_kind(items, asks)
    assert len(group) >= 300
    assert {len(item.pictures) for item in group} == {2 if asks == "which" else 1}


def test_what_sees_nothing_scores_chance(items):
  """The truth of the other picture is as good as a guess, whatever is asked."""
  change = other_pictures(items)
  for asks in ASKS:
    group = questions.of_kind(items, asks)
    truth = {item.pictures: item.answers[0] for item in group}
    right = []
    for item in group:
      shown = [part for part in change(item, FORM.prompt(item)) if not isinstance(part, str)]
      assert not set(shown) & set(item.pictures)
      right.append(is_accepted(item, truth[tuple(shown)]))
    chance = dict(zip(ASKS, (1 / 10, 1 / 6, 1 / 8, 1 / 2, 1 / 5, 1 / 2), strict=True))[asks]
    error = math.sqrt(chance * (1 - chance) / len(group))
    assert np.mean(right) == pytest.approx(chance, abs=4 * error)


@pytest.mark.parametrize("asks", ["absence", "which"])
def test_the_question_alone_does_not_tell(items, asks):
  """The best guess from what is asked for, learned on the held-out answers themselves."""
  group = questions.of_kind(items, asks)
  counts: dict[str, list[str]] = {}
  for item in group:
    counts.setdefault(item.question.rstrip("?").split()[-1], []).append(item.answers[0])
  best = sum(max(map(answers.count, set(answers))) for answers in counts.values())
  assert best / len(group) < 0.65


@pytest.mark.parametrize(
  ("said", "right"), [("7", True), (" 7.", True), ("17", False), ("seven", False), ("", False)]
)
def test_an_answer_is_right_as_a_whole(said, right):
  assert is_accepted(make_item("number", "7"), said) == right


def test_a_caption_names_whole_words():
  item = make_item("kind", "an animal")
  assert questions.names(item, "An animal: fox.")
  assert not questions.names(item, "An animals: fox.")
  assert not questions.names(make_item("number", "1"), "A red 11.")


def test_figures_and_curves():
  items = [make_item(asks, "yes", i) for i, asks in enumerate(a for a in ASKS for _ in range(4))]

  def result(right: list[float]) -> Result:
    per_item = np.array(right * len(ASKS))
    job = Job(tasks.get_task(questions.TASK), "sft", "heldout", 0, "own", 0)
    answered = [Answered(item, (), "said") for item in items]
    return Result(job, answered, Scores({"exact_match": estimate(per_item)}, per_item))

  figures = questions.figures([result([1, 1, 0, 0]), result([0, 0, 0, 1]), result([0, 0, 0, 0])])
  row = figures["which"]
  assert row["standard_error"] == pytest.approx(math.sqrt(0.25 / 3))
  del row["standard_error"]
  assert row == {"accuracy": 0.5, "other_picture": 0.25, "most_frequent": 0.0, "n": 4}
  curves = questions.curves(items[:4], {10: [1, 0, 0, 0], 20: [1] * 4})
  assert curves == {"number": {10: 0.25, 20: 1.0}}
  assert "25.0" in demo.table({"which": {**row, "standard_error": 0.1}})
