# SPDX-License-Identifier: Apache-2.0
"""Prompts and cuts, as literal texts."""

import pytest

from mm1_jax.data.build import official, official_grounding, official_rows
from mm1_jax.eval import tasks
from mm1_jax.eval.task import Item
from mm1_jax.eval.tasks import prompts

SHORT = "Answer the question using a single word or phrase."
UNSURE = "When the provided information is insufficient, respond with 'Unanswerable'."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
BOX = (
  "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, "
  "bottom-right y). All values are floating point numbers bounded between 0 and 1. Please provide "
  "the bounding box coordinate of the region this sentence describes: "
)


def text(content) -> str:
  """Returns a prompt with <P> for each picture."""
  return "".join(part if isinstance(part, str) else "<P>" for part in content)


@pytest.mark.parametrize(
  ("name", "form", "number", "expected"),
  [
    ("coco", "mm1", 0, "<P>Output:"),
    ("coco", "openflamingo", 0, "<P>Output:"),
    ("coco", "sft", 0, f"<P>\n{CAPTION}"),
    ("nocaps", "sft", 0, f"<P>\n{CAPTION}"),
    ("textcaps", "sft", 0, f"<P>\n{CAPTION}"),
    ("vqav2", "mm1", 0, "<P>Question:Where is he looking? Short answer:"),
    ("vqav2", "openflamingo", 0, "<P>Question:Where is he looking? Short answer:"),
    ("vqav2", "sft", 0, f"<P>\nWhere is he looking?\n{SHORT}"),
    ("okvqa", "sft", 0, f"<P>\nWhere is he looking?\n{UNSURE}\n{SHORT}"),
    ("vizwiz", "sft", 0, f"<P>\nOk. what color is this?\n{UNSURE}\n{SHORT}"),
    ("textvqa", "sft", 1, f"<P>\nWhat does the small white text spell?\n{SHORT}"),
    ("gqa", "sft", 0, f"<P>\nIs it overcast?\n{SHORT}"),
    (
      "scienceqa_img",
      "sft",
      0,
      "<P>\nContext: Look at the map.\nWhich state is farthest north?\nA. West Virginia\n"
      f"B. Louisiana\nC. Arizona\n{LETTER}",
    ),
    (
      "scienceqa_img",
      "sft",
      1,
      f"<P>\nWhich state is farthest north?\nA. West Virginia\nB. Louisiana\nC. Arizona\n{LETTER}",
    ),
    ("ai2d", "sft", 0, f"<P>\nWhat is a predator?\nA. owl\nB. leaf\nC. grass\nD. fox\n{LETTER}"),
    (
      "seed",
      "sft",
      0,
      f"<P>\nHow many towels are there?\nA. One\nB. Two\nC. Three\nD. Four\n{LETTER}",
    ),
    (
      "mmbench",
      "sft",
      0,
      "<P>\nThink\tof\nanimals. What is it? There are several options:\nA. cat\nB. dog\nC. None\n\n"
      + LETTER,
    ),
    (
      "mmbench",
      "sft",
      4,
      f'<P>\nIs it "red"? There are several options:\nA. no\nB. yes\n\n{LETTER}',
    ),
    (
      "mmmu",
      "sft",
      0,
      f"Compare <P> with <P>: which is it?\nA. $6\nB. it's <P>\n\n{LETTER}",
    ),
    ("mmmu", "sft", 1, f"How much? <P>\n\n{SHORT}"),
    (
      "mathvista",
      "sft",
      0,
      "<P>\nFind x. (Unit: cm)\nAnswer the question using a single floating-point number with one "
      "decimal place.",
    ),
    ("mathvista", "sft", 1, f"<P>\nIs it equal?\nA. Yes\nB. No\n{LETTER}"),
    (
      "mathvista",
      "sft",
      2,
      "<P>\nHow many?\nAnswer the question using a single integer number.",
    ),
    ("mathvista", "sft", 3, "<P>\nWhich ones?\nAnswer the question using a Python list."),
    ("mme", "sft", 0, f"<P>\nIs it A?\n{SHORT}"),
    ("pope", "sft", 0, f"<P>\nIs there a snowboard in the image?\n{SHORT}"),
    ("docvqa", "sft", 0, f"<P>\nWhat is the actual value per 1000?\n{SHORT}"),
    ("infovqa", "sft", 1, f"<P>\nWho signed?\n{SHORT}"),
    ("chartqa", "sft", 0, "<P>\nHow many food items?\nAnswer the question with a single word."),
    (
      "nlvr2",
      "sft",
      0,
      f"<P>\n<P>\nThere is an empty glass.\nIs this true of the two images? {SHORT}",
    ),
    ("refcoco", "sft", 0, "<P>\nWhere is this in the image: lady on the right"),
    ("refcoco", "lmms_eval", 1, f"<P>\n{BOX}woman"),
    ("flickr30k", "sft", 0, "<P>\nWhere is this in the image: Two men"),
    ("llava_bench", "sft", 1, "<P>\nDescribe it."),
    ("mm_vet", "sft", 0, "<P>\nWhat is x in the equation?"),
    ("triviaqa", "text", 0, "Question: Who won in 1930??\nAnswer:"),
  ],
)
def test_prompts(name, form, number, expected, items):
  item = items(name)[number]
  assert text(tasks.get_task(name).forms[form].prompt(item)) == expected


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("coco", "A man on a red moped.\n"),
    ("vqav2", "down\n"),  # what most people said
    ("vizwiz", "green\n"),
    ("textvqa", "nous les gosses\n"),
  ],
)
def test_a_demonstration_ends_where_the_next_prompt_begins(name, expected, items):
  task = tasks.get_task(name)
  for form in ("mm1", "openflamingo"):
    demonstration = task.forms[form].demonstration
    assert demonstration
    assert demonstration(items(name)[0] if form == "mm1" else _first(task)) == expected


def _first(task) -> Item:
  """Returns the same item without its picture: the text alone decides."""
  answers = {
    "coco": ("A man on a red moped.", "x"),
    "vqav2": ("down", "at table", "down"),
    "vizwiz": ("unsuitable", "green", "green"),
    "textvqa": ("nous les gosses",),
  }
  return Item("1", answers=answers[task.name])


def test_the_protocols_differ_as_published():
  vqa, vizwiz, coco = (tasks.get_task(name).forms for name in ("vqav2", "vizwiz", "coco"))
  assert [f["openflamingo"].max_new_tokens for f in (vqa, vizwiz, coco)] == [5, 10, 20]
  for forms in (vqa, vizwiz, coco):
    assert (forms["mm1"].num_beams, forms["mm1"].text_demonstrations) == (1, 0)
    assert (forms["openflamingo"].num_beams, forms["openflamingo"].text_demonstrations) == (3, 2)
  assert vqa["mm1"].stop == ("\n", ".", ",", "Question")
  assert coco["mm1"].stop == ("\n",)
  lengths = {
    "gqa": 16,
    "mmmu": 128,
    "pope": 128,
    "docvqa": 32,
    "chartqa": 16,
    "coco": 64,
    "mme": 16,
  }
  for name, length in lengths.items():
    assert tasks.get_task(name).forms["sft"].max_new_tokens == length


@pytest.mark.parametrize(
  ("said", "answer"),
  [
    (" two men Question: how", "two men"),
    ("red Short answer: no", "red"),
    ("cat, dog", "cat"),
    ("3,000", "3,000"),
    ("Answer", ""),
    ("", ""),
  ],
)
def test_what_follows_a_short_answer_is_cut_off(said, answer):
  assert tasks.get_task("vqav2").forms["openflamingo"].clean(said, Item("1")) == answer


def test_what_follows_a_caption_is_cut_off():
  clean = tasks.get_task("coco").forms["mm1"].clean
  assert clean(' A "red" cat Output: a dog', Item("1")) == "A red cat"


def test_words_are_those_that_models_are_fine_tuned_on():
  """A model that was trained on `data.build official` is asked in the same words."""
  assert official_rows.SHORT == prompts.SHORT
  assert official_rows.LETTER == prompts.LETTER
  assert official_rows.CAPTION == prompts.CAPTION
  where, statement = Item("1", "a cat"), Item("1", "A dog.")
  assert text(tasks.get_task("refcoco").forms["sft"].prompt(where)) == (
    official_grounding._where("a cat")
  )
  row = {"identifier": "test1-0-0-0", "sentence": "A dog.", "label": "True"}
  (built,) = official.nlvr2(row)
  said = built["conversations"][0]["value"].removeprefix("<image>\n<image>\n")
  assert text(tasks.get_task("nlvr2").forms["sft"].prompt(statement)) == said
  choice, right = official_rows.choice("Which?", ["a", "b"], 1)
  item = Item("1", "Which?", choices=("a", "b"), right=1)
  assert text(prompts.letter().prompt(item)) == choice
  assert right == "B"


def test_pictures_go_where_a_text_has_them():
  item = Item("1", pictures=(b"x", b"y"))
  assert prompts.turn(item, "a <image> b <image>") == ["a ", b"x", " b ", b"y"]
  assert prompts.turn(item, "a") == [b"x", "\n", b"y", "\na"]
  assert prompts.with_pictures(item, "a") == [b"x", b"y", "a"]
  assert prompts.turn(Item("1"), "a") == ["a"]
