# SPDX-License-Identifier: Apache-2.0
"""The lab's worlds: what a kind of training document is, drawn at random.

A `Stream` draws documents of one kind; a run mixes streams by shares of positions. A document is
texts and pictures in order; each text is tokenised on its own. What is learned from is text alone.

  Named       a picture and its name: "red 7", "animal: fox"
  Strings     a picture of three small digits: "2 5 7"
  Loose       a picture and one of several true things about it: its ink, its number, its kind, ...
  Themed      a passage of prose, then pictures of which the same thing is said of each
  Bound       a passage of prose, then pictures, each followed by the letter that its class has in
              this document and in no other: a class's letter can be read off the document only
  Prose       a passage of the sample's textbooks
  Pairs       words, each followed by its letter, bound as in `Bound`: the same, without pictures
  Repeats     words in a random order, again and again
  Facts       "apple, de: Apfel": names in other languages, which nothing but memory can tell
"""

import csv
import dataclasses
import functools
import pathlib
import string

import numpy as np

from lab.pictures import (
  INKS,
  Thing,
  blank,
  paint,
  place,
  shrink,
  sprites,
  turn_hue,
)
from mm1_jax.config import SourceConfig
from mm1_jax.configs import common
from mm1_jax.data.sources import Source
from mm1_jax.data.tokenizer import Tokenizer


class Given(str):
  """Text that is read and not learned: what nothing in its document could tell."""


Part = str | np.ndarray  # text, or a picture: uint8[pixels, pixels, 3]
Document = list[Part]
TOKENIZER = f"{common.SAMPLE}/tokenizer_1024.model"
LETTERS = string.ascii_uppercase[:16]
PASSAGE = 50  # characters of prose in a document that is not prose alone
STRING = 3  # digits
DIGIT_THEMES = ("number", "number in words", "ink", "ink in Spanish")
THING_THEMES = ("kind", "name")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPANISH = {
  "red": "rojo",
  "green": "verde",
  "blue": "azul",
  "orange": "naranja",
  "purple": "morado",
  "brown": "marrón",
}
QUESTION = " What number?"
CANVAS = 48  # pixels of a picture of a string, before it is made as small as the run has it


class Stream:
  """One kind of document. Subclasses are dataclasses: their fields are part of a run's name."""

  def draw(self, rng: np.random.Generator, pixels: int, side: str) -> Document:
    """Returns a document with pictures of so many pixels a side, of "train" or "heldout"."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Named(Stream):
  """Captions.

  Attributes:
    noise: share whose caption is another picture's.
    long: share that has a long caption, always true: what, its kind, and where it is.
    part: share of the sprites that are used: less data of the same kind.
    digits: share of pictures that are digits in ink.
  """

  noise: float = 0.0
  long: float = 0.0
  part: float = 1.0
  digits: float = 0.5

  def draw(self, rng: np.random.Generator, pixels: int, side: str) -> Document:
    image, name, details = self.picture(rng, pixels, side)
    if rng.random() < self.long:
      return [image, f"{name}{details}"]
    if rng.random() < self.noise:
      _, name, _ = self.picture(rng, pixels, side)
    return [image, name]

  def picture(
    self, rng: np.random.Generator, pixels: int, side: str
  ) -> tuple[np.ndarray, str, str]:
    """Returns a picture, its name, and what else is true of it."""
    canvas, known = blank(), sprites(side)
    if rng.random() < self.digits:
      digit = known.digits[rng.integers(max(1, int(self.part * len(known.digits))))]
      ink, size = str(rng.choice(list(INKS))), int(rng.integers(18, 29))
      corner = place(rng, size)
      paint(canvas, digit.ink, size, corner, INKS[ink])
      name = f"{ink} {digit.label}"
    else:
      thing = known.things[rng.integers(max(1, int(self.part * len(known.things))))]
      size = int(rng.integers(22, 31))
      corner = place(rng, size)
      paint(canvas, thing.pixels, size, corner)
      name = f"{bare(thing.kind)}: {thing.name}"
    half = (corner[0] + size / 2 < 16, corner[1] + size / 2 < 16)
    where = f"{'top' if half[0] else 'bottom'} {'left' if half[1] else 'right'}"
    return shrink(canvas, pixels), name, f", {'large' if size > 24 else 'small'}, {where}"


@dataclasses.dataclass(frozen=True)
class Strings(Stream):
  """Three small digits side by side, read from left to right."""

  def draw(self, rng: np.random.Generator, pixels: int, side: str) -> Document:
    canvas, known = blank(CANVAS), sprites(side).digits
    cell, said = CANVAS // STRING, []
    for i in range(STRING):
      digit, size = known[rng.integers(len(known))], int(rng.integers(13, 16))
      top, left = int(rng.integers(0, CANVAS - size + 1)), int(rng.integers(0, cell - size + 1))
      paint(canvas, digit.ink, size, (top, i * cell + left), (0, 0, 0))
      said.append(f"{' ' if i else ''}{digit.label}")
    return [shrink(canvas, pixels), *said]


@dataclasses.dataclass(frozen=True)
class AskedStrings(Strings):
  """The same with a question before the answer, for fine-tuning."""

  def draw(self, rng: np.random.Generator, pixels: int, side: str) -> Document:
    image, first, *rest = super().draw(rng, pixels, side)
    return [image, Given(QUESTION), f" {first}", *rest]


@dataclasses.dataclass(frozen=True)
class Bound(Stream):
  """Documents in which pictures of a few classes have letters that hold in that document alone.

  A class is one look of a thing, its hues turned for this document; each shot is placed anew.

  Attributes:
    ways: classes of a document.
    shots: pictures before the last one.
    equal: whether each class has as many of these; else classes are drawn at random.
    novel: whether the things are those that training never shows.
    prose: whether a passage of prose comes first.
  """

  ways: int = 2
  shots: int = 8
  equal: bool = False
  novel: bool = False
  prose: bool = True

  def draw(self, rng: np.random.Generator, pixels: int, side: str) -> Document:
    classes, letters = self.bind(rng)
    order = shots(rng, self.shots, self.ways, equal=self.equal)
    parts: Document = [passage(rng, side, PASSAGE)] if self.prose else []
    for i in order:
      parts += [shot(rng, classes[i], pixels), letters[i]]
    return parts

  def bind(self, rng: np.random.Generator) -> tuple[list[np.ndarray], list[str]]:
    """Returns the pixels of each class and its letter."""
    known = sprites("train").novel if self.novel else sprites("train").things
    chosen = different(rng, known, self.ways)
    letters = rng.choice(list(LETTERS), self.ways, replace=False)
    return [turn_hue(thing.pixels, rng.random()) for thing in chosen], [str(x) for x in letters]


@dataclasses.dataclass(frozen=True)
class Loose(Stream):
  """Captions as the web has them: each says one of several true things, and nothing tells which.

  Attributes:
    noise: share that say something of another picture.
    long: share that say all there is to say, always truly.
  """

  noise: float = 0.0
  long: float = 0.0

  def draw(self, rng: np.random.Generator, pixels: int, side: str) -> Document:
    image, true = described(rng, pixels, side, digit=bool(rng.random() < 0.5))
    if rng.random() < self.long:
      return [image, ", ".join(true.values())]
    if rng.random() < self.noise:
      _, true = described(rng, pixels, side, digit=bool(rng.random() < 0.5))
    return [image, true[str(rng.choice(list(true)))]]


@dataclasses.dataclass(frozen=True)
class Themed(Stream):
  """Documents with a theme: prose, then pictures of which the same thing is said of each.

  What is said of them, a digit's ink or its number for instance, is to be read off the first ones.

  Attributes:
    shots: pictures before the last one.
    prose: whether a passage of prose comes first.
    digit: whether the pictures are digits; None is either, by chance.
  """

  shots: int = 7
  prose: bool = True
  digit: bool | None = None

  def draw(self, rng: np.random.Generator, pixels: int, side: str) -> Document:
    digit = bool(rng.random() < 0.5) if self.digit is None else self.digit
    theme = str(rng.choice(DIGIT_THEMES if digit else THING_THEMES))
    parts: Document = [passage(rng, side, PASSAGE)] if self.prose else []
    for _ in range(self.shots + 1):
      image, true = described(rng, pixels, side, digit=digit)
      parts += [image, true[theme]]
    return parts


@dataclasses.dataclass(frozen=True)
class Prose(Stream):
  """Passages of text."""

  characters: int = 360

  def draw(self, rng: np.random.Generator, pixels: int, side: str) -> Document:
    return [passage(rng, side, self.characters)]


@dataclasses.dataclass(frozen=True)
class Repeats(Stream):
  """Words in a random order, that order again and again: what followed a word will follow it again.

  Attributes:
    longest: words before they come again, at most.
    words: of a document.
  """

  longest: int = 16
  words: int = 60

  def draw(self, rng: np.random.Generator, pixels: int, side: str) -> Document:
    known = [*vocabulary(), *LETTERS]
    period = int(rng.integers(4, self.longest + 1))
    chosen = [known[i] for i in rng.choice(len(known), period, replace=False)]
    return [Given(chosen[i]) if i < period else chosen[i % period] for i in range(self.words)]


@dataclasses.dataclass(frozen=True)
class Pairs(Stream):
  """Words with letters that hold in that document alone.

  Attributes:
    ways: different words of a document.
    shots: words before the last one.
    equal: as in `Bound`.
    repeat: whether the words come in the same order again and again, which is easier.
  """

  ways: int = 4
  shots: int = 24
  equal: bool = False
  repeat: bool = False

  def draw(self, rng: np.random.Generator, pixels: int, side: str) -> Document:
    words = [str(w) for w in rng.choice(vocabulary(), self.ways, replace=False)]
    letters = [str(x) for x in rng.choice(list(LETTERS), self.ways, replace=False)]
    if self.repeat:
      order = np.arange(self.shots + 1) % self.ways
    else:
      order = shots(rng, self.shots, self.ways, equal=self.equal)
    return [part for i in order for part in (Given(words[i]), letters[i])]


@dataclasses.dataclass(frozen=True)
class Facts(Stream):
  """What a thing is called in another language. All facts are trained on: it is memory that counts.

  Attributes:
    things: of which there are facts, at most 240; eight facts each.
  """

  things: int = 240

  def draw(self, rng: np.random.Generator, pixels: int, side: str) -> Document:
    return fact(rng.integers(8 * self.things))


def fact(number: int) -> Document:
  """Returns fact 0 to 1919: what is asked, and the answer."""
  names = facts()[number // 8]
  language = list(names)[1 + number % 8]
  return [Given(f"{names['en']}, {language}:"), f" {names[language]}"]


@functools.cache
def facts() -> list[dict[str, str]]:
  """Returns names of things by language, English first; see data/README.md."""
  path = pathlib.Path(__file__).parent / "data" / "names.tsv"
  with path.open(encoding="utf-8") as file:
    return list(csv.DictReader(file, delimiter="\t"))


def bare(kind: str) -> str:
  """Returns a kind without its article."""
  return kind.removeprefix("a ").removeprefix("an ")


def described(
  rng: np.random.Generator, pixels: int, side: str, *, digit: bool
) -> tuple[np.ndarray, dict[str, str]]:
  """Returns a picture of a digit or of a thing, and what can be said of it by theme."""
  image, name, _ = Named(digits=float(digit)).picture(rng, pixels, side)
  if digit:
    ink, number = name.split(" ")
    said = (number, NUMBERS[int(number)], ink, SPANISH[ink])
    return image, dict(zip(DIGIT_THEMES, said, strict=True))
  return image, dict(zip(THING_THEMES, name.split(": ", 1), strict=True))


def different(rng: np.random.Generator, things: tuple[Thing, ...], num: int) -> list[Thing]:
  """Returns things of so many different concepts."""
  chosen: dict[str, Thing] = {}
  while len(chosen) < num:
    thing = things[rng.integers(len(things))]
    chosen.setdefault(thing.concept, thing)
  return list(chosen.values())


def shots(rng: np.random.Generator, num: int, ways: int, *, equal: bool) -> np.ndarray:
  """Returns the classes of so many shots and of one more, which any class is as likely to be."""
  if not equal:
    return rng.integers(ways, size=num + 1)
  return np.append(rng.permutation(np.arange(num) % ways), rng.integers(ways))


def shot(rng: np.random.Generator, sprite: np.ndarray, pixels: int) -> np.ndarray:
  """Returns a picture of a class, placed anew."""
  canvas, size = blank(), int(rng.integers(24, 31))
  paint(canvas, sprite, size, place(rng, size))
  return shrink(canvas, pixels)


def passage(rng: np.random.Generator, side: str, characters: int) -> str:
  """Returns a piece of the sample's textbooks that begins with a word."""
  text = _prose(side)
  start = text.index(" ", int(rng.integers(len(text) - 2 * characters)))
  return text[start + 1 : text.rindex(" ", start, start + characters)]


@functools.cache
def _prose(side: str) -> str:
  path = f"{common.SAMPLE}/text-{side}-*.arrayrecord"
  source = Source(SourceConfig(name="text", path=path))
  records = (source[i] for i in range(len(source)))
  return " ".join("".join(item["text"] for item in record["content"]) for record in records)


@functools.cache
def vocabulary() -> list[str]:
  """Returns the words of `Pairs` and `Repeats`: all of the textbooks' that are one id each."""
  tokenizer = Tokenizer(TOKENIZER)
  words = sorted({word for word in _prose("train").lower().split() if word.isalpha()})
  return [f" {word}" for word in words if len(tokenizer.encode(f" {word}")) == 1]
