# SPDX-License-Identifier: Apache-2.0
"""From a draft to a record: pictures are fetched and looked at, and the filters applied.

A picture that is lost (missing, unreadable, filtered) takes its record with it. In interleaved
documents, unless `--lost-images=document`, it is removed alone, and the texts around it become one.
"""

import collections
from collections.abc import Set
from typing import Any

from mm1_jax.data.build import images
from mm1_jax.data.build.options import FORMATS, BuildOptions
from mm1_jax.data.build.rows import Draft, Filtered, Image, RowError, digest
from mm1_jax.data.image import ImageError
from mm1_jax.data.sources import Record, check_record

Items = list[dict[str, Any]]


class ImageFiltered(ImageError):
  """A good picture that a filter leaves out."""


class Refiner:
  """Makes records of drafts.

  Args:
    options: which filters.
    store: where pictures are; None if they come with their rows.
    repeated: digests of the URLs and pictures that too many records have.
  """

  def __init__(self, options: BuildOptions, store: images.Store | None, repeated: Set[bytes]):
    self._options = options
    self._store = store
    self._repeated = repeated
    self._image_alone = FORMATS[options.format].interleaved and options.lost_images == "image"

  def refine(self, draft: Draft, lost: collections.Counter) -> Record:
    """Returns the record, without the pictures that are lost; those are counted in `lost`.

    Raises:
      Filtered: a filter leaves it out.
      RowError: it cannot be used.
    """
    record, seen = draft.record, set()
    if "turns" in record:
      turns = [{**t, "content": self._items(t["content"], seen, lost)} for t in record["turns"]]
      record = {**record, "turns": turns}
      content = [item for turn in turns for item in turn["content"]]
    else:
      content = self._items(record["content"], seen, lost)
      record = {**record, "content": content}
    self._check(record, content)
    record = _trimmed(record)
    check_record(record, draft.where)
    return record

  def fetch(self, image: Image) -> bytes:
    """Returns the bytes of a picture.

    Raises:
      ImageError: it is not there, or too large.
    """
    if image.problem:
      raise ImageError(image.problem)
    if image.data is None:
      if self._store is None:
        raise ImageError(images.MISSING)
      return self._store.read(image)
    if len(image.data) > self._options.max_image_mb * 1e6:
      raise ImageError(images.FILE_TOO_LARGE)
    return image.data

  def _items(self, items: Items, seen: set[bytes], lost: collections.Counter) -> Items:
    """Returns items with their bytes; `seen` has the pictures of the record so far."""
    kept: Items = []
    gap = False
    for item in items:
      image = item.get("image")
      if image is None:
        if gap and kept and "text" in kept[-1]:
          kept[-1] = {"text": _join(kept[-1]["text"], item["text"])}
        else:
          kept.append(dict(item))
        gap = False
        continue
      try:
        kept.append({"image": self._image(image, seen)})
      except ImageError as e:
        if not self._image_alone:
          kind = Filtered if isinstance(e, ImageFiltered) else RowError
          raise kind(e.reason) from e
        lost[e.reason] += 1
        gap = True
    return kept

  def _image(self, image: Image, seen: set[bytes]) -> bytes:
    """Returns the bytes of a picture that all filters let through."""
    url = image.url.lower()
    if any(word in url for word in self._options.url_words):
      raise ImageFiltered("image filtered: word in its URL")
    data = self.fetch(image)
    width, height = images.measure(data, decode=self._options.decode_images)
    self._check_shape(min(width, height), max(width, height))
    marks = image_marks(image, data)
    if not self._repeated.isdisjoint(marks):
      raise ImageFiltered("image filtered: repeated in the corpus")
    if self._options.first_copy_only:
      if not seen.isdisjoint(marks):
        raise ImageFiltered("image filtered: copy on the same page")
      seen.update(marks)
    return data

  def _check_shape(self, short: int, long: int) -> None:
    options = self._options
    if options.max_aspect is not None and long > options.max_aspect * short:
      raise ImageFiltered("image filtered: aspect")
    if options.min_side is not None and short < options.min_side:
      raise ImageFiltered("image filtered: too small")
    if options.max_side is not None and long > options.max_side:
      raise ImageFiltered("image filtered: too large")

  def _check(self, record: Record, content: Items) -> None:
    """Raises a RowError for what is wrong with a record as a whole."""
    options = self._options
    texts = [item["text"] for item in content if "text" in item]
    num_images = len(content) - len(texts)
    _check_texts(texts)
    if not num_images and not any(text.strip() for text in texts):
      raise RowError("empty")
    captioned = "content" in record and not FORMATS[options.format].interleaved
    if captioned and not all(text.strip() for text in texts):
      raise RowError("empty text")
    if sum(map(len, texts)) > options.max_chars:
      raise Filtered("text too long")
    if options.min_images is not None and num_images < options.min_images:
      raise Filtered("too few images")
    if options.max_images is not None and num_images > options.max_images:
      raise Filtered("too many images")


def image_marks(image: Image, data: bytes) -> set[bytes]:
  """Returns what two copies of a picture have in common: URL or bytes."""
  return {digest(data), *([digest(image.url)] if image.url else ())}


def _trimmed(record: Record) -> Record:
  """Returns a record whose texts neither begin nor end with spaces or line breaks.

  They are of the file that a text was in, and what is trained on them learns to write them.
  """
  if "turns" in record:
    turns = [{**turn, "content": _without_edges(turn["content"])} for turn in record["turns"]]
    return {**record, "turns": turns}
  return {**record, "content": _without_edges(record["content"])}


def _without_edges(items: Items) -> Items:
  trimmed = [{"text": item["text"].strip()} if "text" in item else item for item in items]
  return [item for item in trimmed if item.get("text", True)]


def _check_texts(texts: list[str]) -> None:
  for text in texts:
    if "\0" in text:
      raise RowError("NUL in text")
    try:
      text.encode()
    except UnicodeEncodeError as e:
      raise RowError("half a character in text") from e  # a lone surrogate of UTF-16


def _join(first: str, second: str) -> str:
  """Joins two texts that had a picture between them."""
  return first + ("" if first[-1:].isspace() or second[:1].isspace() else "\n") + second
