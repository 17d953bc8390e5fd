# SPDX-License-Identifier: Apache-2.0
"""The length index: how long each example of a source is, and where its pictures stand.

It is made by running the text side of `examples.py` over the source once, and kept on disk. With
it, rows are planned without reading a record.
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
from mm1_jax.data.examples import Encoder
from mm1_jax.data.sources import DataError, RecordError, Source

# Raise it when `examples.py` makes other ids or lengths: indexes made before are then not used.
VERSION = 2
MIN_RECORDS_TO_JUDGE = 100  # a share of unreadable records means little below this many

TOO_LONG = "conversation longer than the row"
TOO_MANY_IMAGES = "conversation with more images than the row has slots"
UNREADABLE = "unreadable record"


@dataclasses.dataclass(frozen=True)
class Index:
  """All usable examples of one source, in order; E of them, with I pictures."""

  records: np.ndarray  # int64[E], number of the record in its source
  num_positions: np.ndarray  # int32[E]
  splittable: np.ndarray  # bool[E]: documents; an answer needs its question in the same row
  image_starts: np.ndarray  # int32[I], first position of each picture, delimiter included
  image_offsets: np.ndarray  # int64[E + 1]: example e has pictures [e] to [e + 1]
  drops: collections.Counter  # records left out, by reason

  def __len__(self) -> int:
    return len(self.records)

  def images(self, example: int) -> np.ndarray:
    """Returns int32[n], where the pictures of an example start."""
    return self.image_starts[self.image_offsets[example] : self.image_offsets[example + 1]]


def load_index(
  source: Source, encoder: Encoder, *, seq_len: int, max_images: int, max_drop_fraction: float
) -> Index:
  """Returns a source's index, from the cache where it has been made before.

  The cache is `$MM1_JAX_CACHE/index`, or `~/.cache/mm1_jax/index`.

  Raises:
    ConfigError: a record has images and `max_images` is 0.
    DataError: no record can be used, or more than `max_drop_fraction` of them are unreadable.
  """
  path = cache_dir() / f"{source.name}-{_key(source, encoder, seq_len, max_images)}.npz"
  try:
    index = _read(path)
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # not there, or damaged
    start = time.time()
    index = _build(source, encoder, seq_len, max_images)
    logging.info(
      "indexed source '%s' in %.1f s: %d examples, %d positions, %d images, left out %s",
      *(source.name, time.time() - start, len(index)),
      *(index.num_positions.sum(), len(index.image_starts), dict(index.drops)),
    )
    _write(path, index)
  _check(index, source, max_drop_fraction)
  return index


def _build(source: Source, encoder: Encoder, seq_len: int, max_images: int) -> Index:
  rows: list[tuple[int, int, bool]] = []
  starts: list[list[int]] = []
  drops: collections.Counter = collections.Counter()
  for i in range(len(source)):
    try:
      record = source[i]
    except RecordError as e:
      logging.warning("%s", e)
      drops[UNREADABLE] += 1
      continue
    example = encoder.encode_record(record)
    if example.images and not max_images:
      raise ConfigError(
        f"data.images_per_row is 0, but record '{record['id']}' of source '{source.name}' has "
        f"images. Give rows image slots, or leave that source out."
      )
    splittable = "turns" not in record
    if not splittable and len(example) > seq_len:
      drops[TOO_LONG] += 1
    elif not splittable and len(example.images) > max_images:
      drops[TOO_MANY_IMAGES] += 1
    else:
      rows.append((i, len(example), splittable))
      starts.append([span.start for span in example.spans])
  records, num_positions, splittable = zip(*rows, strict=True) if rows else ((), (), ())
  return Index(
    records=np.array(records, np.int64),
    num_positions=np.array(num_positions, np.int32),
    splittable=np.array(splittable, bool),
    image_starts=np.array([s for image in starts for s in image], np.int32),
    image_offsets=np.cumsum([0, *map(len, starts)]),
    drops=drops,
  )


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


def cache_dir() -> pathlib.Path:
  """Returns the folder that indexes are kept in."""
  return pathlib.Path(os.environ.get("MM1_JAX_CACHE", "~/.cache/mm1_jax")).expanduser() / "index"


def _key(source: Source, encoder: Encoder, seq_len: int, max_images: int) -> str:
  """Returns a hash of all that the index depends on."""
  stats = [epath.Path(p).stat() for p in source.paths]
  parts = {
    "version": VERSION,
    "records": len(source),
    "shards": [
      [path, stat.length, stat.mtime] for path, stat in zip(source.paths, stats, strict=True)
    ],
    "tokenizer": hashlib.sha256(encoder.tokenizer.model).hexdigest(),
    "image": [encoder.tokens_per_image, encoder.image_delimiters],
    "row": [seq_len, max_images],
  }
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _read(path: pathlib.Path) -> Index:
  with np.load(path) as file:
    arrays = {name: file[name] for name in file.files}
  return Index(**{**arrays, "drops": collections.Counter(json.loads(str(arrays["drops"])))})


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
