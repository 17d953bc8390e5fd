# SPDX-License-Identifier: Apache-2.0
"""Demonstrations: never of the question's own picture, and the same for the same seed."""

import pytest
from etils import epath

from mm1_jax.eval.few_shot import Demonstrations, context, without_pictures
from mm1_jax.eval.task import EvalError, Form, Item


def item(number: int, picture: str = "", answer: str = "yes") -> Item:
  name = picture or f"{number}.jpg"
  return Item(str(number), f"question {number}", (epath.Path(name),), (answer,))


FORM = Form(
  prompt=lambda item: [item.pictures[0], f"Question:{item.question} Short answer:"],
  demonstration=lambda item: f"{item.answers[0]}\n",
)
SPLIT = [item(i, f"{i // 2}.jpg") for i in range(100)]  # two questions for each picture


def test_none_is_of_the_questions_own_picture():
  pool = Demonstrations(SPLIT)
  for asked in SPLIT:
    shown = pool.of(asked, 16)
    assert len({d.id for d in shown}) == 16
    assert asked.pictures[0] not in [d.pictures[0] for d in shown]


def test_pictures_in_memory_are_told_apart_by_their_bytes():
  pool = Demonstrations([Item(str(i), pictures=(bytes([i // 2]),)) for i in range(6)])
  shown = pool.of(Item("other", pictures=(bytes([1]),)), 4)
  assert sorted(d.id for d in shown) == ["0", "1", "4", "5"]


def test_a_draw_depends_on_seed_trial_and_question_alone():
  asked = SPLIT[7]

  def ids(seed: int = 0, trial: int = 0, question: Item = asked) -> list[str]:
    return [d.id for d in Demonstrations.drawn(SPLIT, seed=seed, trial=trial).of(question, 8)]

  assert ids() == ids()
  draws = [ids(), ids(seed=1), ids(trial=1), ids(question=SPLIT[8])]
  assert all(a != b for i, a in enumerate(draws) for b in draws[:i])
  assert ids()[:4] == [
    d.id for d in Demonstrations.drawn(SPLIT, seed=0, trial=0).of(asked, 4)
  ]  # fewer shots are the first of more


def test_a_pool_is_a_part_of_the_split():
  pool = Demonstrations.drawn(SPLIT, seed=3, trial=0, pool=10)
  assert len(pool.items) == 10
  assert {d.id for asked in SPLIT for d in pool.of(asked, 4)} <= {d.id for d in pool.items}


def test_too_few_is_an_error_with_the_number():
  with pytest.raises(EvalError, match=r"16 demonstrations are asked for, and item '0' may see 2"):
    Demonstrations(SPLIT[:4]).of(SPLIT[0], 16)


def test_a_document_is_prompts_with_their_answers():
  found = context(FORM, [item(1, answer="no"), item(2)], FORM.prompt(item(3)))
  assert found == [
    epath.Path("1.jpg"),
    "Question:question 1 Short answer:no\n",
    epath.Path("2.jpg"),
    "Question:question 2 Short answer:yes\n",
    epath.Path("3.jpg"),
    "Question:question 3 Short answer:",
  ]
  assert without_pictures(found) == [
    "Question:question 1 Short answer:no\nQuestion:question 2 Short answer:yes\n"
    "Question:question 3 Short answer:"
  ]


def test_a_conversation_has_a_turn_for_each_answer():
  form = Form(FORM.prompt, demonstration=FORM.demonstration, chat=True)
  found = context(form, [item(1)], form.prompt(item(3)))
  assert [turn["role"] for turn in found] == ["user", "assistant", "user"]
  assert found[1]["content"] == "yes"
  assert context(form, [], form.prompt(item(3))) == form.prompt(item(3))


def test_a_form_without_demonstrations_refuses_them():
  with pytest.raises(EvalError, match="no demonstrations"):
    context(Form(FORM.prompt), [item(1)], [])
