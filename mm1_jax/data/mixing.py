# SPDX-License-Identifier: Apache-2.0
"""Mixing: which examples of which sources make up row r of global batch n.

It is a function of the config and n alone, whatever the number of processes and workers.

Rows are planned a window at a time. A window draws examples until it could fill its rows, each from
the source that is furthest below its share of all positions; packs them; and shuffles the rows.
Examples without room are the first of the next window, so that none is lost. The state between two
windows is small, and is what a checkpoint holds: resuming costs the same at every step.

Weights that are shares of examples (`data.weight_by`) become shares of positions by the mean length
of each source's examples; all else is the same.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from mm1_jax.config import ConfigError, DataConfig, SourceConfig
from mm1_jax.data.index import Index
from mm1_jax.data.packing import Item, ItemSpan, RowShape, pack
from mm1_jax.data.sources import HASH_DIGITS, DataError

STATE_VERSION = 3  # raise it when the same settings plan other rows
# A window draws this much more than its rows hold: with more to choose from, rows fill better. What
# is left over waits for the next window, and is never more than this share of one.
SURPLUS = 0.125
# How much of what waits counts as placed when a window draws. With none of it, a source that had
# too little room gives too much the next time, and shares oscillate; with all of it, a source that
# the packer favours stays ahead. With a quarter, shares are within 0.22% after 2,048 rows, for five
# seeds each at 45:45:10 and at 50:10:40, with texts of up to 74 rows; with none within 0.62%, with
# half within 0.28%.
COUNTED_WAITING = 0.25
# The mean length of a source with a `limit` is taken over at most so many of its examples: each
# takes some 10 us to find. It is then off by 1/256 of the lengths' standard deviation.
MAX_MEASURED = 1 << 16


class Rest(NamedTuple):
  """An example, by the numbers of its source and in its index, from position `start` on."""

  source: int
  example: int
  start: int


class Piece(NamedTuple):
  """Positions `start` to `stop` of an example: one segment of a row."""

  source: int
  example: int
  start: int
  stop: int


Row = list[Piece]


@dataclasses.dataclass(frozen=True)
class WindowState:
  """All that a window depends on, besides the config."""

  batch: int  # its first
  cursors: tuple[int, ...]  # examples drawn so far, by source
  placed: tuple[int, ...]  # positions in rows since the weights last changed, by source
  carried: tuple[Rest, ...]  # drawn, and still without a row

  def to_dict(self) -> dict[str, Any]:
    return dict(vars(self))

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> "WindowState":
    return cls(
      batch=values["batch"],
      cursors=tuple(values["cursors"]),
      placed=tuple(values["placed"]),
      carried=tuple(Rest(*rest) for rest in values["carried"]),
    )


class Order:
  """The order that a source's examples are drawn in: another one each epoch, and never in memory.

  Attributes:
    length: how many can be drawn; `math.inf` for a source without end.
  """

  def __init__(self, source: SourceConfig, num_examples: int, seed: int):
    # Seeded by name: the order does not change when another source joins the mixture.
    self._name = f"{seed}/{source.seed}/{source.name}"
    self._num_examples = num_examples
    self._epoch = min(source.limit or num_examples, num_examples)  # its examples
    self.length = math.inf if source.epochs is None else math.ceil(source.epochs * self._epoch)

  def measure(self, num_positions: np.ndarray) -> float:
    """Returns the mean length of an epoch's examples, from int32[E], the lengths of all."""
    if self._epoch < self._num_examples:
      num_positions = num_positions[[self[i] for i in range(min(self._epoch, MAX_MEASURED))]]
    return int(num_positions.sum()) / len(num_positions)

  def __getitem__(self, cursor: int) -> int:
    epoch, at = divmod(cursor, self._epoch)
    at = self._shuffle(at, self._epoch, f"epoch {epoch}")
    if self._epoch == self._num_examples:
      return at
    return self._shuffle(at, self._num_examples, "limit")  # the same ones each epoch

  def _shuffle(self, at: int, size: int, name: str) -> int:
    seed = zlib.crc32(f"{self._name}/{name}".encode())
    return grain.experimental.index_shuffle(at, max_index=size - 1, seed=seed, rounds=4)


class Mixer:
  """Plans windows of rows, in sequence.

  Args:
    data: sources and row shape.
    indexes: one for each of `data.leaves`.
    image_positions: positions of a picture, delimiters included.
  """

  def __init__(self, data: DataConfig, indexes: Sequence[Index], image_positions: int):
    self.indexes = indexes
    self.batch_size = data.batch_size
    self.image_positions = image_positions
    self.orders = [
      Order(source, len(index), data.seed)
      for source, index in zip(data.leaves, indexes, strict=True)
    ]
    self._data = data
    self._shape = RowShape(data.seq_len, data.images_per_row, image_positions)

  @property
  def first_state(self) -> WindowState:
    zeros = (0,) * len(self.indexes)
    return WindowState(batch=0, cursors=zeros, placed=zeros, carried=())

  @functools.cached_property
  def mean_lengths(self) -> tuple[float, ...]:
    """Positions of an example, by source, on average."""
    return tuple(
      order.measure(index.num_positions)
      for order, index in zip(self.orders, self.indexes, strict=True)
    )

  def shares(self, step: int) -> tuple[float, ...]:
    """Returns what share of a batch's positions each source has at a step; 1 in all."""
    shares = self._data.shares(step)
    if self._data.weight_by == "positions":
      return shares
    return _normalised(share * n for share, n in zip(shares, self.mean_lengths, strict=True))

  def example_shares(self, step: int) -> tuple[float, ...]:
    """Returns what share of the examples drawn each source has at a step; 1 in all."""
    shares = self._data.shares(step)
    if self._data.weight_by == "examples":
      return shares
    return _normalised(share / n for share, n in zip(shares, self.mean_lengths, strict=True))

  def window(self, state: WindowState) -> tuple[list[Row], WindowState]:
    """Returns the rows of a window, whole batches of them, and the state of the next.

    Raises:
      DataError: all sources are used up.
    """
    shares = self.shares(state.batch)
    num_rows = self.batch_size * _num_batches(self._data, state.batch)
    cursors, placed = list(state.cursors), list(state.placed)
    pool = _Pool(self._data, self._shape, self.indexes)
    for rest in state.carried:
      if shares[rest.source]:  # else it waits until the source's weight is above 0 again
        pool.add(rest)
    counted = COUNTED_WAITING
    if any(change.step == state.batch for change in self._data.reweight):
      # New shares begin here. What waits counts in full this once, so that they hold at once.
      placed, counted = [0] * len(shares), 1.0
    ahead = [there + counted * n for there, n in zip(placed, pool.positions, strict=True)]
    self._draw(pool, shares, cursors, ahead, (1 + SURPLUS) * num_rows)
    num_rows = min(num_rows, int(pool.size) // self.batch_size * self.batch_size)
    if not num_rows:
      raise DataError(
        f"the data ends at step {state.batch}: all epochs of all sources are used up. Allow more "
        f"of them in data.sources, or set train.num_steps to {state.batch}."
      )
    rows, left = pool.pack(num_rows)
    for piece in (piece for row in rows for piece in row):
      placed[piece.source] += piece.stop - piece.start
    order = np.random.default_rng([self._data.seed, state.batch]).permutation(num_rows)
    return [rows[r] for r in order], WindowState(
      batch=state.batch + num_rows // self.batch_size,
      cursors=tuple(cursors),
      placed=tuple(placed),
      carried=(*left, *(rest for rest in state.carried if not shares[rest.source])),
    )

  def expected_images(self, step: int) -> float:
    """Returns how many pictures come with a full row of the mixture at a step."""
    shares = self.shares(step)
    return self._data.seq_len * sum(
      share * index.num_images / int(index.num_positions.sum())
      for share, index in zip(shares, self.indexes, strict=True)
    )

  def _draw(
    self,
    pool: "_Pool",
    shares: Sequence[float],
    cursors: list[int],
    placed: Sequence[float],
    num_rows: float,
  ) -> None:
    """Draws examples into the pool until they could fill the rows; moves `cursors` along.

    Args:
      pool: what is there already.
      shares: of the sources.
      cursors: how many examples each source has given.
      placed: positions that count as placed already, by source.
      num_rows: that the pool should fill.
    """
    drawn = list(placed)
    nexts = {s: self._next(s, cursors[s]) for s, share in enumerate(shares) if share}
    while pool.size < num_rows:
      # The next example counts half, so that long ones come neither too early nor too late.
      ahead = {s: (drawn[s] + size / 2) / shares[s] for s, (_, size) in nexts.items() if size}
      if not ahead:
        break  # all are used up
      source = min(ahead, key=lambda s: ahead[s])
      example, size = nexts[source]
      pool.add(Rest(source, example, 0))
      drawn[source] += size
      cursors[source] += 1
      nexts[source] = self._next(source, cursors[source])

  def _next(self, source: int, cursor: int) -> tuple[int, int]:
    """Returns a source's next example and its number of positions, which is 0 if there is none."""
    if cursor >= self.orders[source].length:
      return 0, 0
    example = self.orders[source][cursor]
    return example, int(self.indexes[source].num_positions[example])


class _Pool:
  """Examples that wait for a row.

  Attributes:
    size: how many rows they could fill.
    positions: how many they have, by source.
  """

  def __init__(self, data: DataConfig, shape: RowShape, indexes: Sequence[Index]):
    self.positions = [0] * len(indexes)
    self.size = 0.0
    self._shape = shape
    self._indexes = indexes
    # The group of each source; sources of one group share rows.
    self._groups = [s if data.packing == "per_source" else 0 for s in range(len(indexes))]
    self._group_positions = [0] * len(indexes)
    self._group_images = [0] * len(indexes)
    self._rests: list[Rest] = []
    self._items: list[Item] = []

  def add(self, rest: Rest) -> None:
    item = self._item(rest)
    self._rests.append(rest)
    self._items.append(item)
    self.positions[rest.source] += item.num_positions
    group = self._groups[rest.source]
    self.size -= self._group_size(group)
    self._group_positions[group] += item.num_positions
    self._group_images[group] += len(item.image_starts)
    self.size += self._group_size(group)

  def pack(self, num_rows: int) -> tuple[list[Row], list[Rest]]:
    """Returns rows, and what is left over, in the order in which it came."""
    rows: list[Row] = []
    left: dict[int, int] = {}
    for group, num in self._split(num_rows).items():
      members = [i for i, rest in enumerate(self._rests) if self._groups[rest.source] == group]
      packing = pack([self._items[i] for i in members], num, self._shape)
      rows += [[self._piece(members[part.item], part) for part in row] for row in packing.rows]
      left |= {members[item]: start for item, start in packing.left}
    rests = [
      self._rests[i]._replace(start=self._rests[i].start + start)
      for i, start in sorted(left.items())
    ]
    return rows, rests

  def _split(self, num_rows: int) -> dict[int, int]:
    """Divides rows among the groups, as each could fill them; the largest remainders round up."""
    sizes = {g: size for g in set(self._groups) if (size := self._group_size(g))}
    exact = {g: num_rows * size / sum(sizes.values()) for g, size in sizes.items()}
    split = {g: int(share) for g, share in exact.items()}
    by_remainder = sorted(exact, key=lambda g: split[g] - exact[g])
    for group in by_remainder[: num_rows - sum(split.values())]:
      split[group] += 1
    return split

  def _group_size(self, group: int) -> float:
    positions = self._group_positions[group] / self._shape.seq_len
    return max(positions, self._group_images[group] / max(self._shape.images_per_row, 1))

  def _item(self, rest: Rest) -> Item:
    """Returns the `Item` that `pack` needs; its positions count from `rest.start`."""
    index, example, first = self._indexes[rest.source], rest.example, rest.start
    cuts = index.cuts(example, self._shape.image_positions)
    return Item(
      num_positions=int(index.num_positions[example]) - first,
      image_starts=[start - first for start in index.images(example).tolist() if start >= first],
      cuts=None if cuts is None else [cut - first for cut in cuts if cut > first],
    )

  def _piece(self, item: int, part: ItemSpan) -> Piece:
    source, example, first = self._rests[item]
    return Piece(source, example, first + part.start, first + part.stop)


def plan_once(index: Index, data: DataConfig, image_positions: int) -> list[Row]:
  """Returns rows that hold every example of one source exactly once, about in order."""
  shape = RowShape(data.seq_len, data.images_per_row, image_positions)
  rows: list[Row] = []
  waiting: list[Rest] = []
  coming = iter(range(len(index)))
  while True:
    pool = _Pool(data, shape, [index])
    for rest in waiting:
      pool.add(rest)
    while pool.size < data.window_rows and (example := next(coming, None)) is not None:
      pool.add(Rest(0, example, 0))
    if not pool.size:
      return rows
    more, waiting = pool.pack(min(data.window_rows, math.ceil(pool.size)))
    rows += [row for row in more if row]


def fingerprint(
  data: DataConfig, image_positions: int, indexes: Sequence[Index], hashes: Sequence[str]
) -> dict[str, Any]:
  """Returns what must be the same for a saved state to mean the same batches.

  Args:
    data: sources and row shape.
    image_positions: positions of a picture, delimiters included.
    indexes: one for each of `data.leaves`.
    hashes: the same; what `sample_hashes` returned for its shards.
  """
  return {
    "version": STATE_VERSION,
    "seed": data.seed,
    "seq_len": data.seq_len,
    "batch_size": data.batch_size,
    "images_per_row": data.images_per_row,
    "packing": data.packing,
    "weight_by": data.weight_by,
    "window_rows": data.window_rows,
    "image_positions": image_positions,
    "sources": [
      [*(s.name, s.weight, s.epochs, s.limit, s.seed), *_totals(index)]
      for s, index in zip(data.leaves, indexes, strict=True)
    ],
    "reweight": [[change.step, *map(list, change.weights)] for change in data.reweight],
    "shards": dict(zip((source.name for source in data.leaves), hashes, strict=True)),
  }


def check_fingerprint(
  saved: dict[str, Any], now: dict[str, Any], batch: int, paths: Mapping[str, Sequence[str]]
) -> None:
  """Raises a ConfigError that names what has changed since a state was saved.

  Weights may change from steps on that no window has reached yet.

  Args:
    saved: the fingerprint in the state.
    now: the one of the config and data at hand.
    batch: the first of the state's window.
    paths: shards by the name of their source.
  """
  end = batch + math.ceil(now["window_rows"] / now["batch_size"])

  def planned(values: dict[str, Any]) -> dict[str, Any]:
    changes = values.get("reweight", [])
    return {**values, "reweight": [change for change in changes if change[0] < end]}

  # Of a state that does not say.
  saved = {"weight_by": "positions", "shards": {}, **saved}
  saved, now = planned(saved), planned(now)
  changed = [
    line
    for name, then in saved["shards"].items()
    for line in _other_shards(name, then, now["shards"].get(name, ""), paths.get(name, ()))
  ]
  changed += [
    f"{key}: {saved.get(key)} then, {value} now"
    for key, value in now.items()
    if saved.get(key) != value and key != "shards"
  ]
  if changed:
    raise ConfigError(
      f"the saved data state belongs to other data ({'; '.join(changed)}). Set it back to continue "
      f"with the same batches, or start a new run from this one's params (train.init_from)."
    )


def _other_shards(name: str, then: str, now: str, paths: Sequence[str]) -> Iterator[str]:
  """Yields what has changed in a source's shards: their number, or the content of some."""
  if len(then) != len(now):
    num_then, num_now = len(then) // HASH_DIGITS, len(now) // HASH_DIGITS
    yield f"source '{name}' had {num_then} shards then, and has {num_now} now"
    return
  parts = [slice(i, i + HASH_DIGITS) for i in range(0, len(now), HASH_DIGITS)]
  other = [path for path, part in zip(paths, parts, strict=True) if then[part] != now[part]]
  if other:
    more = f" and {len(other) - 1} more shards" if len(other) > 1 else ""
    yield f"source '{name}': {other[0]}{more} had other content then"


def _normalised(shares: Iterable[float]) -> tuple[float, ...]:
  shares = tuple(shares)
  total = sum(shares)
  return tuple(share / total for share in shares)


def _num_batches(data: DataConfig, batch: int) -> int:
  """Returns how many batches a window has that begins at `batch`; at a reweighting it ends."""
  changes = [change.step - batch for change in data.reweight if change.step > batch]
  return min([math.ceil(data.window_rows / data.batch_size), *changes])


def _totals(index: Index) -> tuple[int, int, int]:
  return len(index), int(index.num_positions.sum()), index.num_images
