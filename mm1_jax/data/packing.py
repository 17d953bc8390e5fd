# SPDX-License-Identifier: Apache-2.0
"""Packing: which examples share a row, and the arrays of that row.

A row has room for S positions and N images, and an example needs some of both. A row of captions
runs out of image slots, a row of text leaves them empty. So each row gets some of all: parts of
long documents up to their share of a row, then captions and other short examples, such that
positions and slots are used up together, and last the text that may be cut to any length.
All of this uses lengths alone; examples are read when a batch is made.
"""

import bisect
import collections
import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mm1_jax.batch import Batch
from mm1_jax.data.examples import Example

# Examples longer than this share of a row are placed first, and documents may be cut; shorter ones
# stay whole.
LONG = 0.25
# A document is not cut into parts shorter than this share of a row, where that can be avoided ...
SHORTEST_CUT = 0.125
# ... but a text may give a part of this share to a row that would else stay unfilled.
SHORTEST_FILL = 1 / 32
# The share of short examples that rows are filled with first. Of the rest one of the right length
# is chosen when a row is nearly full.
PREPARED = 0.9
# How many documents are compared to find the one that fills a row best.
LOOK_AHEAD = 16


class Item(NamedTuple):
  """What packing needs of an example, or of the rest of one."""

  num_positions: int
  image_starts: Sequence[int]  # first positions of its pictures, ascending
  cuts: Sequence[int] | None  # where it may be cut, ascending; None is anywhere


class ItemSpan(NamedTuple):
  """Positions `start` to `stop` of item number `item`."""

  item: int
  start: int
  stop: int


class Packing(NamedTuple):
  """The parts in each row, and what is left over of the items without room."""

  rows: list[list[ItemSpan]]
  left: list[tuple[int, int]]  # item, first position that is in no row


class RowShape(NamedTuple):
  """What a row has room for."""

  seq_len: int
  images_per_row: int
  image_positions: int  # of one picture, delimiters included; never cut through


def pack(items: Sequence[Item], num_rows: int, shape: RowShape) -> Packing:
  """Packs items into rows, so that positions and image slots both fill up.

  Where there are more items than room, earlier items take precedence, and each kind gets about its
  share.

  Args:
    items: those that cannot be cut fit a row.
    num_rows: rows to fill.
    shape: of a row.
  """
  positions = np.array([item.num_positions for item in items], np.int64)
  images = np.array([len(item.image_starts) for item in items], np.int64)
  anywhere = np.array([item.cuts is None for item in items], bool)
  long = (positions > LONG * shape.seq_len) | (images > shape.images_per_row)
  documents = np.flatnonzero(long & ~anywhere).tolist()
  texts = np.flatnonzero(long & anywhere).tolist()
  short = np.flatnonzero(~long)
  total = max(int(positions.sum()), 1)
  room = min(1.0, num_rows * shape.seq_len / total)  # there is room for this share of all
  # The share of a row that is for long ones: a part of that length leaves short ones their share.
  best = max(int(shape.seq_len * positions[long].sum() / total), 1)
  before = np.cumsum(positions[short]) - positions[short]
  prepared = before < PREPARED * room * positions[short].sum()

  rows = _Rows(items, num_rows, shape)
  reserved = rows.reserve(best, room * positions[texts].sum())
  rows.place(documents, best, room * positions[documents].sum())
  waiting = rows.spread(sorted(short[prepared].tolist(), key=lambda i: -positions[i]))
  waiting = rows.fit(waiting + short[~prepared].tolist())
  rows.release(reserved)
  rows.pour(texts, np.argsort(-reserved, kind="stable").tolist())
  rows.fill(documents)
  rows.fit(waiting)
  return Packing(rows.parts, rows.left())


class _Rows:
  """Rows that are being filled, and how much of each item is in rows."""

  def __init__(self, items: Sequence[Item], num_rows: int, shape: RowShape):
    self.parts: list[list[ItemSpan]] = [[] for _ in range(num_rows)]
    self._items = items
    self._shape = shape
    self._reached = [0] * len(items)  # first position of each item that is in no row
    self._free_positions = np.full(num_rows, shape.seq_len)
    self._free_images = np.full(num_rows, shape.images_per_row)

  def left(self) -> list[tuple[int, int]]:
    """Returns the items that are not in rows up to their end, and how much of each is."""
    return [(i, n) for i, n in enumerate(self._reached) if n < self._items[i].num_positions]

  def reserve(self, best: int, num_positions: float) -> np.ndarray:
    """Keeps room for texts, in few rows and much in each; returns how much."""
    reserved = np.zeros_like(self._free_positions)
    while num_positions >= 1:
      row = int(np.argmin(reserved))
      size = min(best, int(num_positions), self._shape.seq_len - int(reserved[row]))
      if size == 0:
        break
      reserved[row] += size
      num_positions -= size
    self._free_positions -= reserved
    return reserved

  def release(self, reserved: np.ndarray) -> None:
    self._free_positions += reserved

  def place(self, documents: Sequence[int], best: int, num_positions: float) -> None:
    """Puts parts of documents into rows: of each document's next part, the longest goes first.

    Each goes into the emptiest row, so that rows have about equal room for short ones. If there are
    hardly any short ones, each goes where it leaves least room.

    Args:
      documents: in order of precedence, if there is no room for all.
      best: how long a part should be.
      num_positions: of all parts together, at most.
    """
    level = best <= (1 - SHORTEST_CUT) * self._shape.seq_len
    ends, queue = {}, []
    for i in documents:
      ends[i] = min(num_positions, self._items[i].num_positions)
      num_positions -= ends[i]
      if ends[i] > 0:
        queue.append((-self._next_size(i, best), i))
    heapq.heapify(queue)
    while queue:
      size, i = heapq.heappop(queue)
      start, stop = self._reached[i], self._reached[i] - size
      row = self._row_for(stop - start, _count(self._items[i], start, stop), level=level)
      if row is None:  # then a shorter part, or the document waits
        row = int(np.argmax(self._free_positions))
        stop = self._furthest_cut(row, i)
        if not self._worthwhile(i, stop):
          continue
      self._put(row, i, stop)
      if stop < ends[i]:
        heapq.heappush(queue, (-self._next_size(i, best), i))

  def spread(self, short: Sequence[int]) -> list[int]:
    """Puts items where there is most room for each free slot; returns those without room.

    So positions and slots of a row are used up together: rows with few free positions get short
    captions. A row's last slot is left to `fit`.
    """
    left = []
    for i in short:
      size, images = self._items[i].num_positions, len(self._items[i].image_starts)
      fits = (self._free_positions >= size) & (self._free_images > images if images else True)
      room = np.where(fits, self._free_positions / np.maximum(self._free_images, 1), -1.0)
      row = int(np.argmax(room))
      if fits[row]:
        self._put(row, i, size)
      else:
        left.append(i)
    return left

  def fit(self, short: Sequence[int]) -> list[int]:
    """Fills the fullest row first, each with the longest that fit; returns what is left."""
    by_images: dict[int, list[tuple[int, int]]] = {}
    for i in short:
      item = self._items[i]
      by_images.setdefault(len(item.image_starts), []).append((item.num_positions, i))
    for group in by_images.values():
      group.sort(key=lambda entry: (entry[0], -entry[1]))  # of equal ones, the first is taken first
    for row in np.argsort(self._free_positions, kind="stable").tolist():
      while True:
        room = int(self._free_positions[row])
        fitting = [
          (group[at - 1][0], images)
          for images, group in by_images.items()
          if images <= self._free_images[row]
          and (at := bisect.bisect_right(group, room, key=lambda entry: entry[0]))
        ]
        if not fitting:
          break
        size, images = max(fitting)
        group = by_images[images]
        _, i = group.pop(bisect.bisect_right(group, size, key=lambda entry: entry[0]) - 1)
        self._put(row, i, size)
    return sorted(i for group in by_images.values() for _, i in group)

  def pour(self, texts: Sequence[int], rows: Sequence[int]) -> None:
    """Fills rows to the last position with texts, one after another, cut where a row ends."""
    queue = collections.deque(texts)
    for row in rows:
      while queue:
        i, room = queue[0], int(self._free_positions[row])
        stop = min(self._items[i].num_positions, self._reached[i] + room)
        whole = stop == self._items[i].num_positions
        if not whole and room < SHORTEST_FILL * self._shape.seq_len:
          break
        self._put(row, i, stop)
        if whole:
          queue.popleft()

  def fill(self, documents: Sequence[int]) -> None:
    """Fills gaps with more parts of documents; of the first few, the one that fills a gap best."""
    queue = [i for i in documents if self._reached[i] < self._items[i].num_positions]
    least = SHORTEST_CUT * self._shape.seq_len
    for row in np.flatnonzero(self._free_positions >= least).tolist():
      while True:
        stops = [(i, self._furthest_cut(row, i)) for i in queue[:LOOK_AHEAD]]
        stops = [(stop - self._reached[i], i) for i, stop in stops if self._worthwhile(i, stop)]
        if not stops:
          break
        size, i = max(stops)
        self._put(row, i, self._reached[i] + size)
        if self._reached[i] == self._items[i].num_positions:
          queue.remove(i)

  def _next_size(self, i: int, best: int) -> int:
    """Returns the length of a document's next part, if it had a row to itself."""
    item, start, shape = self._items[i], self._reached[i], self._shape
    stop = furthest_cut(item, start, best, shape.images_per_row, shape)
    if not self._worthwhile(i, stop):
      stop = next_cut(item, stop)
      if stop - start > shape.seq_len or _count(item, start, stop) > shape.images_per_row:
        stop = furthest_cut(item, start, shape.seq_len, shape.images_per_row, shape)
    return stop - start

  def _furthest_cut(self, row: int, i: int) -> int:
    room = int(self._free_positions[row]), int(self._free_images[row])
    return furthest_cut(self._items[i], self._reached[i], *room, self._shape)

  def _worthwhile(self, i: int, stop: int) -> bool:
    size = stop - self._reached[i]
    whole = stop == self._items[i].num_positions
    return size > 0 and (whole or size >= SHORTEST_CUT * self._shape.seq_len)

  def _row_for(self, positions: int, images: int, *, level: bool) -> int | None:
    """Returns the emptiest row with room, to keep rows level, or the fullest; None if none has."""
    fits = (self._free_positions >= positions) & (self._free_images >= images)
    free = self._free_positions if level else -self._free_positions
    row = int(np.argmax(np.where(fits, free, -self._shape.seq_len - 1)))
    return row if fits[row] else None

  def _put(self, row: int, i: int, stop: int) -> None:
    """Puts item `i`, from its first position that is in no row up to `stop`, into a row."""
    part = ItemSpan(i, self._reached[i], stop)
    self.parts[row].append(part)
    self._free_positions[row] -= part.stop - part.start
    self._free_images[row] -= _count(self._items[i], part.start, part.stop)
    self._reached[i] = stop


def _count(item: Item, start: int, stop: int) -> int:
  """Returns how many pictures begin from `start` on and before `stop`."""
  return bisect.bisect_left(item.image_starts, stop) - bisect.bisect_left(item.image_starts, start)


def next_cut(item: Item, stop: int) -> int:
  """Returns the first place after `stop` where an item may be cut, or its end."""
  at = bisect.bisect_right(item.cuts or (), stop)
  return item.cuts[at] if item.cuts and at < len(item.cuts) else item.num_positions


def furthest_cut(
  item: Item, start: int, max_positions: int, max_images: int, shape: RowShape
) -> int:
  """Returns where a part from `start` on must end to keep within both limits; `start` if none fits.

  That is at one of the item's cuts. But where not even an empty row could hold the positions up to
  the next cut, the part ends at the limit, or before the picture that is there.
  """
  stop = min(start + max_positions, item.num_positions)
  first = bisect.bisect_left(item.image_starts, start)
  if first + max_images < len(item.image_starts):
    stop = min(stop, item.image_starts[first + max_images])
  if stop == item.num_positions or item.cuts is None:
    return stop
  at = bisect.bisect_right(item.cuts, stop)
  if at and item.cuts[at - 1] > start:
    return item.cuts[at - 1]
  end = next_cut(item, start)
  if end - start <= shape.seq_len and _count(item, start, end) <= shape.images_per_row:
    return start
  last = bisect.bisect_left(item.image_starts, stop) - 1
  if last >= first and item.image_starts[last] + shape.image_positions > stop:
    stop = item.image_starts[last]
  return stop


class Segment(NamedTuple):
  """An example in a row."""

  source_id: int
  example: Example


def assemble(
  segments: Sequence[Segment],
  pictures: np.ndarray,
  *,
  seq_len: int,
  images_per_row: int,
  pad_id: int,
) -> Batch:
  """Lays segments out in a row, one after another, with padding at the end.

  Args:
    segments: examples that fit `seq_len` and `images_per_row`.
    pictures: uint8[1, n, H, W, 3], theirs in order. Further ones mean nothing; they must be 0 where
      `stack` is to use this memory as it is.
    seq_len: S.
    images_per_row: N.
    pad_id: the id at padding positions.

  Returns:
    A `Batch` of one row, of numpy arrays. Its images are `pictures`: `stack` makes N of them.
  """
  shape = 1, seq_len
  row = Batch(
    tokens=np.full(shape, pad_id, np.int32),
    targets=np.full(shape, pad_id, np.int32),
    loss_mask=np.zeros(shape, np.float32),
    positions=np.zeros(shape, np.int32),
    segment_ids=np.zeros(shape, np.int32),
    source_ids=np.zeros(shape, np.int32),
    images=pictures,
    image_mask=np.zeros((1, images_per_row), bool),
  )
  start, num_images = 0, 0
  for number, (source_id, example) in enumerate(segments, start=1):
    at = 0, slice(start, start + len(example))
    row.tokens[at] = example.tokens
    row.targets[at] = example.targets
    row.loss_mask[at] = example.loss_mask
    row.positions[at] = np.arange(len(example))
    row.segment_ids[at] = number
    row.source_ids[at] = source_id
    start += len(example)
    num_images += len(example.images)
  row.image_mask[0, :num_images] = True
  return row


def stack(rows: Sequence[Batch]) -> Batch:
  """Returns rows as one batch, with N image slots each; unused ones are 0, in untouched memory.

  Pictures that were written to the rows of one array, as long as the batch, stay there.
  """
  fields = zip(*(row._replace(images=()) for row in rows), strict=True)
  batch = Batch(*map(np.concatenate, fields))
  shape = *batch.image_mask.shape, *rows[0].images.shape[2:]
  whole = rows[0].images.base
  if isinstance(whole, np.ndarray) and whole.shape == shape:
    addresses = [slots.ctypes.data for slots in whole]
    if addresses == [row.images.ctypes.data for row in rows]:
      return batch._replace(images=whole)
  images = np.zeros(shape, np.uint8)
  for slots, used, row in zip(images, batch.image_mask.sum(axis=1), rows, strict=True):
    slots[:used] = row.images[0, :used]
  return batch._replace(images=images)
