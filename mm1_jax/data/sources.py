# SPDX-License-Identifier: Apache-2.0
"""Records on disk: msgpack dicts in ArrayRecord shards, read at random by number.

There are two kinds of record, told apart by their last field:

  document      {"id": str, "source": str, "license": str, "credit": str, "content": [item, ...]}
  conversation  {"id": str, "source": str, "license": str, "credit": str, "turns": [turn, ...]}

  item  {"text": str} or {"image": bytes}, a JPEG, PNG or another of `image.FORMATS`
  turn  {"role": "user", "assistant" or, first of all, "system", "content": [item, ...]}

A caption is a document `[image, text]`, plain text is `[text]`, an interleaved document any mix.
"""

import concurrent.futures
import glob
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgpack
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from etils import epath
from grain import sources as grain_sources

from mm1_jax.config import SourceConfig, UserError

Record = dict[str, Any]
ROLES = ("system", "user", "assistant")
# One record a group: reading one at random decompresses nothing else.
WRITER_OPTIONS = "group_size:1,zstd:9"
SAMPLE = 1 << 16  # bytes of a block of a shard that is hashed
SAMPLERS = 64  # shards that are looked at at once: each is a request or three on an object store
HASH_DIGITS = 12


class DataError(UserError):
  """A mistake in the data; the message names the file, the record and what to do about it."""


class RecordError(DataError):
  """One record cannot be read; the others may be fine."""


class Source:
  """Random access to the records of one `SourceConfig`.

  Pickles to its paths alone, so worker processes open the shards themselves.

  Raises:
    DataError: no file matches, a shard cannot be opened, or there is no record at all.
  """

  def __init__(self, config: SourceConfig):
    self.name = config.name
    self.paths = expand(config)
    self._reader = _open(self.name, self.paths)
    if not len(self._reader):
      raise DataError(f"source '{self.name}': no record in {len(self.paths)} shards {config.path}.")

  def __len__(self) -> int:
    return len(self._reader)

  def __getitem__(self, index: int) -> Record:
    """Returns record `index`, checked against the schema.

    Raises:
      RecordError: the record is damaged or not of the schema.
    """
    where = f"source '{self.name}', record {index}"
    try:
      data = self._reader[index]
    except (RuntimeError, ValueError) as e:
      raise RecordError(f"{where}: the shard is damaged here ({e}).") from e
    try:
      record = msgpack.unpackb(data)
    except Exception as e:  # msgpack raises many types, and none of them is ours
      raise RecordError(f"{where}: not msgpack ({type(e).__name__}: {e}).") from e
    check_record(record, where)
    return record


def expand(config: SourceConfig) -> tuple[str, ...]:
  """Returns the shards that a source's glob matches, sorted.

  Raises:
    DataError: there is none, or what lists such a path is not installed.
  """
  try:
    paths = find_shards(config.path)
  except ImportError as e:
    raise DataError(
      f"source '{config.name}': cannot list {config.path} ({e}). For gs://, pip install gcsfs."
    ) from e
  if not paths:
    raise DataError(
      f"source '{config.name}': no file matches {config.path}. Correct data.sources, or make "
      f"shards there: python -m mm1_jax.data.build --help."
    )
  return paths


def find_shards(pattern: str) -> tuple[str, ...]:
  """Returns the files that a glob matches, sorted; none is opened.

  Raises:
    ImportError: what lists such a path, gs:// for instance, is not installed.
  """
  path = epath.Path(pattern)
  if "://" in pattern:
    return tuple(sorted(str(p) for p in path.parent.glob(path.name)))
  return tuple(sorted(glob.glob(os.path.abspath(path.expanduser()))))


def sample_hashes(paths: Sequence[str]) -> str:
  """Returns 12 hexadecimal digits for each shard, which tell its content from another's.

  They are of its size and of three blocks of 64 kB, at both ends and in the middle; of all of it if
  it is no larger. A shard ends with the place of each record in it: records that are replaced by
  others of other lengths are always seen. Bytes that change in place elsewhere are not, as no shard
  is read whole: `mm1_jax.convert verify` does that.

  Raises:
    DataError: a shard cannot be read.
  """
  with concurrent.futures.ThreadPoolExecutor(SAMPLERS) as pool:
    return "".join(pool.map(_sample_hash, paths))


def _sample_hash(path: str) -> str:
  try:
    file = epath.Path(path)
    size = file.stat().length
    hasher = hashlib.sha256(str(size).encode())
    starts = {max(0, at) for at in (0, (size - SAMPLE) // 2, size - SAMPLE)}
    with file.open("rb") as opened:
      for start in sorted(starts):
        opened.seek(start)
        hasher.update(opened.read(SAMPLE))
  except OSError as e:
    raise DataError(f"the shard {path} cannot be read ({e}).") from e
  return hasher.hexdigest()[:HASH_DIGITS]


def write_shards(records: Iterable[Mapping[str, Any]], prefix: str, num_shards: int) -> list[str]:
  """Writes records in turn to `prefix-00000-of-00002.arrayrecord`, ...; returns the paths.

  Raises:
    RecordError: a record is not of the schema.
  """
  paths = [f"{prefix}-{i:05d}-of-{num_shards:05d}.arrayrecord" for i in range(num_shards)]
  writers = [array_record_module.ArrayRecordWriter(p, WRITER_OPTIONS) for p in paths]
  try:
    for i, record in enumerate(records):
      check_record(record, f"{prefix}, record {i}")
      writers[i % num_shards].write(msgpack.packb(record))
  finally:
    for writer in writers:
      writer.close()
  return paths


def check_record(record: Any, where: str) -> None:
  """Raises a RecordError unless `record` is a document or a conversation."""
  if not isinstance(record, Mapping):
    raise RecordError(f"{where}: a {type(record).__name__}; a record is a dict.")
  if not isinstance(record.get("id"), str):
    raise RecordError(f"{where}: 'id' is {record.get('id')!r}; it must be a string.")
  where = f"{where} (id '{record['id']}')"
  kinds = [k for k in ("content", "turns") if k in record]
  if len(kinds) != 1:
    raise RecordError(
      f"{where}: its keys are {sorted(record)}; it needs either 'content' or 'turns'."
    )
  if kinds == ["content"]:
    _check_items(record["content"], f"{where}: content")
    return
  turns = record["turns"]
  if not isinstance(turns, list) or not turns:
    raise RecordError(f"{where}: 'turns' must be a list with at least one turn.")
  for i, turn in enumerate(turns):
    if not isinstance(turn, Mapping) or turn.get("role") not in ROLES:
      raise RecordError(f"{where}: turns[{i}] must be a dict whose 'role' is one of {ROLES}.")
    if i and turn["role"] == "system":
      raise RecordError(f"{where}: turns[{i}] is a system turn; only the first may be one.")
    _check_items(turn.get("content"), f"{where}: turns[{i}].content")


def _check_items(items: Any, where: str) -> None:
  if not isinstance(items, list) or not items:
    raise RecordError(f"{where} must be a list with at least one item.")
  for i, item in enumerate(items):
    if isinstance(item, Mapping) and len(item) == 1:
      ((kind, value),) = item.items()
      if (kind == "text" and isinstance(value, str)) or (
        kind == "image" and isinstance(value, bytes)
      ):
        continue
    raise RecordError(f"{where}[{i}] must be {{'text': str}} or {{'image': bytes}}.")


def _open(name: str, paths: tuple[str, ...]) -> Any:
  """Opens all shards at once; when that fails, finds the one that cannot be opened."""
  try:
    return grain_sources.ArrayRecordDataSource(paths)
  except Exception as all_error:
    for path in paths:
      try:
        grain_sources.ArrayRecordDataSource(path)
      except Exception as e:
        raise DataError(
          f"source '{name}': {path} is not a whole ArrayRecord file ({e}). It may have been cut "
          f"off while it was copied; copy or build it again."
        ) from e
    raise DataError(f"source '{name}': cannot open {paths} ({all_error}).") from all_error
