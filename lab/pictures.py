# SPDX-License-Identifier: Apache-2.0
"""Sprites cut out of the shipped sample's small world, and pictures drawn anew from them.

The sample's records name what each of their pictures was drawn from ("mnist/17", "noto/1f98a");
see `mm1_jax.data.build.world`. A digit is kept as its ink's share of each pixel, a thing as it is.
What the sample holds out is held out here: other handwriting, and of every concept another look.
`NOVEL`, concepts of training's own side, are in no caption and no document of training at all.
"""

import dataclasses
import functools
import io
import re
from collections.abc import Iterator

import numpy as np
import PIL.Image

from mm1_jax.config import SourceConfig
from mm1_jax.configs import common
from mm1_jax.data.build.world import INKS, KINDS, Record
from mm1_jax.data.sources import Source

SIDE = 32  # pixels of a picture, unless a run draws larger ones
SMALLEST = 9  # pixels of a sprite: less is what is left of one that was cut off
NOVEL_SHARE = 4  # of so many concepts one is novel
_DIGIT = re.compile(rf"\ban? ({'|'.join(INKS)}) (\d)")
_THING = re.compile(rf"\b({'|'.join(KINDS)}): ([^,.\n]+)")


@dataclasses.dataclass(frozen=True)
class Digit:
  """A handwritten digit: float32[h, w], 1 where the ink is."""

  label: int
  ink: np.ndarray


@dataclasses.dataclass(frozen=True)
class Thing:
  """One look of a concept: uint8[h, w, 3] on white."""

  concept: str  # Unicode code points
  kind: str  # one of `KINDS`
  name: str
  pixels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Sprites:
  """Of one side; nothing is in two of them."""

  digits: tuple[Digit, ...]
  things: tuple[Thing, ...]  # concepts that training names
  novel: tuple[Thing, ...]  # concepts that training never shows


@functools.cache
def sprites(side: str) -> Sprites:
  """Returns the sprites of "train" or "heldout", in a fixed order.

  The look of a concept that the sample holds out has no name beside it; training's looks have.
  """
  digits: dict[str, Digit] = {}
  things: dict[str, Thing] = {}
  names = _names()
  for record in _records(side):
    for origin, image, said in _shown(record):
      pixels = _crop(np.asarray(PIL.Image.open(io.BytesIO(image)).convert("RGB")))
      set_, _, concept = origin.partition("/")
      if set_ == "mnist" and said is not None:
        digits[origin] = Digit(int(said), _ink(pixels))
      elif set_ != "mnist" and concept in names and min(pixels.shape[:2]) >= SMALLEST:
        known = things.get(origin)
        if known is None or known.pixels.size < pixels.size:  # the largest has most detail
          things[origin] = Thing(concept, *names[concept], pixels)
  concepts = sorted(names)
  novel = set(concepts[::NOVEL_SHARE])
  ordered = [things[origin] for origin in sorted(things)]
  return Sprites(
    tuple(digits[origin] for origin in sorted(digits)),
    tuple(thing for thing in ordered if thing.concept not in novel),
    tuple(thing for thing in ordered if thing.concept in novel),
  )


def _records(side: str) -> Iterator[Record]:
  parts = (
    ("captions_world", "interleaved_world", "questions") if side == "train" else ("questions",)
  )
  for part in parts:
    path = f"{common.SAMPLE}/{part}-{side}-*.arrayrecord"
    source = Source(SourceConfig(name=part, path=path))
    yield from (source[i] for i in range(len(source)))


@functools.cache
def _names() -> dict[str, tuple[str, str]]:
  """Returns kind and name of each concept, as training's captions and documents have them."""
  names = {}
  for record in _records("train"):
    if "content" in record:
      text = "".join(item.get("text", "") for item in record["content"])
      concepts = [p.partition("/")[2] for p in record["pictures"] if not p.startswith("mnist/")]
      said = [(m[1].lower(), m[2]) for m in re.finditer(_THING.pattern, text, re.IGNORECASE)]
      names |= zip(concepts, said, strict=True)
  return names


def _shown(record: Record) -> Iterator[tuple[str, bytes, str | None]]:
  """Yields origin and bytes of single pictures, and of a digit what it is, if the record says so.

  A picture of several things is left out: a sprite is one.
  """
  if "turns" in record:
    turns = record["turns"]
    asked = dict(zip(record["asks"], turns[1::2], strict=True))
    images = [item["image"] for item in turns[0]["content"] if "image" in item]
    if len(images) == 1 and "count" not in asked:
      answer = asked.get("number")
      yield record["pictures"][0], images[0], answer and answer["content"][0]["text"]
    return
  items = record["content"]
  text = "".join(item.get("text", "") for item in items)
  digits = iter([match[2] for match in re.finditer(_DIGIT.pattern, text, re.IGNORECASE)])
  times = iter(re.findall(rf"(?:{_THING.pattern})(, \w+ times)?", text, re.IGNORECASE))
  images = [item["image"] for item in items if "image" in item]
  for origin, image in zip(record["pictures"], images, strict=True):
    if origin.startswith("mnist/"):
      yield origin, image, next(digits)
    elif not next(times)[-1]:
      yield origin, image, None


def _crop(pixels: np.ndarray) -> np.ndarray:
  """Returns what is not white."""
  there = pixels.min(axis=2) < 235
  if not there.any():
    return pixels[:1, :1]
  rows, columns = np.flatnonzero(there.any(axis=1)), np.flatnonzero(there.any(axis=0))
  return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _ink(pixels: np.ndarray) -> np.ndarray:
  """Returns the share of ink of each pixel: how far it is from white, the furthest being 1."""
  distance = np.linalg.norm(255.0 - pixels.astype(np.float32), axis=2)
  return (distance / max(distance.max(), 1.0)).astype(np.float32)


# --- drawing


def blank(side: int = SIDE) -> np.ndarray:
  return np.full((side, side, 3), 255, np.float32)


def paint(
  canvas: np.ndarray, sprite: np.ndarray, size: int, corner: tuple[int, int], color=None
) -> None:
  """Draws a sprite, its longer side `size` pixels, with its upper left corner there.

  Args:
    canvas: float32[H, W, 3], changed.
    sprite: float32[h, w] of ink, drawn in `color`, or uint8[h, w, 3].
    size: pixels.
    corner: row, column; what is out of the canvas is cut off.
    color: of ink.
  """
  height, width = sprite.shape[:2]
  scale = size / max(height, width)
  shape = max(1, round(width * scale)), max(1, round(height * scale))
  how = PIL.Image.Resampling.BOX if scale < 1 else PIL.Image.Resampling.BILINEAR
  drawn = np.asarray(PIL.Image.fromarray(sprite).resize(shape, how), np.float32)
  top, left = corner
  part = canvas[top : top + drawn.shape[0], left : left + drawn.shape[1]]
  drawn = drawn[: part.shape[0], : part.shape[1]]
  if drawn.ndim == 2:
    share = drawn[..., None]
    part[:] = part * (1 - share) + share * np.asarray(color, np.float32)
  else:
    part[:] = np.minimum(part, drawn)


def place(rng: np.random.Generator, size: int, side: int = SIDE) -> tuple[int, int]:
  """Returns a corner at random such that a sprite of a size is inside."""
  top, left = rng.integers(0, max(1, side - size + 1), 2)
  return int(top), int(left)


def shrink(canvas: np.ndarray, pixels: int) -> np.ndarray:
  """Returns a canvas as uint8[pixels, pixels, 3]."""
  whole = np.clip(canvas, 0, 255).astype(np.uint8)
  if whole.shape[0] == pixels:
    return whole
  how = PIL.Image.Resampling.BOX if pixels < whole.shape[0] else PIL.Image.Resampling.BICUBIC
  return np.asarray(PIL.Image.fromarray(whole).resize((pixels, pixels), how))


def turn_hue(pixels: np.ndarray, turn: float) -> np.ndarray:
  """Returns uint8 pixels with their hues turned by a share of the circle; white stays white."""
  hsv = np.array(PIL.Image.fromarray(pixels).convert("HSV"))
  hsv[..., 0] += np.uint8(int(turn * 256) % 256)
  return np.asarray(PIL.Image.fromarray(hsv, "HSV").convert("RGB"))
