# SPDX-License-Identifier: Apache-2.0
"""From a planned row to its arrays: reads, encodes and decodes; in threads or worker processes."""

import collections
import functools
import json
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from grain.python import SharedMemoryArray

from mm1_jax.batch import Batch
from mm1_jax.config import DataConfig
from mm1_jax.data.examples import Encoder, Example, cut
from mm1_jax.data.image import ImageError
from mm1_jax.data.index import UNREADABLE, Index, cache_dir
from mm1_jax.data.mixing import Piece
from mm1_jax.data.packing import Segment, assemble
from mm1_jax.data.planned import PlannedRow
from mm1_jax.data.sources import DataError, RecordError, Source
from mm1_jax.data.tiling import decode_pictures

# A long document is cut over nearby rows; it is tokenised once for all of them.
CACHED_DOCUMENTS = 64


class LoadedRow(NamedTuple):
  """One row, as it comes back from a worker."""

  batch: Batch  # of one row; its images are those that it has, see `packing.stack`
  drops: str  # JSON of the examples left out, by reason: one leaf, whatever its keys
  next_window: str  # JSON of the WindowState that the next batch is planned from


class _BatchImages:
  """Memory of the batches that are being made: each row's pictures are written where they stay."""

  def __init__(self, shape: tuple[int, ...]):
    self._shape = shape
    self._lock = threading.Lock()
    self._open: dict[int, tuple[np.ndarray, int]] = {}  # and how many of its rows are missing

  def row(self, batch: int, row: int) -> np.ndarray:
    """Returns uint8[1, N, H, W, 3] of zeros; to be asked for once for each row."""
    with self._lock:
      images, missing = self._open.pop(batch, (None, self._shape[0]))
      images = np.zeros(self._shape, np.uint8) if images is None else images
      if missing > 1:
        self._open[batch] = images, missing - 1
    return images[row : row + 1]


class RowLoader:
  """Reads, encodes, decodes and assembles the pieces of a row; runs in the workers."""

  def __init__(
    self,
    data: DataConfig,
    sources: Sequence[Source],
    indexes: Sequence[Index],
    encoder: Encoder,
    image_size: tuple[int, int],
    num_rows: int,
  ):
    """Loads rows of batches of `num_rows` on this process."""
    self._data = data
    self._sources = sources
    self._indexes = indexes
    self._encoder = encoder
    self._image_size = image_size
    self._decode = functools.partial(
      decode_pictures, size=image_size, fit=data.image_fit, max_pixels=data.max_image_pixels
    )
    # Workers, in other processes, use shared memory.
    shape = num_rows, data.images_per_row, *image_size, 3
    self._batches = None if data.num_workers else _BatchImages(shape)
    self._encode_cached = functools.lru_cache(CACHED_DOCUMENTS)(self._encode)

  def __call__(self, planned: PlannedRow) -> LoadedRow:
    row, next_window, place = planned
    drops: collections.Counter = collections.Counter()
    segments = [s for piece in row if (s := self._segment(piece, drops))]
    num_images = sum(len(segment.example.images) for segment in segments)
    pictures = self._room_for(num_images, place)
    segments = self._decode_into(pictures, segments, drops)
    batch = assemble(
      segments,
      pictures,
      seq_len=self._data.seq_len,
      images_per_row=self._data.images_per_row,
      pad_id=self._encoder.tokenizer.pad_id,
    )
    state = next_window.to_dict() if next_window else None
    return LoadedRow(batch, json.dumps(drops), json.dumps(state))

  def _segment(self, piece: Piece, drops: collections.Counter) -> Segment | None:
    """Returns the segment of a piece; None, and the reason in `drops`, if it cannot be read."""
    num_positions = self._indexes[piece.source].num_positions[piece.example]
    whole = piece.stop - piece.start == num_positions
    encode = self._encode if whole else self._encode_cached
    try:
      example = encode(piece.source, piece.example)
    except RecordError as e:
      logging.warning("%s", e)
      drops[f"{self._sources[piece.source].name}: {UNREADABLE}"] += 1
      return None
    return Segment(piece.source, cut(example, piece.start, piece.stop))

  def _room_for(self, num_images: int, place: tuple[int, int]) -> np.ndarray:
    """Returns memory for a row's pictures, [1, n, H, W, 3], that needs no pipe and no copy."""
    if self._batches:
      return self._batches.row(*place)
    shape = 1, num_images, *self._image_size, 3
    return SharedMemoryArray(shape, np.uint8) if num_images else np.empty(shape, np.uint8)

  def _decode_into(
    self, pictures: np.ndarray, segments: Sequence[Segment], drops: collections.Counter
  ) -> list[Segment]:
    """Returns the segments whose pictures can be decoded, with those first in `pictures`."""
    kept, slot, used = [], 0, 0
    for segment in segments:
      images = segment.example.images
      try:
        for i, pixels in enumerate(self._decode(images)):
          pictures[0, slot + i] = pixels
          used = max(used, slot + i + 1)
      except ImageError as e:
        drops[f"{self._sources[segment.source_id].name}: {e.reason}"] += 1
      else:
        kept.append(segment)
        slot += len(images)
    pictures[0, slot:used] = 0  # written for segments that were then dropped
    return kept

  def _encode(self, source: int, example: int) -> Example:
    index = self._indexes[source]
    record = int(index.records[example])
    encoded = self._encoder.encode_record(self._sources[source][record])
    if len(encoded) != index.num_positions[example]:
      raise DataError(
        f"source '{self._sources[source].name}', record {record}: {len(encoded)} positions, but "
        f"{index.num_positions[example]} when it was indexed. The shards have changed since; start "
        f"again, and if that does not help remove the index in {cache_dir()}."
      )
    return encoded

  def __getstate__(self):
    return {k: v for k, v in vars(self).items() if k != "_encode_cached"}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._encode_cached = functools.lru_cache(CACHED_DOCUMENTS)(self._encode)
