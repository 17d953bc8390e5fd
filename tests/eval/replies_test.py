# SPDX-License-Identifier: Apache-2.0
"""Replies: kept by what was asked, the same after a stop, and never another question's."""

import dataclasses

import pytest
from etils import epath

from mm1_jax.eval import replies
from mm1_jax.eval.few_shot import Demonstrations
from mm1_jax.eval.replies import Answered, Asking, answer, no_pictures, other_pictures
from mm1_jax.eval.task import EvalError, Form, Item

pytestmark = pytest.mark.compiles

GENERATE = Form(
  prompt=lambda item: [*item.pictures, f"{item.question} "],
  demonstration=lambda item: f"{item.answers[0]}\n",
  max_new_tokens=4,
)
CHOOSE = dataclasses.replace(
  GENERATE,
  options=lambda item: [(GENERATE.prompt(item), f" {choice}") for choice in item.choices],
)


def make_items(pictures: list[bytes], num: int = 10) -> list[Item]:
  return [
    Item(
      str(i),
      f"what is {i}?",
      (pictures[i % 2],),
      ("bread",),
      ("bread", "a small house"),
    )
    for i in range(num)
  ]


def ask(model, items, asking, **kwargs) -> list[Answered]:
  return [one for chunk in answer(model, items, asking, **kwargs) for one in chunk]


@pytest.fixture
def calls(monkeypatch) -> list[int]:
  """How many items the model was asked, call by call."""
  found = []
  reply = Asking.reply

  def spy(self, model, asked):
    found.append(len(asked))
    return reply(self, model, asked)

  monkeypatch.setattr(Asking, "reply", spy)
  return found


@pytest.mark.parametrize("form", [GENERATE, CHOOSE], ids=["generate", "choose"])
def test_a_job_that_is_stopped_asks_the_rest_only(
  dense_model, pictures, tmp_path, monkeypatch, calls, form
):
  monkeypatch.setattr(replies, "CHUNK", 4)
  items, kept = make_items(pictures), epath.Path(tmp_path)
  whole = ask(dense_model, items, Asking(form))
  calls.clear()
  job = answer(dense_model, items, Asking(form), kept=kept, digest="run")
  first = next(job)
  job.close()
  again = ask(dense_model, items, Asking(form), kept=kept, digest="run")
  assert calls == [4, 4, 2]
  assert first == whole[:4]
  assert again == whole
  assert [a.item.id for a in again] == [item.id for item in items]


def test_what_is_kept_is_of_that_question_that_model_and_those_settings(
  dense_model, pictures, tmp_path, calls
):
  items, kept = make_items(pictures, 2), epath.Path(tmp_path)
  ask(dense_model, items, Asking(GENERATE), kept=kept, digest="run")
  changed = {
    "another model": (items, Asking(GENERATE), "other run"),
    "another question": ([dataclasses.replace(items[0], question="why?"), items[1]], None, "run"),
    "another picture": (
      [dataclasses.replace(items[0], pictures=(pictures[1],)), items[1]],
      None,
      "run",
    ),
    "another order": (items[::-1], None, "run"),
    "longer answers": (items, Asking(dataclasses.replace(GENERATE, max_new_tokens=5)), "run"),
    "another end": (items, Asking(dataclasses.replace(GENERATE, stop=("\n",))), "run"),
    "no pictures": (items, Asking(GENERATE, change=no_pictures), "run"),
    "choices": (items, Asking(CHOOSE), "run"),
  }
  for asked, asking, digest in changed.values():
    calls.clear()
    ask(dense_model, asked, asking or Asking(GENERATE), kept=kept, digest=digest)
    assert calls == [2]
  calls.clear()
  ask(dense_model, items, Asking(GENERATE), kept=kept, digest="run")
  assert calls == []


def test_a_file_that_was_cut_off_is_an_error_that_names_it(dense_model, pictures, tmp_path):
  items, kept = make_items(pictures, 2), epath.Path(tmp_path)
  ask(dense_model, items, Asking(GENERATE), kept=kept, digest="run")
  (file,) = kept.iterdir()
  file.write_text(file.read_text()[:5])
  with pytest.raises(EvalError, match=f"{file.name}.*damaged.*remove it"):
    ask(dense_model, items, Asking(GENERATE), kept=kept, digest="run")


def test_processes_share_the_chunks(dense_model, pictures, tmp_path, monkeypatch, calls):
  monkeypatch.setattr(replies, "CHUNK", 4)
  items, kept = make_items(pictures), epath.Path(tmp_path)
  for process in range(2):
    share = ask(dense_model, items, Asking(CHOOSE), kept=kept, digest="run", share=(process, 2))
    assert [a.item.id for a in share] == [["0", "1", "2", "3", "8", "9"], ["4", "5", "6", "7"]][
      process
    ]
  calls.clear()
  assert len(ask(dense_model, items, Asking(CHOOSE), kept=kept, digest="run")) == 10
  assert calls == []


def test_an_item_that_cannot_be_asked_is_reported_with_its_reason(dense_model, pictures):
  items = make_items(pictures, 3)
  items[1] = dataclasses.replace(items[1], pictures=(epath.Path("gone.jpg"),))
  items[2] = dataclasses.replace(items[2], question="word " * 300)
  found = ask(dense_model, items, Asking(GENERATE))
  assert found[0].reply is not None
  assert "gone.jpg" in found[1].problem
  assert "positions" in found[2].problem
  assert found[1].reply is found[2].reply is None


def test_whatever_reading_an_item_raises_is_that_items_problem(dense_model, pictures):
  items = make_items(pictures, 4)
  items[1] = dataclasses.replace(items[1], pictures=(epath.Path("a\0.jpg"),))
  items[2] = dataclasses.replace(items[2], question="half \ud800")
  items[3] = dataclasses.replace(items[3], answers=())  # no first one for the form to take
  form = dataclasses.replace(GENERATE, prompt=lambda item: [*item.pictures, item.question])
  strange = dataclasses.replace(form, prompt=lambda item: [*form.prompt(item), item.answers[0]])
  found = ask(dense_model, items, Asking(strange))
  assert "embedded null byte" in found[1].problem
  assert found[2].reply is not None
  assert "IndexError" in found[3].problem
  assert found[0].reply == ask(dense_model, items[:1], Asking(strange))[0].reply


def test_more_demonstrations_than_fit_say_how_many_do(dense_model, pictures):
  pool = Demonstrations(make_items([b"1", pictures[1]], 100)[1::2])
  item = make_items(pictures, 1)[0]
  with pytest.raises(
    EvalError, match=r"40 demonstrations and item '0' do not fit the 192.*; (\d+) would"
  ):
    ask(dense_model, [item], Asking(GENERATE, 40, pool))


def test_another_items_pictures_are_never_ones_own():
  items = [Item(str(i), pictures=(bytes([i // 3]), bytes([9 - i // 3]))) for i in range(12)]
  change = other_pictures(items)
  for item in items:
    first, text, second = change(item, [item.pictures[0], "and", item.pictures[1]])
    assert text == "and"
    assert not {first, second} & set(item.pictures)
  kinds = [
    dataclasses.replace(item, details={"source": str(i % 2)}) for i, item in enumerate(items)
  ]
  change = other_pictures(kinds)
  for item in kinds:
    (shown,) = change(item, [item.pictures[0]])
    same = [k for k in kinds if k.details == item.details and shown in k.pictures]
    assert same  # of the same source
  with pytest.raises(EvalError, match="no other item"):
    other_pictures(items[:3])
