# SPDX-License-Identifier: Apache-2.0
"""Rows out of pieces: which go together, and what a row then holds.

A row has room for S positions and N images, and a piece needs some of both. Rows are chosen by
these lengths alone; the pieces themselves are read when a batch is made.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mm1_jax.batch import Batch
from mm1_jax.data.examples import Example


class Packing(NamedTuple):
  """Pieces by number: those in each row, and those that found no room."""

  rows: list[list[int]]
  left: list[int]


def pack(
  num_positions: np.ndarray,
  num_images: np.ndarray,
  *,
  num_rows: int,
  seq_len: int,
  images_per_row: int,
  num_first: int = 0,
) -> Packing:
  """Packs pieces into rows, so that positions and image slots both fill up.

  Best fit decreasing on two resources: the piece that takes most of a row comes first, and goes to
  the row that it leaves least room in.

  Args:
    num_positions: int[P], of each piece; at most `seq_len`.
    num_images: int[P], of each piece; at most `images_per_row`.
    num_rows: rows to fill.
    seq_len: positions of a row.
    images_per_row: image slots of a row.
    num_first: the first so many pieces go before all others, whatever their size: they were left
      over before, and would starve.
  """
  slots = max(images_per_row, 1)
  share = np.maximum(num_positions / seq_len, num_images / slots)
  later = np.arange(len(share)) >= num_first
  order = np.lexsort((-share, later))  # stable: equal pieces keep their order
  free_positions = np.full(num_rows, seq_len)
  free_images = np.full(num_rows, images_per_row)
  room = np.full(num_rows, 1.0 + (images_per_row > 0))  # of both resources, as shares of a row
  rows: list[list[int]] = [[] for _ in range(num_rows)]
  left: list[int] = []
  for i in order.tolist():
    fits = (free_positions >= num_positions[i]) & (free_images >= num_images[i])
    row = int(np.argmin(np.where(fits, room, np.inf)))
    if not fits[row]:
      left.append(i)
      continue
    rows[row].append(i)
    free_positions[row] -= num_positions[i]
    free_images[row] -= num_images[i]
    room[row] -= num_positions[i] / seq_len + num_images[i] / slots
  return Packing(rows, sorted(left))


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
