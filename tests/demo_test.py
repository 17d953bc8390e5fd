# SPDX-License-Identifier: Apache-2.0
"""The demo's questions: read from the sample, controls that know nothing, and the scores."""

import math

import pytest

from configs import mm1_demo_sft
from launch import demo, questions
from launch.questions import Item
from mm1_jax.config import RunConfig
from mm1_jax.data.build.world import ASKS


@pytest.fixture(scope="module")
def run() -> RunConfig:
  return RunConfig.from_dict(mm1_demo_sft.get_config().to_dict())


@pytest.fixture(scope="module")
def items(run) -> list[Item]:
  return questions.held_out(run)


def test_each_question_is_asked_alone_with_its_pictures(items):
  for asks in ASKS:
    group = questions.of_kind(items, asks)
    assert len(group) >= 300
    assert {len(item.images) for item in group} == {2 if asks == "which" else 1}


def test_other_pictures_are_other_ones_of_the_kind(items):
  other = questions.with_other_pictures(items)
  assert [(i.asks, i.question, i.answer) for i in other] == [
    (i.asks, i.question, i.answer) for i in items
  ]
  assert all(a.images != b.images for a, b in zip(items, other, strict=True))
  for asks in ASKS:
    pictures = [sorted(i.images for i in questions.of_kind(x, asks)) for x in (items, other)]
    assert pictures[0] == pictures[1]


def test_who_sees_nothing_scores_chance(items, run):
  """The truth of the other picture is as good as a guess, whatever is asked; so is the question."""
  by_images = {(item.asks, item.images): item.answer for item in items}
  blind = [by_images[item.asks, item.images] for item in questions.with_other_pictures(items)]
  truth = [item.answer for item in items]
  figures = questions.score(items, truth, blind, questions.most_frequent(run))
  chance = dict(zip(ASKS, (1 / 10, 1 / 6, 1 / 8, 1 / 2, 1 / 5, 1 / 2), strict=True))
  for asks, row in figures.items():
    assert row["accuracy"] == 1
    assert row["standard_error"] == 0
    error = math.sqrt(chance[asks] * (1 - chance[asks]) / row["n"])
    assert row["other_picture"] == pytest.approx(chance[asks], abs=4 * error)
    assert row["most_frequent"] == pytest.approx(chance[asks], abs=4 * error)


@pytest.mark.parametrize("asks", ["absence", "which"])
def test_the_question_alone_does_not_tell(items, asks):
  """The best guess from what is asked for, learned on the held-out answers themselves."""
  group = questions.of_kind(items, asks)
  counts: dict[str, list[str]] = {}
  for item in group:
    counts.setdefault(item.question.rstrip("?").split()[-1], []).append(item.answer)
  best = sum(max(map(answers.count, set(answers))) for answers in counts.values())
  assert best / len(group) < 0.65


@pytest.mark.parametrize(
  ("said", "right"), [("7", True), (" 7.", True), ("17", False), ("seven", False), ("", False)]
)
def test_an_answer_is_right_as_a_whole(said, right):
  assert questions.is_right(Item("number", (), "What number is this?", "7"), said) == right


def test_a_caption_names_whole_words():
  item = Item("kind", (), "What is this?", "an animal")
  assert questions.names(item, "An animal: fox.")
  assert not questions.names(item, "An animals: fox.")
  assert not questions.names(Item("number", (), "", "1"), "A red 11.")


def test_scores_and_curves():
  items = [Item(asks, (), "?", "yes") for asks in ASKS for _ in range(4)]
  said = ["yes", "Yes.", "no", "no"] * len(ASKS)
  other = ["no", "no", "no", "yes"] * len(ASKS)
  figures = questions.score(items, said, other, dict.fromkeys(ASKS, "no"))
  assert figures["which"] == {
    "accuracy": 0.5, "standard_error": 0.25, "other_picture": 0.25, "most_frequent": 0.0, "n": 4
  }  # fmt: skip
  curves = questions.curves(items[:4], {10: [True, False, False, False], 20: [True] * 4})
  assert curves == {"number": {10: 0.25, 20: 1.0}}
  assert "25.0" in demo.table(figures)
