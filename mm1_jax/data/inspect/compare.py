# SPDX-License-Identifier: Apache-2.0
"""What should be in a row, computed once more from the records, and compared with the row.

This finds a picture at the wrong text: the arrays alone can be right in every way.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mm1_jax.batch import Batch
from mm1_jax.config import RunConfig
from mm1_jax.data.examples import Encoder, Example, cut
from mm1_jax.data.image import ImageError
from mm1_jax.data.index import UNREADABLE, Index
from mm1_jax.data.inspect.facts import Checks, RowSegment
from mm1_jax.data.mixing import Piece
from mm1_jax.data.sources import Record, RecordError, Source
from mm1_jax.data.tiling import decode_pictures

CACHED_RECORDS = 64  # a long document is cut over nearby rows


class Origin(NamedTuple):
  """The record that a segment was made from; `start` to `stop` of its positions."""

  record: int  # its number in the source
  id: str
  license: str
  credit: str
  start: int
  stop: int
  num_positions: int
  differs: tuple[str, ...] = ()  # names of what differs between row and record

  @property
  def whole(self) -> bool:
    return self.stop - self.start == self.num_positions


class Records:
  """The records of all sources, to compare rows with."""

  def __init__(self, run: RunConfig, encoder: Encoder, indexes: Mapping[str, Index]):
    self._sources = [Source(config) for config in run.data.leaves]
    self._indexes = [indexes[config.name] for config in run.data.leaves]
    self._encoder = encoder
    self._decode = functools.partial(
      decode_pictures,
      size=run.model.vision.image_size,
      fit=run.data.image_fit,
      max_pixels=run.data.max_image_pixels,
    )
    self._read = functools.lru_cache(CACHED_RECORDS)(self._read)

  def compare(
    self,
    row: Batch,
    segments: Sequence[RowSegment],
    pieces: Sequence[Piece],
    name: str,
    checks: Checks,
  ) -> tuple[list[Origin | None], list[tuple[int, str]]]:
    """Finds each segment's record and compares the two.

    Returns:
      The origin of each segment, and source and reason of each piece that cannot be in the row.
    """
    check = checks["every segment is what its record says: ids, loss mask and pictures"]
    origins: list[Origin | None] = [None] * len(segments)
    drops, at = [], 0
    for piece in pieces:
      try:
        origin, example, pixels = self._piece(piece)
      except ImageError as e:
        drops.append((piece.source, e.reason))
        continue
      except RecordError:
        drops.append((piece.source, UNREADABLE))
        continue
      if at == len(segments):
        check.add(1, [(1, f"{name}: record '{origin.id}' is missing")])
        continue
      wrong = _differences(row, segments[at], piece.source, example, pixels)
      where = f"{name}, segment {at + 1}: not as in record '{origin.id}': {', '.join(wrong)}"
      check.add(1, [(1, where)] if wrong else ())
      origins[at] = origin._replace(differs=tuple(wrong))
      at += 1
    for segment in segments[at:]:
      check.add(1, [(1, f"{name}, segment {segment.number}: of no record")])
    return origins, drops

  def _piece(self, piece: Piece) -> tuple[Origin, Example, list[np.ndarray]]:
    number = int(self._indexes[piece.source].records[piece.example])
    record, encoded = self._read(piece.source, number)
    example = cut(encoded, piece.start, piece.stop)
    pixels = list(self._decode(example.images))
    license, credit = (str(record.get(key, "")) for key in ("license", "credit"))
    origin = Origin(number, record["id"], license, credit, piece.start, piece.stop, len(encoded))
    return origin, example, pixels

  def _read(self, source: int, number: int) -> tuple[Record, Example]:
    record = self._sources[source][number]
    return record, self._encoder.encode_record(record)


def _differences(
  row: Batch, segment: RowSegment, source: int, example: Example, pixels: Sequence[np.ndarray]
) -> list[str]:
  """Returns the names of what differs from the record."""
  at = slice(segment.start, segment.stop)
  pairs = {
    "source": (np.array(segment.source_id), np.array(source)),
    "tokens": (row.tokens[at], example.tokens),
    "targets": (row.targets[at], example.targets),
    "loss mask": (row.loss_mask[at], example.loss_mask),
  }
  wrong = [name for name, (a, b) in pairs.items() if not np.array_equal(a, b)]
  slots = [run.slot for run in segment.runs if run.slot < len(row.images)]
  shown = [row.images[slot] for slot in slots if row.image_mask[slot]]
  if len(shown) != len(pixels) or any(
    not np.array_equal(a, b) for a, b in zip(shown, pixels, strict=True)
  ):
    wrong.append("pictures")
  return wrong
