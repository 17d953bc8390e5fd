# SPDX-License-Identifier: Apache-2.0
"""Rows out of examples: what goes together, and what a row then holds.

A row has room for S positions and N images, and an example needs some of both. A row of captions
runs out of image slots, a row of text leaves them empty. So captions and other short examples are
spread over all rows, and long documents are poured into what room is left, cut where it ends.
All of this looks at lengths alone; examples are read when a batch is made.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mm1_jax.batch import Batch
from mm1_jax.data.examples import Example

# Documents longer than this share of a row are cut to fit; shorter ones stay whole.
LONG = 0.25
# No part of a document but its last is shorter than this share of a row.
SHORTEST_CUT = 0.125
# How many documents are looked at for one that can go on in a row.
LOOK_AHEAD = 8


class Item(NamedTuple):
  """What there is to know of an example, or of the rest of one, to pack it."""

  num_positions: int
  image_starts: Sequence[int]  # first positions of its pictures, ascending
  splittable: bool


class Part(NamedTuple):
  """Positions `start` to `stop` of item number `item`."""

  item: int
  start: int
  stop: int


class Packing(NamedTuple):
  """The parts in each row, and from where on the items without room are left over."""

  rows: list[list[Part]]
  left: list[tuple[int, int]]  # item, first position that is in no row


def pack(
  items: Sequence[Item],
  *,
  num_rows: int,
  seq_len: int,
  images_per_row: int,
  image_positions: int,
  num_first: int = 0,
) -> Packing:
  """Packs items into rows, so that positions and image slots both fill up.

  Args:
    items: those that cannot be split fit a row.
    num_rows: rows to fill.
    seq_len: positions of a row.
    images_per_row: image slots of a row.
    image_positions: positions of a picture, delimiters included; never cut through.
    num_first: the first so many items go before the others, whatever their size: they were left
      over before, and would starve.
  """
  rows = _Rows(num_rows, seq_len, images_per_row)
  positions = np.array([item.num_positions for item in items], np.int64)
  images = np.array([len(item.image_starts) for item in items], np.int64)
  splittable = np.array([item.splittable for item in items], bool)
  long = splittable & ((positions > LONG * seq_len) | (images > images_per_row))
  # Whole items first, the hardest to place ahead; as many as leave long ones their share of room.
  share = np.maximum(positions / seq_len, images / max(images_per_row, 1))
  order = np.lexsort((-share, np.arange(len(items)) >= num_first))
  whole = [i for i in order.tolist() if not long[i]]
  left = [(i, 0) for i in np.flatnonzero(long).tolist()]
  if left:
    room = num_rows * seq_len * positions[~long].sum() / positions.sum()
    slots = images_per_row * images[~long].sum() / max(images.sum(), 1)
    left = rows.place_dense(left, items, image_positions, int(images_per_row - slots))
    whole = rows.spread(whole, positions, images, max_positions=room, max_images=num_rows * slots)
  left = rows.pour(left, items, image_positions)
  left += [(i, 0) for i in rows.best_fit(whole, positions, images)]
  return Packing(rows.parts, sorted(left))


class _Rows:
  """Rows that are being filled."""

  def __init__(self, num_rows: int, seq_len: int, images_per_row: int):
    self.parts: list[list[Part]] = [[] for _ in range(num_rows)]
    self._seq_len = seq_len
    self._slots = max(images_per_row, 1)
    self._free_positions = np.full(num_rows, seq_len)
    self._free_images = np.full(num_rows, images_per_row)

  def spread(
    self,
    whole: list[int],
    positions: np.ndarray,
    images: np.ndarray,
    *,
    max_positions: float,
    max_images: float,
  ) -> list[int]:
    """Puts each item into the emptiest row until the limits are met; returns those left."""
    for at, i in enumerate(whole):
      max_positions -= positions[i]
      max_images -= images[i]
      row = int(np.argmax(self._room(positions[i], images[i], nowhere=-np.inf)))
      fits = positions[i] <= self._free_positions[row] and images[i] <= self._free_images[row]
      if max_positions < 0 or (images[i] and max_images < 0) or not fits:
        return whole[at:]
      self._put(row, Part(i, 0, int(positions[i])), int(images[i]))
    return []

  def best_fit(self, whole: list[int], positions: np.ndarray, images: np.ndarray) -> list[int]:
    """Puts each item into the fullest row that has room for it; returns those left."""
    left = []
    for i in whole:
      room = self._room(positions[i], images[i], nowhere=np.inf)
      row = int(np.argmin(room))
      if np.isinf(room[row]):
        left.append(i)
      else:
        self._put(row, Part(i, 0, int(positions[i])), int(images[i]))
    return left

  def place_dense(
    self, long: list[tuple[int, int]], items: Sequence[Item], image_positions: int, slots: int
  ) -> list[tuple[int, int]]:
    """Puts documents into rows while these are empty, as far as `pour` could not.

    Args:
      long: documents and where they begin.
      items: all items.
      image_positions: of a picture.
      slots: what `pour` may expect to find in a row. A stretch with so many pictures that it would
        be cut into crumbs, or never come to its turn, is dense.

    Returns:
      The documents, and where they go on.
    """
    rest = []
    for i, start in long:
      item = items[i]
      while start < item.num_positions:
        stop = furthest_cut(item, start, self._seq_len, max(slots, 1), image_positions)
        if self._worthwhile(item, start, stop):
          break  # not dense
        row = int(np.argmax(self._room(0, 0, nowhere=-np.inf)))
        stop = self._furthest_cut(row, item, start, image_positions)
        if stop == start or (self.parts[row] and not self._worthwhile(item, start, stop)):
          break
        self._put(row, Part(i, start, stop), _count(item, start, stop))
        start = stop
      if start < item.num_positions:
        rest.append((i, start))
    return rest

  def pour(
    self, long: list[tuple[int, int]], items: Sequence[Item], image_positions: int
  ) -> list[tuple[int, int]]:
    """Fills rows one after another with documents, cut to fit; returns what is left of them."""
    queue = list(long)
    for row in range(len(self.parts)):
      while queue:
        for at, (i, start) in enumerate(queue[:LOOK_AHEAD]):
          stop = self._furthest_cut(row, items[i], start, image_positions)
          if self._worthwhile(items[i], start, stop):
            self._put(row, Part(i, start, stop), _count(items[i], start, stop))
            queue[at : at + 1] = [(i, stop)] if stop < items[i].num_positions else []
            break
        else:
          break  # none can go on in this row
    return queue

  def _furthest_cut(self, row: int, item: Item, start: int, image_positions: int) -> int:
    room = int(self._free_positions[row]), int(self._free_images[row])
    return furthest_cut(item, start, *room, image_positions)

  def _worthwhile(self, item: Item, start: int, stop: int) -> bool:
    return stop == item.num_positions or stop - start >= SHORTEST_CUT * self._seq_len

  def _room(self, positions: int, images: int, nowhere: float) -> np.ndarray:
    """Returns how much of both resources each row has; `nowhere` for rows it does not fit in."""
    fits = (self._free_positions >= positions) & (self._free_images >= images)
    room = self._free_positions / self._seq_len + self._free_images / self._slots
    return np.where(fits, room, nowhere)

  def _put(self, row: int, part: Part, num_images: int) -> None:
    self.parts[row].append(part)
    self._free_positions[row] -= part.stop - part.start
    self._free_images[row] -= num_images


def _count(item: Item, start: int, stop: int) -> int:
  """Returns how many pictures begin from `start` on and before `stop`."""
  return bisect.bisect_left(item.image_starts, stop) - bisect.bisect_left(item.image_starts, start)


def furthest_cut(
  item: Item, start: int, max_positions: int, max_images: int, image_positions: int
) -> int:
  """Returns where a part from `start` on must end to keep within both limits and cut no picture."""
  stop = min(start + max_positions, item.num_positions)
  first = bisect.bisect_left(item.image_starts, start)
  if first + max_images < len(item.image_starts):
    stop = min(stop, item.image_starts[first + max_images])
  last = bisect.bisect_left(item.image_starts, stop) - 1
  if last >= first and item.image_starts[last] + image_positions > stop:
    stop = item.image_starts[last]
  return int(stop)


class Segment(NamedTuple):
  """An example in a row, and what its images look like."""

  source_id: int
  example: Example
  pixels: Sequence[np.ndarray]  # uint8[H, W, 3] each, one for each of the example's images


def assemble(
  rows: Sequence[Sequence[Segment]],
  *,
  seq_len: int,
  images_per_row: int,
  image_size: tuple[int, int],
  pad_id: int,
) -> Batch:
  """Lays segments out in rows, one after another, with padding behind.

  Args:
    rows: B rows of segments that fit `seq_len` and `images_per_row`.
    seq_len: S.
    images_per_row: N.
    image_size: H and W.
    pad_id: the id at padding positions.

  Returns:
    A `Batch` of numpy arrays.
  """
  shape = len(rows), seq_len
  batch = Batch(
    tokens=np.full(shape, pad_id, np.int32),
    targets=np.full(shape, pad_id, np.int32),
    loss_mask=np.zeros(shape, np.float32),
    positions=np.zeros(shape, np.int32),
    segment_ids=np.zeros(shape, np.int32),
    source_ids=np.zeros(shape, np.int32),
    images=np.zeros((len(rows), images_per_row, *image_size, 3), np.uint8),
    image_mask=np.zeros((len(rows), images_per_row), bool),
  )
  for r, row in enumerate(rows):
    start, slot = 0, 0
    for number, (source_id, example, pixels) in enumerate(row, start=1):
      at = r, slice(start, start + len(example))
      batch.tokens[at] = example.tokens
      batch.targets[at] = example.targets
      batch.loss_mask[at] = example.loss_mask
      batch.positions[at] = np.arange(len(example))
      batch.segment_ids[at] = number
      batch.source_ids[at] = source_id
      start += len(example)
      for picture in pixels:
        batch.images[r, slot] = picture
        batch.image_mask[r, slot] = True
        slot += 1
  return batch
