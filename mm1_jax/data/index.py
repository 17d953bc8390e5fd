# SPDX-License-Identifier: Apache-2.0
"""The length index: how long each example of a source is, and where its pictures are.

It is made by running the text side of `examples.py` over the source once, shard by shard, and kept:
a shard that is added to a source is the only one that is read. With it, rows are planned without
reading a record. A large one is mapped from a file: all processes of a host share its memory.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import shutil
import time
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from absl import logging
from etils import epath

from mm1_jax.config import ConfigError, SourceConfig
from mm1_jax.data.examples import Encoder
from mm1_jax.data.sources import DataError, RecordError, Source

# Raise it when `examples.py` makes other ids or lengths: older indexes are then not used.
VERSION = 4
MIN_RECORDS_TO_JUDGE = 100  # a share of unreadable records means little below this many
# Starting processes takes as long as indexing so many bytes does.
MIN_BYTES_FOR_PROCESSES = 16_000_000
SECONDS_BETWEEN_NEWS = 10.0
MIN_BYTES_TO_MAP = 1 << 24  # less is not worth a folder

TOO_LONG = "conversation longer than the row"
TOO_MANY_IMAGES = "conversation with more images than the row has slots"
UNREADABLE = "unreadable record"
EMPTY = "empty record"


@dataclasses.dataclass(frozen=True)
class Index:
  """All usable examples of one source, in order; E of them, with K breaks."""

  records: np.ndarray  # int64[E], number of the record in its source
  num_positions: np.ndarray  # int32[E]
  splittable: np.ndarray  # bool[E]: documents; an answer needs its question in the same row
  # First positions of the pictures, delimiters included, and of texts right after another text.
  breaks: np.ndarray  # int32[K]
  is_image: np.ndarray  # bool[K]
  break_offsets: np.ndarray  # int64[E + 1]: example e has breaks [e] to [e + 1]
  drops: collections.Counter  # records left out, by reason

  def __len__(self) -> int:
    return len(self.records)

  @property
  def num_images(self) -> int:
    return int(self.is_image.sum())

  def images(self, example: int) -> np.ndarray:
    """Returns int32[n], where the pictures of an example start."""
    at = slice(self.break_offsets[example], self.break_offsets[example + 1])
    return self.breaks[at][self.is_image[at]]

  def cuts(self, example: int, image_positions: int) -> list[int] | None:
    """Returns where an example may be cut: between items; None is anywhere, in a text.

    There is no cut right after a picture: with no text to predict, it would teach nothing.
    """
    if not self.splittable[example]:
      return []
    at = slice(self.break_offsets[example], self.break_offsets[example + 1])
    if at.start == at.stop:
      return None
    cuts, image_end = [], 1  # only `<s>` is before position 1
    for start, is_image in zip(self.breaks[at].tolist(), self.is_image[at].tolist(), strict=True):
      if start != image_end:
        cuts.append(start)
      if is_image:
        image_end = start + image_positions
    return cuts


@dataclasses.dataclass(frozen=True)
class _MappedIndex(Index):
  """An index whose arrays are files; a worker process gets the folder's name."""

  folder: pathlib.Path

  def __reduce__(self):
    return _map, (self.folder,)


def load_index(
  source: Source,
  encoder: Encoder,
  *,
  seq_len: int,
  max_images: int,
  max_drop_fraction: float,
  process_index: int = 0,
) -> Index:
  """Returns a source's index; its shards' come from the cache where they have been made before.

  The cache is `$MM1_JAX_CACHE/index`, or `~/.cache/mm1_jax/index`; it may be a gs:// path that many
  hosts share. Each host starts with another shard, so that they divide the work.

  Raises:
    ConfigError: a record has images and `max_images` is 0.
    DataError: no record can be used, or more than `max_drop_fraction` of them are unreadable.
  """
  keys = [_key(path, encoder) for path in source.paths]
  folder = _folder(keys, seq_len, max_images)
  index = _read_mapped(folder)
  if index is None:
    index = _make_index(source, encoder, keys, process_index, seq_len, max_images)
    index = _keep_mapped(index, folder)
  _check(index, source, max_drop_fraction)
  return index


def _make_index(
  source: Source,
  encoder: Encoder,
  keys: Sequence[str],
  process_index: int,
  seq_len: int,
  max_images: int,
) -> Index:
  """Returns an index in memory, of all shards."""
  index = _concatenate(_load_shards(source, encoder, keys, process_index))
  if not max_images and index.num_images:
    example = int(np.searchsorted(index.break_offsets, np.argmax(index.is_image), side="right")) - 1
    record = source[int(index.records[example])]
    raise ConfigError(
      f"data.images_per_row is 0, but record '{record['id']}' of source '{source.name}' has "
      f"images. Give rows image slots, or leave that source out."
    )
  return _drop_unfit(index, seq_len, max_images)


def _drop_unfit(index: Index, seq_len: int, max_images: int) -> Index:
  """Leaves out conversations that no row can hold."""
  whole = ~index.splittable
  too_long = whole & (index.num_positions > seq_len)
  images = np.add.reduceat(np.append(index.is_image, False), index.break_offsets[:-1], dtype=int)
  images[np.diff(index.break_offsets) == 0] = 0  # where reduceat returns the next one's
  too_many = whole & ~too_long & (images > max_images)
  drops = index.drops + collections.Counter(
    {TOO_LONG: int(too_long.sum()), TOO_MANY_IMAGES: int(too_many.sum())}
  )
  keep = ~(too_long | too_many)
  if keep.all():
    return index
  counts = np.diff(index.break_offsets)
  keep_breaks = np.repeat(keep, counts)
  return Index(
    records=index.records[keep],
    num_positions=index.num_positions[keep],
    splittable=index.splittable[keep],
    breaks=index.breaks[keep_breaks],
    is_image=index.is_image[keep_breaks],
    break_offsets=_offsets(counts[keep]),
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


# --- one shard


@dataclasses.dataclass(frozen=True)
class _Shard:
  """The index of one shard, independent of the row's shape; `records` count from its first."""

  num_records: int
  index: Index


def _index_shard(config: SourceConfig, encoder: Encoder) -> _Shard:
  source = Source(config)
  rows: list[tuple[int, int, bool, int]] = []
  breaks: list[tuple[int, bool]] = []
  drops: collections.Counter = collections.Counter()
  for i in range(len(source)):
    try:
      record = source[i]
    except RecordError as e:
      logging.warning("%s In %s.", e, config.path)
      drops[UNREADABLE] += 1
      continue
    num_positions, images, texts = encoder.measure_record(record)
    if num_positions <= 1:
      drops[EMPTY] += 1
      continue
    here = sorted([(start, True) for start in images] + [(start, False) for start in texts])
    rows.append((i, num_positions, "turns" not in record, len(here)))
    breaks += here
  records, num_positions, splittable, counts = zip(*rows, strict=True) if rows else ((),) * 4
  starts, is_image = zip(*breaks, strict=True) if breaks else ((), ())
  index = Index(
    records=np.array(records, np.int64),
    num_positions=np.array(num_positions, np.int32),
    splittable=np.array(splittable, bool),
    breaks=np.array(starts, np.int32),
    is_image=np.array(is_image, bool),
    break_offsets=_offsets(counts),
    drops=drops,
  )
  return _Shard(len(source), index)


def _concatenate(shards: Sequence[_Shard]) -> Index:
  indexes = [shard.index for shard in shards]
  firsts = _offsets([shard.num_records for shard in shards])
  counts = np.concatenate([np.diff(index.break_offsets) for index in indexes])
  return Index(
    records=np.concatenate([i.records + first for i, first in zip(indexes, firsts, strict=False)]),
    num_positions=np.concatenate([index.num_positions for index in indexes]),
    splittable=np.concatenate([index.splittable for index in indexes]),
    breaks=np.concatenate([index.breaks for index in indexes]),
    is_image=np.concatenate([index.is_image for index in indexes]),
    break_offsets=_offsets(counts),
    drops=sum((index.drops for index in indexes), collections.Counter()),
  )


def _offsets(counts: Sequence[int] | np.ndarray) -> np.ndarray:
  return np.cumsum(np.concatenate([[0], counts]), dtype=np.int64)


# --- all shards, and the cache


def cache_dir() -> epath.Path:
  """Returns the folder that indexes are kept in."""
  return epath.Path(os.environ.get("MM1_JAX_CACHE", "~/.cache/mm1_jax")).expanduser() / "index"


def _load_shards(
  source: Source, encoder: Encoder, keys: Sequence[str], process_index: int
) -> list[_Shard]:
  """Returns the index of each shard, from the cache, or made now and then kept."""
  files = [cache_dir() / f"{key}.npz" for key in keys]
  shards = {i: shard for i, file in enumerate(files) if (shard := _read(file))}
  missing = [i for i in range(len(files)) if i not in shards]
  at = process_index % max(len(missing), 1)
  jobs = {
    i: (SourceConfig(name=source.name, path=source.paths[i]), encoder, files[i])
    for i in missing[at:] + missing[:at]
  }
  start = told = time.monotonic()
  kept = True
  for i, shard in _make_shards(jobs):
    shards[i] = shard
    kept = kept and _write(files[i], shard)
    if time.monotonic() - told > SECONDS_BETWEEN_NEWS:
      told = time.monotonic()
      logging.info("indexed %d of %d shards of source '%s'", len(shards), len(files), source.name)
  if missing:
    made = [shards[i].index for i in missing]
    logging.info(
      "indexed source '%s' in %.1f s: %d examples, %d positions, %d images, left out %s",
      *(source.name, time.monotonic() - start, sum(map(len, made))),
      *(sum(int(index.num_positions.sum()) for index in made), sum(i.num_images for i in made)),
      dict(sum((index.drops for index in made), collections.Counter())),
    )
  return [shards[i] for i in range(len(files))]


_Job = tuple[SourceConfig, Encoder, epath.Path]


def _make_shards(jobs: Mapping[int, _Job]) -> Iterator[tuple[int, _Shard]]:
  """Yields the shards as they are made, by several processes if that pays."""
  size = sum(epath.Path(config.path).stat().length for config, _, _ in jobs.values())
  num_processes = min(len(jobs), len(os.sched_getaffinity(0)))
  left = dict(jobs)
  if num_processes > 1 and size > MIN_BYTES_FOR_PROCESSES:
    try:
      for i, shard in _in_processes(jobs, num_processes):
        del left[i]
        yield i, shard
    except BrokenProcessPool:
      logging.warning("processes that index do not start, or were killed; continuing without them")
  for i, job in left.items():
    yield i, _make_shard(*job)


def _in_processes(jobs: Mapping[int, _Job], num_processes: int) -> Iterator[tuple[int, _Shard]]:
  context = multiprocessing.get_context("spawn")  # threads of JAX do not survive a fork
  with concurrent.futures.ProcessPoolExecutor(num_processes, mp_context=context) as pool:
    numbers = {pool.submit(_make_shard, *job): i for i, job in jobs.items()}
    for future in concurrent.futures.as_completed(numbers):
      yield numbers[future], future.result()


def _make_shard(config: SourceConfig, encoder: Encoder, file: epath.Path) -> _Shard:
  return _read(file) or _index_shard(config, encoder)  # another host may have made it by now


def _key(path: str, encoder: Encoder) -> str:
  """Returns a hash of all that the index of a shard depends on."""
  stat = epath.Path(path).stat()
  parts = {
    "version": VERSION,
    "shard": [path, stat.length, stat.mtime],
    "tokenizer": hashlib.sha256(encoder.tokenizer.model).hexdigest(),
    "image": [encoder.tokens_per_image, encoder.image_delimiters],
    "template": encoder.template.to_json(),
    "tiling": repr(encoder.tiler),
  }
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _read(file: epath.Path) -> _Shard | None:
  """Returns a shard's index; None if it is not there, or damaged."""
  try:
    with np.load(io.BytesIO(file.read_bytes())) as arrays:
      values = {name: arrays[name] for name in arrays.files}
    drops = collections.Counter(json.loads(str(values.pop("drops"))))
    return _Shard(int(values.pop("num_records")), Index(**values, drops=drops))
  except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
    return None


def _write(file: epath.Path, shard: _Shard) -> bool:
  """Writes a temporary file and renames it: several processes may make the same index at once."""
  arrays = {f.name: getattr(shard.index, f.name) for f in dataclasses.fields(Index)}
  arrays["drops"] = np.array(json.dumps(shard.index.drops))
  data = io.BytesIO()
  np.savez(data, num_records=shard.num_records, **arrays)
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(f".{uuid.uuid4().hex}.tmp")
    new.write_bytes(data.getvalue())
    new.replace(file)
  except OSError as e:
    logging.warning("the index is not kept (%s); set MM1_JAX_CACHE to a folder we may write to", e)
    return False
  return True


# --- an index that processes share


def _folder(keys: Sequence[str], seq_len: int, max_images: int) -> pathlib.Path | None:
  """Returns where the index of these shards is mapped from; None if the cache is not on a disk."""
  cache = os.fspath(cache_dir())
  if "://" in cache:
    return None
  parts = json.dumps([*keys, seq_len, max_images])
  return pathlib.Path(cache) / f"{hashlib.sha256(parts.encode()).hexdigest()[:24]}-mapped"


def _read_mapped(folder: pathlib.Path | None) -> Index | None:
  """Returns the index that is mapped from a folder; None if it is not there, or damaged."""
  try:
    return _map(folder) if folder else None
  except (OSError, ValueError, EOFError):
    return None


def _map(folder: pathlib.Path) -> _MappedIndex:
  arrays = {
    field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r").view(np.ndarray)
    for field in dataclasses.fields(Index)
    if field.name != "drops"
  }
  drops = collections.Counter(json.loads((folder / "drops.json").read_text()))
  return _MappedIndex(**arrays, drops=drops, folder=folder)


def _keep_mapped(index: Index, folder: pathlib.Path | None) -> Index:
  """Returns a large index mapped from `folder`; a small one, or where that fails, unchanged."""
  arrays = {name: value for name, value in vars(index).items() if name != "drops"}
  if folder is None or sum(array.nbytes for array in arrays.values()) < MIN_BYTES_TO_MAP:
    return index
  new = folder.with_suffix(f".{uuid.uuid4().hex}.tmp")
  try:
    new.mkdir(parents=True)
    for name, array in arrays.items():
      np.save(new / f"{name}.npy", array)
    (new / "drops.json").write_text(json.dumps(index.drops))
    if _read_mapped(folder) is None:
      shutil.rmtree(folder, ignore_errors=True)  # it is damaged
      new.replace(folder)
  except OSError as e:  # another process may have been faster
    logging.warning("an index is in memory of each process: %s cannot be written (%s)", folder, e)
  finally:
    shutil.rmtree(new, ignore_errors=True)
  return _read_mapped(folder) or index
