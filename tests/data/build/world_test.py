# SPDX-License-Identifier: Apache-2.0
"""The small world, drawn from a made-up dump: answers are true, sides share no look."""

import csv
import gzip
import io
import itertools
import json
import re
import zipfile

import numpy as np
import PIL.Image
import pytest

from mm1_jax.data.build import world
from mm1_jax.data.sources import check_record

NUM_THINGS = 5  # of each kind


def make_dump(folder):
  """Writes digits, which are squares, and icons whose colour tells their look."""
  grey = np.zeros((28, 28), np.uint8)
  grey[8:20, 8:20] = 255
  (folder / "digits").mkdir()
  with gzip.open(folder / "digits" / "mnist_5k.csv.gz", "wt", newline="") as file:
    for i in range(world.HELDOUT_DIGITS + 50):
      csv.writer(file).writerow([*grey.ravel(), i % 10])
  (folder / "icons").mkdir()
  rows = [
    {"id": f"{k}{i}", "label": f"thing {k} {i}", "subgroup": subgroups[0], "looks": world.LOOKS}
    for k, subgroups in enumerate(world.KINDS.values())
    for i in range(NUM_THINGS)
  ]
  rows.append({"id": "x", "label": "oddity", "subgroup": "animal-bird", "looks": ["noto"]})
  (folder / "icons" / "icons.jsonl").write_text("\n".join(map(json.dumps, rows)))
  for shade, look in enumerate(world.LOOKS):
    with zipfile.ZipFile(folder / "icons" / f"{look}.zip", "w") as file:
      for row in rows:
        data = io.BytesIO()
        PIL.Image.new("RGBA", (64, 64), (60 * shade, 0, 0, 255)).save(data, "PNG")
        file.writestr(f"{row['id']}.png", data.getvalue())
  return folder


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
  return make_dump(tmp_path_factory.mktemp("dump"))


@pytest.fixture(scope="module")
def records(dump):
  with pytest.MonkeyPatch.context() as patch:
    small = {"captions": (20, 12, 8), "interleaved": (60, 40, 20), "questions": (16, 12, 8, 16)}
    patch.setattr(world, "NUM_TRAIN", small)
    patch.setattr(world, "NUM_HELDOUT", 48)
    first, second = world.records(dump), world.records(dump)
  assert first == second
  return first


def turns(record):
  """Returns the questions and answers of a conversation, and the kind of each."""
  texts = [item["text"] for turn in record["turns"] for item in turn["content"] if "text" in item]
  return list(zip(record["asks"], texts[::2], texts[1::2], strict=True))


def test_records_are_of_the_schema(records):
  assert {part for part, _ in records} == {"captions_world", "interleaved_world", "questions"}
  for key, group in records.items():
    for record in group:
      check_record(record, str(key))
      assert record["license"]
      assert record["credit"]


def test_no_look_and_no_handwriting_is_on_both_sides(records):
  train, heldout = (
    {
      name
      for (_, s), group in records.items()
      if s == side
      for r in group
      for name in r["pictures"]
    }
    for side in ("train", "heldout")
  )
  assert not train & heldout
  looks = [name for name in heldout if not name.startswith("mnist/")]
  assert len(looks) == len({name.split("/")[1] for name in looks}), "one look of each"
  assert not any(name.endswith("/x") for name in train | heldout), "a concept has all looks"


def test_every_kind_is_asked_as_often(records):
  asked = [asks for r in records["questions", "heldout"] for asks, _, _ in turns(r)]
  assert {asks: asked.count(asks) for asks in world.ASKS} == dict.fromkeys(world.ASKS, 48)


@pytest.mark.parametrize("side", ["train", "heldout"])
def test_answers_are_true(records, side):
  labels = {f"mnist/{i}": str(i % 10) for i in range(world.HELDOUT_DIGITS + 50)}
  kinds = list(world.KINDS)
  answers = []
  for record in records["questions", side]:
    is_digit = [name.startswith("mnist/") for name in record["pictures"]]
    kind = [
      "a number" if digit else kinds[int(name.split("/")[1][0])]
      for name, digit in zip(record["pictures"], is_digit, strict=True)
    ]
    label = [labels.get(name) for name in record["pictures"]]
    for asks, question, answer in turns(record):
      answers.append((asks, answer))
      if asks == "number":
        assert answer == label[0]
      if asks == "kind":
        assert answer == kind[0]
      if asks == "absence" and any(k in question for k in ["a number", *kinds]):
        assert (answer == "yes") == (kind[0] in question)
      place = ("the first", "the second").index(answer) if asks == "which" else None
      if asks == "which" and all(is_digit) and "number" not in question:
        assert f"the {label[place]}" in question
        assert label[0] != label[1]
      if asks == "which" and not any(is_digit):
        assert kind[place] in question
        assert kind[0] != kind[1]
  for said in (("absence", "yes"), ("which", "the first")):
    both = [answer for asks, answer in answers if asks == said[0]]
    assert both.count(said[1]) == pytest.approx(len(both) / 2, abs=1)


def test_pages_ask_what_their_captions_answer(records):
  texts = [
    item["text"].strip()
    for record in records["interleaved_world", "train"]
    for item in record["content"]
    if "text" in item
  ]
  guesses = [re.fullmatch(r"Is it (.+)\? (Yes|No), (.+)\.", text) for text in texts]
  kinds = {kind: kind for kind in world.KINDS}
  for match in filter(None, guesses):
    thing, said, caption = match.groups()
    digit = re.fullmatch(r"an? (\w+) (\d)", caption)
    true = {"a number", f"a {digit[1]} number", f"an {digit[1]} number"} if digit else set()
    true |= {f"a {digit[2]}", f"an {digit[2]}"} if digit else {kinds[caption.split(":")[0]]}
    assert (said == "Yes") == (thing in true), match[0]
  searches = [re.fullmatch(r"Where is (.+)\? The (first|second): (.+)\.", text) for text in texts]
  assert len([*filter(None, guesses)]) > 5
  assert len([*filter(None, searches)]) > 2
  for match in filter(None, searches):
    digit = re.search(r"an? [a-z]+ \d", match[3])
    thing = match[1].removeprefix("the ").removesuffix(" number")
    place = digit.start() if match[1] == "a number" else match[3].find(thing)
    first = re.search(r", (?=an? |food:|clothing:)", match[3]).start()
    assert (place > first) == (match[2] == "second"), match[0]


def test_ink_and_count_are_what_the_picture_shows(dump):
  artist = world.Artist(dump, "train", np.random.default_rng(0))
  for _ in range(12):
    picture = artist.number()
    pixels = np.asarray(PIL.Image.open(io.BytesIO(picture.image)).convert("RGB"), np.int32)
    darkest = pixels.reshape(-1, 3)[pixels.sum(-1).argmin()]
    nearest = min(world.INKS, key=lambda ink: np.abs(darkest - world.INKS[ink]).sum())
    assert nearest == picture.ink
  for _ in range(10):
    picture = artist.things()
    grey = np.asarray(PIL.Image.open(io.BytesIO(picture.image)).convert("L"))
    assert count_blobs(grey < 180) == picture.count


def count_blobs(dark: np.ndarray) -> int:
  """Returns how many connected regions a mask has."""
  left, number = {tuple(at) for at in np.argwhere(dark)}, 0
  while left:
    number += 1
    edge = [left.pop()]
    while edge:
      row, column = edge.pop()
      for down, right in itertools.product((-1, 0, 1), repeat=2):
        if (near := (row + down, column + right)) in left:
          left.remove(near)
          edge.append(near)
  return number


def test_credits_count_pictures(records):
  lines = world.credits(r for group in records.values() for r in group).splitlines()
  counts = {line.split(" | ")[0].strip("| "): int(line.split(" | ")[1]) for line in lines[2:]}
  assert set(counts) == {"mnist", *world.LOOKS}
  assert sum(counts.values()) == sum(len(r["pictures"]) for g in records.values() for r in g)
