# SPDX-License-Identifier: Apache-2.0
"""The plan: which examples of which sources make up row r of global batch n.

It is a function of the config and n alone, whatever the number of processes and workers.

Rows are planned a window at a time. A window draws examples until it could fill its rows, each from
the source that is furthest behind its share of all positions drawn so far; packs them; and shuffles
the rows. What finds no room opens the next window, so that nothing is lost. Between two windows
there is little to remember, and that is what a checkpoint holds.
"""

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from mm1_jax.config import ConfigError, DataConfig
from mm1_jax.data.index import Index
from mm1_jax.data.packing import Item, Packing, pack

STATE_VERSION = 1
# A window draws this much more than its rows hold. With more to choose from, rows fill better; what
# is left over waits, so never more than this share of a window does.
SURPLUS = 0.125


class Rest(NamedTuple):
  """An example, by the numbers of its source and in its index, from position `start` on."""

  source: int
  example: int
  start: int


class Piece(NamedTuple):
  """Positions `start` to `stop` of an example: what stands in a row as one segment."""

  source: int
  example: int
  start: int
  stop: int


Row = list[Piece]


@dataclasses.dataclass(frozen=True)
class WindowState:
  """All that window `window` depends on, besides the config."""

  window: int
  cursors: tuple[int, ...]  # examples drawn so far, by source
  drawn: tuple[int, ...]  # positions drawn so far, by source
  carried: tuple[Rest, ...]  # drawn, and still without a row

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> "WindowState":
    return cls(
      window=values["window"],
      cursors=tuple(values["cursors"]),
      drawn=tuple(values["drawn"]),
      carried=tuple(Rest(*rest) for rest in values["carried"]),
    )


class Plan:
  """Plans windows of rows, in sequence.

  Args:
    data: sources and row shape.
    indexes: one for each of the sources.
    image_positions: positions of a picture, delimiters included.
  """

  def __init__(self, data: DataConfig, indexes: Sequence[Index], image_positions: int):
    self.indexes = indexes
    # A window is a whole number of batches.
    self.batches_per_window = -(-data.window_rows // data.batch_size)
    self.batch_size = data.batch_size
    self._num_rows = self.batches_per_window * data.batch_size
    self._data = data
    self._image_positions = image_positions
    # Seeded by name: the order within a source does not change when another joins the mixture.
    self._orders = [
      grain.MapDataset.range(len(index))
      .seed(zlib.crc32(f"{data.seed}/{source.name}".encode()))
      .shuffle()
      .repeat()
      for source, index in zip(data.sources, indexes, strict=True)
    ]

  @property
  def first_state(self) -> WindowState:
    zeros = (0,) * len(self.indexes)
    return WindowState(window=0, cursors=zeros, drawn=zeros, carried=())

  def window(self, state: WindowState) -> tuple[list[Row], WindowState]:
    """Returns the rows of a window, and the state of the next."""
    cursors, drawn = list(state.cursors), list(state.drawn)
    pool = list(state.carried)
    items = [_item(rest, self.indexes) for rest in pool]
    for rest, item in list(self._draw(items, cursors, drawn)):
      pool.append(rest)
      items.append(item)
    packing = _pack(items, self._data, self._image_positions, self._num_rows, len(state.carried))
    rows = _rows(pool, packing)
    order = np.random.default_rng([self._data.seed, state.window]).permutation(len(rows))
    return [rows[r] for r in order], WindowState(
      state.window + 1, tuple(cursors), tuple(drawn), tuple(_left(pool, packing))
    )

  def _draw(
    self, waiting: Sequence[Item], cursors: list[int], drawn: list[int]
  ) -> Iterator[tuple[Rest, Item]]:
    """Draws examples until positions or images suffice; moves `cursors` and `drawn` along."""
    positions = sum(item.num_positions for item in waiting)
    images = sum(len(item.image_starts) for item in waiting)
    slots = self._data.images_per_row
    max_positions = (1 + SURPLUS) * self._num_rows * self._data.seq_len
    max_images = (1 + SURPLUS) * self._num_rows * slots
    weights = [source.weight for source in self._data.sources]
    nexts = [self._next(s, cursors) for s in range(len(cursors))]
    items = [_item(rest, self.indexes) for rest in nexts]
    while positions < max_positions and (images < max_images or not slots):
      # Half of what comes next counts, so that long examples come neither too early nor too late.
      source = min(
        range(len(drawn)), key=lambda s: (drawn[s] + items[s].num_positions / 2) / weights[s]
      )
      rest, item = nexts[source], items[source]
      cursors[source] += 1
      nexts[source] = self._next(source, cursors)
      items[source] = _item(nexts[source], self.indexes)
      drawn[source] += item.num_positions
      positions += item.num_positions
      images += len(item.image_starts)
      yield rest, item

  def _next(self, source: int, cursors: Sequence[int]) -> Rest:
    return Rest(source, int(np.asarray(self._orders[source][cursors[source]])), 0)


def plan_once(index: Index, data: DataConfig, image_positions: int) -> list[Row]:
  """Returns rows that hold every example of one source exactly once, about in order."""
  rows: list[Row] = []
  waiting: list[Rest] = []
  coming = iter(range(len(index)))
  while True:
    pool = list(waiting)
    items = [_item(rest, [index]) for rest in pool]
    size = sum(_size(item, data) for item in items)
    while size < data.window_rows and (example := next(coming, None)) is not None:
      pool.append(Rest(0, example, 0))
      items.append(_item(pool[-1], [index]))
      size += _size(items[-1], data)
    if not pool:
      return rows
    num_rows = min(data.window_rows, int(np.ceil(size)))
    packing = _pack(items, data, image_positions, num_rows, len(waiting))
    rows += [row for row in _rows(pool, packing) if row]
    waiting = _left(pool, packing)


def fingerprint(data: DataConfig, image_positions: int, indexes: Sequence[Index]) -> dict[str, Any]:
  """Returns what must be the same for a saved state to mean the same batches."""
  return {
    "version": STATE_VERSION,
    "seed": data.seed,
    "seq_len": data.seq_len,
    "batch_size": data.batch_size,
    "images_per_row": data.images_per_row,
    "window_rows": data.window_rows,
    "image_positions": image_positions,
    "sources": [
      [s.name, s.weight, len(i), int(i.num_positions.sum()), len(i.image_starts)]
      for s, i in zip(data.sources, indexes, strict=True)
    ],
  }


def check_fingerprint(saved: dict[str, Any], now: dict[str, Any]) -> None:
  """Raises a ConfigError that names what has changed since the state was saved."""
  changed = [
    f"{key}: {saved.get(key)} then, {value} now"
    for key, value in now.items()
    if saved.get(key) != value
  ]
  if changed:
    raise ConfigError(
      f"the saved data state belongs to other data ({'; '.join(changed)}). Set it back to go on "
      f"with the same batches, or start a new run from this one's params (train.init_from)."
    )


def _item(rest: Rest, indexes: Sequence[Index]) -> Item:
  """Returns what `pack` needs to know; its positions count from `rest.start`."""
  index = indexes[rest.source]
  starts = index.images(rest.example)
  starts = starts[starts >= rest.start] - rest.start
  return Item(
    num_positions=int(index.num_positions[rest.example]) - rest.start,
    image_starts=starts.tolist(),
    splittable=bool(index.splittable[rest.example]),
  )


def _size(item: Item, data: DataConfig) -> float:
  """Returns what share of a row an item takes, of the resource it takes more of."""
  images = len(item.image_starts) / max(data.images_per_row, 1)
  return max(item.num_positions / data.seq_len, images)


def _pack(
  items: Sequence[Item],
  data: DataConfig,
  image_positions: int,
  num_rows: int,
  num_first: int,
) -> Packing:
  return pack(
    items,
    num_rows=num_rows,
    seq_len=data.seq_len,
    images_per_row=data.images_per_row,
    image_positions=image_positions,
    num_first=num_first,
  )


def _rows(pool: Sequence[Rest], packing: Packing) -> list[Row]:
  def piece(item: int, start: int, stop: int) -> Piece:
    source, example, offset = pool[item]
    return Piece(source, example, offset + start, offset + stop)

  return [[piece(*part) for part in row] for row in packing.rows]


def _left(pool: Sequence[Rest], packing: Packing) -> list[Rest]:
  return [pool[i]._replace(start=pool[i].start + start) for i, start in packing.left]
