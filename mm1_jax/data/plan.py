# SPDX-License-Identifier: Apache-2.0
"""The plan: which pieces of which sources make up row r of global batch n.

It is a function of the config and n alone, whatever the number of processes and workers.

Rows are planned a window at a time. A window draws pieces until it could fill its rows, each from the
source that is furthest behind its share of all positions drawn so far; packs them; and shuffles the
rows. Pieces without room open the next window, so that nothing is lost. Between two windows there is
little to remember, and that is what a checkpoint holds.
"""

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from mm1_jax.config import ConfigError, DataConfig
from mm1_jax.data.index import Index
from mm1_jax.data.packing import pack

STATE_VERSION = 1
# A window draws this much more than its rows hold. With more pieces to choose from rows fill
# better; what is left over waits, so the surplus is never more than this share of a window.
SURPLUS = 0.125


class Piece(NamedTuple):
  """A piece by its source's number and its own number in that source's index."""

  source: int
  piece: int


Row = list[Piece]


@dataclasses.dataclass(frozen=True)
class WindowState:
  """All that window `window` depends on, besides the config."""

  window: int
  cursors: tuple[int, ...]  # pieces drawn so far, by source
  drawn: tuple[int, ...]  # positions drawn so far, by source
  carried: tuple[Piece, ...]  # drawn, and still without a row

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> "WindowState":
    return cls(
      window=values["window"],
      cursors=tuple(values["cursors"]),
      drawn=tuple(values["drawn"]),
      carried=tuple(Piece(*piece) for piece in values["carried"]),
    )


class Plan:
  """Plans windows of rows, in sequence."""

  def __init__(self, data: DataConfig, indexes: Sequence[Index]):
    self.indexes = indexes
    self.seed = data.seed
    self.seq_len = data.seq_len
    self.images_per_row = data.images_per_row
    # A window is a whole number of batches.
    self.batches_per_window = -(-data.window_rows // data.batch_size)
    self.num_rows = self.batches_per_window * data.batch_size
    self.weights = [source.weight for source in data.sources]
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
    pool = [*state.carried, *self._draw(state.carried, cursors, drawn)]
    positions, images = self._lengths(pool)
    packing = pack(
      positions,
      images,
      num_rows=self.num_rows,
      seq_len=self.seq_len,
      images_per_row=self.images_per_row,
      num_first=len(state.carried),
    )
    order = np.random.default_rng([self.seed, state.window]).permutation(self.num_rows)
    rows = [[pool[i] for i in packing.rows[r]] for r in order]
    carried = tuple(pool[i] for i in packing.left)
    return rows, WindowState(state.window + 1, tuple(cursors), tuple(drawn), carried)

  def _draw(
    self, carried: Sequence[Piece], cursors: list[int], drawn: list[int]
  ) -> Iterator[Piece]:
    """Draws pieces until positions or images suffice; moves `cursors` and `drawn` along."""
    positions, images = (int(x.sum()) for x in self._lengths(carried))
    max_positions = (1 + SURPLUS) * self.num_rows * self.seq_len
    max_images = (1 + SURPLUS) * self.num_rows * self.images_per_row
    while positions < max_positions and (images < max_images or not self.images_per_row):
      source = min(range(len(drawn)), key=lambda s: drawn[s] / self.weights[s])
      piece = Piece(source, int(self._orders[source][cursors[source]]))
      cursors[source] += 1
      index = self.indexes[source]
      drawn[source] += int(index.num_positions[piece.piece])
      positions += int(index.num_positions[piece.piece])
      images += int(index.num_images[piece.piece])
      yield piece

  def _lengths(self, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """Returns int64[P] positions and int64[P] images of pieces."""
    positions = [self.indexes[s].num_positions[p] for s, p in pieces]
    images = [self.indexes[s].num_images[p] for s, p in pieces]
    return np.array(positions, np.int64), np.array(images, np.int64)


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
      [s.name, s.weight, len(i), int(i.num_positions.sum()), int(i.num_images.sum())]
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


def plan_once(index: Index, data: DataConfig) -> list[Row]:
  """Returns rows that hold every piece of one source exactly once, about in order."""
  rows: list[Row] = []
  waiting = np.arange(0)
  rest = np.arange(len(index))
  while len(waiting) + len(rest):
    # As many pieces as could fill the window, counted by the scarcer of the two resources.
    pool = np.concatenate([waiting, rest])
    full = np.maximum(
      np.cumsum(index.num_positions[pool]) / data.seq_len,
      np.cumsum(index.num_images[pool]) / max(data.images_per_row, 1),
    )
    size = max(int(np.searchsorted(full, data.window_rows)), len(waiting), 1)
    pool, rest = pool[:size], pool[size:]
    packing = pack(
      index.num_positions[pool],
      index.num_images[pool],
      num_rows=data.window_rows,
      seq_len=data.seq_len,
      images_per_row=data.images_per_row,
      num_first=len(waiting),
    )
    rows += [[Piece(0, int(pool[i])) for i in sorted(row)] for row in packing.rows if row]
    waiting = pool[packing.left]
  return rows
