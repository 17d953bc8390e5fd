# SPDX-License-Identifier: Apache-2.0
"""The contents of packed rows, read from the arrays that the model gets, and their invariants.

Nothing here uses the code that packs rows: it must find that code's mistakes.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mm1_jax.batch import Batch
from mm1_jax.data.examples import Encoder
from mm1_jax.data.tokenizer import IMAGE, IMAGE_END, IMAGE_START

MAX_PLACES = 5  # named of each check that fails


class Run(NamedTuple):
  """The <image> ids that one slot's picture is put at: positions `start` to `stop` of a row."""

  start: int
  stop: int
  slot: int


@dataclasses.dataclass(frozen=True)
class RowSegment:
  """Positions of a row with the same segment id, one after another."""

  number: int  # the segment id
  start: int
  stop: int
  source_id: int
  runs: tuple[Run, ...]  # in order

  def __len__(self) -> int:
    return self.stop - self.start


class Words(NamedTuple):
  """Text of a segment, or the name of one special id, and whether it is trained on."""

  text: str
  special: bool
  trained: bool


@dataclasses.dataclass
class Check:
  """Something that must hold, how often it was checked, and where it fails."""

  name: str
  tested: int = 0
  failed: int = 0
  places: list[str] = dataclasses.field(default_factory=list)  # the first few

  def add(self, tested: int, failures: Iterable[tuple[int, str]] = ()) -> None:
    """Counts `tested` cases; each failure says how many of them it is, and where."""
    self.tested += tested
    for count, place in failures:
      self.failed += count
      if len(self.places) < MAX_PLACES:
        self.places.append(place)


def row_of(batch: Batch, row: int) -> Batch:
  return Batch(*(np.asarray(field[row]) for field in batch))


def segments_of(row: Batch, encoder: Encoder) -> list[RowSegment]:
  """Returns the segments of one row, each with its pictures."""
  runs = runs_of(row.tokens, encoder)
  return [
    RowSegment(
      number=int(row.segment_ids[start]),
      start=start,
      stop=stop,
      source_id=int(row.source_ids[start]),
      runs=tuple(run for run in runs if start <= run.start < stop),
    )
    for start, stop in stretches(row.segment_ids)
    if row.segment_ids[start]
  ]


def runs_of(tokens: np.ndarray, encoder: Encoder) -> list[Run]:
  """Returns the runs of a row, as the model finds them: T placeholders take the next slot."""
  where = np.flatnonzero(tokens == encoder.tokenizer.image_id)
  size = encoder.tokens_per_image
  parts = (where[i : i + size] for i in range(0, len(where), size))
  return [Run(int(part[0]), int(part[-1]) + 1, slot) for slot, part in enumerate(parts)]


def stretches(values: np.ndarray) -> Iterator[tuple[int, int]]:
  """Yields where each stretch of equal values starts and stops."""
  edges = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
  yield from itertools.pairwise(edges)


def odd_loss(batch: Batch, encoder: Encoder) -> np.ndarray:
  """Returns bool like `loss_mask`: trained on padding, or to predict a picture."""
  specials = encoder.tokenizer
  pictures = (specials.image_id, specials.image_start_id, specials.image_end_id)
  return (batch.loss_mask != 0) & ((batch.segment_ids == 0) | np.isin(batch.targets, pictures))


def words_of(row: Batch, segment: RowSegment, encoder: Encoder) -> list[Words | Run]:
  """Returns a segment's contents: its first token, then all targets, with its pictures.

  A token is trained on where the position before it has loss.
  """
  tokenizer = encoder.tokenizer
  names = {
    tokenizer.pad_id: "<pad>",
    tokenizer.bos_id: "<s>",
    tokenizer.eos_id: "</s>",
    tokenizer.unk_id: "<unk>",
    tokenizer.image_id: IMAGE,
    tokenizer.image_start_id: IMAGE_START,
    tokenizer.image_end_id: IMAGE_END,
  }
  ids = [*row.tokens[segment.start : segment.stop].tolist(), int(row.targets[segment.stop - 1])]
  trained = [False, *(row.loss_mask[segment.start : segment.stop] != 0).tolist()]
  starts = {run.start - segment.start: run for run in segment.runs}
  parts: list[Words | Run] = []
  text: list[int] = []

  def flush(at: int) -> None:
    if text:
      parts.append(Words(tokenizer.decode(text), False, trained[at - 1]))
      text.clear()

  for i, token in enumerate(ids):
    inside = token == tokenizer.image_id and i < len(segment)
    if text and (token in names or trained[i] != trained[i - 1]):
      flush(i)
    if i in starts:
      parts.append(starts[i])
    elif token in names and not inside:
      parts.append(Words(names[token], True, trained[i]))
    elif not inside:
      text.append(token)
  flush(len(ids))
  return parts


class Checks:
  """The invariants of a `Batch`, counted over any number of batches."""

  def __init__(self, encoder: Encoder, num_sources: int):
    self._encoder = encoder
    self._num_sources = num_sources
    self._all: dict[str, Check] = {}

  def __iter__(self) -> Iterator[Check]:
    return iter(self._all.values())

  def __getitem__(self, name: str) -> Check:
    return self._all.setdefault(name, Check(name))

  def add_batch(self, batch: Batch, row_names: Sequence[str]) -> None:
    """Checks all that follows from the arrays alone."""
    self._add_segments(batch, row_names)
    self._add_loss(batch, row_names)
    for r, name in enumerate(row_names):
      self._add_pictures(row_of(batch, r), name)

  def _add_segments(self, batch: Batch, row_names: Sequence[str]) -> None:
    ids, used = batch.segment_ids, batch.segment_ids != 0
    goes_on = np.zeros_like(used)
    goes_on[:, 1:] = (ids[:, 1:] == ids[:, :-1]) & used[:, 1:]
    begins = used & ~goes_on
    at = np.arange(ids.shape[1])[None]
    expected = np.where(used, np.cumsum(begins, axis=1), 0)
    after_padding = used & (np.cumsum(~used, axis=1) > 0)
    self._positions(
      "segments are 1, 2, 3, ... in one piece each, then padding: attention stays inside them",
      *((ids != expected) | after_padding, row_names, used.size),
    )
    starts = np.maximum.accumulate(np.where(begins, at, 0), axis=1)
    self._positions(
      "positions restart at 0 in every segment and count up",
      *(batch.positions != np.where(used, at - starts, 0), row_names, used.size),
    )
    shifted = np.zeros_like(used)
    shifted[:, :-1] = goes_on[:, 1:] & (batch.targets[:, :-1] != batch.tokens[:, 1:])
    self._positions(
      "targets are the next token of the same segment", shifted, row_names, int(goes_on.sum())
    )
    source, number = batch.source_ids, self._num_sources
    mixed = np.zeros_like(used)
    mixed[:, 1:] = goes_on[:, 1:] & (source[:, 1:] != source[:, :-1])
    self._positions(
      "a segment is of one source, and of one that exists",
      *(mixed | (used & ((source < 0) | (source >= number))), row_names, int(used.sum())),
    )
    size = self._encoder.tokenizer.vocab_size
    outside = [(field < 0) | (field >= size) for field in (batch.tokens, batch.targets)]
    self._positions(
      "tokens and targets are in the vocabulary", outside[0] | outside[1], row_names, used.size
    )

  def _add_loss(self, batch: Batch, row_names: Sequence[str]) -> None:
    padding, odd = batch.segment_ids == 0, odd_loss(batch, self._encoder)
    self._positions("no loss on padding", odd & padding, row_names, int(padding.sum()))
    self._positions("no loss on pictures", odd & ~padding, row_names, int((~padding).sum()))
    strange = (batch.loss_mask != 0) & (batch.loss_mask != 1)
    self._positions("the loss mask is 0 or 1", strange, row_names, strange.size)

  def _add_pictures(self, row: Batch, name: str) -> None:
    tokenizer, size = self._encoder.tokenizer, self._encoder.tokens_per_image
    used, slots = int(row.image_mask.sum()), len(row.image_mask)
    placeholders = int((row.tokens == tokenizer.image_id).sum())
    same = placeholders == size * used
    self["every picture has its run of <image>, and every run its picture"].add(
      1,
      ()
      if same
      else [(1, f"{name}: {placeholders} <image> ids of {size} a picture, {used} pictures")],
    )
    in_front = bool(row.image_mask[:used].all())
    self["pictures take the first slots of a row"].add(
      1, () if in_front else [(1, f"{name}: slots {np.flatnonzero(row.image_mask).tolist()}")]
    )
    blank = [i for i in range(slots) if not row.image_mask[i] and row.images[i].any()]
    self["empty slots are blank"].add(slots - used, [(1, f"{name}, slot {i}") for i in blank])
    check = self["runs of <image> are whole, in one segment, between their delimiters"]
    runs = runs_of(row.tokens, self._encoder)
    broken = [run for run in runs if not self._whole(row, run)]
    check.add(len(runs), [(1, f"{name}, {_span(run.start, run.stop)}") for run in broken])

  def _whole(self, row: Batch, run: Run) -> bool:
    tokenizer = self._encoder.tokenizer
    start, stop = run.start, run.stop
    if self._encoder.image_delimiters:
      around = [row.tokens[start - 1] if start else -1, *row.tokens[stop : stop + 1].tolist()]
      if around != [tokenizer.image_start_id, tokenizer.image_end_id]:
        return False
      start, stop = start - 1, stop + 1
    ids = row.segment_ids[start:stop]
    return (
      run.stop - run.start == self._encoder.tokens_per_image
      and ids[0] != 0
      and (ids == ids[0]).all()
    )

  def _positions(self, name: str, bad: np.ndarray, row_names: Sequence[str], tested: int) -> None:
    failures = (
      (stop - start, f"{row_names[r]}, {_span(start, stop)}")
      for r in np.flatnonzero(bad.any(axis=1)).tolist()
      for start, stop in stretches(bad[r])
      if bad[r][start]
    )
    self[name].add(tested, failures)


def _span(start: int, stop: int) -> str:
  return f"position {start}" if stop == start + 1 else f"positions {start} to {stop - 1}"


@dataclasses.dataclass
class SourceFacts:
  """What one source has in the rows that were read."""

  name: str
  asked: float = 0.0  # share of positions
  asked_examples: float = 0.0  # share of examples
  planned: int = 0  # positions in all rows of the steps
  planned_examples: float = 0.0  # there; of one that is cut, the share that is in these rows
  positions: int = 0
  trained: int = 0
  pictures: int = 0
  parts: int = 0  # segments that are a part of their record
  lengths: list[int] = dataclasses.field(default_factory=list)  # of its segments
  drops: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  left_out: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def add(self, row: Batch, segment: RowSegment) -> None:
    self.positions += len(segment)
    self.trained += int((row.loss_mask[segment.start : segment.stop] != 0).sum())
    self.pictures += len(segment.runs)
    self.lengths.append(len(segment))
