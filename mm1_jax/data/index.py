# SPDX-License-Identifier: Apache-2.0
"""The length index: how many positions and images each piece of a source takes.

It is made by running the text side of `examples.py` over the source once, and kept on disk. With it,
rows are planned without reading a record.
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
import time
import zipfile

import numpy as np
from absl import logging
from etils import epath

from mm1_jax.config import ConfigError
from mm1_jax.data.examples import Encoder, Example, split
from mm1_jax.data.sources import DataError, Record, RecordError, Source

# Raise it when `examples.py` cuts or tokenises otherwise: indexes made before are then not used.
VERSION = 1
MIN_RECORDS_TO_JUDGE = 100  # a share of unreadable records means little below this many

TOO_LONG = "conversation longer than the row"
TOO_MANY_IMAGES = "conversation with more images than the row has slots"
UNREADABLE = "unreadable record"


@dataclasses.dataclass(frozen=True)
class Index:
  """All pieces of one source, in order of record and piece; P of them."""

  records: np.ndarray  # int64[P], number of the record in its source
  pieces: np.ndarray  # int32[P], number of the piece in its record
  num_positions: np.ndarray  # int32[P]
  num_images: np.ndarray  # int32[P]
  drops: collections.Counter  # records left out, by reason

  def __len__(self) -> int:
    return len(self.records)


class Unfit(ValueError):
  """A record that has no place in rows of this shape; the message is the reason."""


def make_pieces(record: Record, encoder: Encoder, seq_len: int, max_images: int) -> list[Example]:
  """Returns the pieces of a record. A conversation is never cut: its answers need its questions.

  Raises:
    Unfit: it is a conversation that does not fit a row.
  """
  example = encoder.encode_record(record)
  if "turns" in record:
    if len(example) > seq_len:
      raise Unfit(TOO_LONG)
    if len(example.images) > max_images:
      raise Unfit(TOO_MANY_IMAGES)
  return split(example, seq_len, max_images)


def load_index(
  source: Source, encoder: Encoder, *, seq_len: int, max_images: int, max_drop_fraction: float
) -> Index:
  """Returns the index of a source, from the cache where it has been made before.

  The cache is `$MM1_JAX_CACHE/index`, or `~/.cache/mm1_jax/index`.

  Raises:
    ConfigError: a record has images and `max_images` is 0.
    DataError: no record can be used, or more than `max_drop_fraction` of them are unreadable.
  """
  path = _cache_dir() / f"{source.name}-{_key(source, encoder, seq_len, max_images)}.npz"
  try:
    index = _read(path)
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # not there, or damaged
    start = time.time()
    index = _build(source, encoder, seq_len, max_images)
    logging.info(
      "indexed source '%s' in %.1f s: %d records, %d pieces, %d positions, %d images, left out %s",
      *(source.name, time.time() - start, len(source), len(index)),
      *(index.num_positions.sum(), index.num_images.sum(), dict(index.drops)),
    )
    _write(path, index)
  _check(index, source, max_drop_fraction)
  return index


def _build(source: Source, encoder: Encoder, seq_len: int, max_images: int) -> Index:
  rows: list[tuple[int, int, int, int]] = []
  drops: collections.Counter = collections.Counter()
  for i in range(len(source)):
    try:
      record = source[i]
    except RecordError as e:
      logging.warning("%s", e)
      drops[UNREADABLE] += 1
      continue
    if not max_images and _has_images(record):
      raise ConfigError(
        f"data.images_per_row is 0, but record '{record['id']}' of source '{source.name}' has "
        f"images. Give rows image slots, or leave that source out."
      )
    try:
      pieces = make_pieces(record, encoder, seq_len, max_images)
    except Unfit as e:
      drops[str(e)] += 1
      continue
    rows += [(i, j, len(piece), len(piece.images)) for j, piece in enumerate(pieces)]
  columns = np.array(rows, np.int64).reshape(-1, 4).T
  return Index(columns[0], *columns[1:].astype(np.int32), drops)


def _has_images(record: Record) -> bool:
  contents = [t["content"] for t in record["turns"]] if "turns" in record else [record["content"]]
  return any("image" in item for content in contents for item in content)


def _check(index: Index, source: Source, max_drop_fraction: float) -> None:
  if not len(index):
    raise DataError(
      f"source '{source.name}': none of its {len(source)} records can be used: "
      f"{dict(index.drops)}. Longer rows (data.seq_len) or more image slots "
      f"(data.images_per_row) may hold them."
    )
  unreadable = index.drops[UNREADABLE]
  if len(source) >= MIN_RECORDS_TO_JUDGE and unreadable > max_drop_fraction * len(source):
    raise DataError(
      f"source '{source.name}': {unreadable} of {len(source)} records are unreadable, more than "
      f"data.max_drop_fraction {max_drop_fraction} allows; the log names them."
    )


# --- the cache


def _cache_dir() -> pathlib.Path:
  return pathlib.Path(os.environ.get("MM1_JAX_CACHE", "~/.cache/mm1_jax")).expanduser() / "index"


def _key(source: Source, encoder: Encoder, seq_len: int, max_images: int) -> str:
  """Returns a hash of all that the index depends on."""
  stats = [epath.Path(p).stat() for p in source.paths]
  parts = {
    "version": VERSION,
    "shards": [
      [os.path.basename(p), s.length, s.mtime] for p, s in zip(source.paths, stats, strict=True)
    ],
    "tokenizer": hashlib.sha256(encoder.tokenizer.model).hexdigest(),
    "image": [encoder.tokens_per_image, encoder.image_delimiters],
    "row": [seq_len, max_images],
  }
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _read(path: pathlib.Path) -> Index:
  with np.load(path) as file:
    fields = [file[name] for name in ("records", "pieces", "num_positions", "num_images")]
    return Index(*fields, collections.Counter(json.loads(str(file["drops"]))))


def _write(path: pathlib.Path, index: Index) -> None:
  """Writes next to the final name first: several processes may make the same index at once."""
  arrays = {f.name: getattr(index, f.name) for f in dataclasses.fields(index)}
  arrays["drops"] = np.array(json.dumps(index.drops))
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
      np.savez(file, **arrays)
    os.replace(file.name, path)
  except OSError as e:
    logging.warning("the index is not kept (%s); set MM1_JAX_CACHE to a folder we may write to", e)
