# SPDX-License-Identifier: Apache-2.0
"""One unit becomes one shard, with its dead letters and a sidecar of what it holds.

  PREFIX-00003-of-00012.arrayrecord
  PREFIX.build/00003-of-00012.dead.jsonl.gz
  PREFIX.build/00003-of-00012.json     the sidecar; written last, so what it describes is complete

Records are in the order of their input, so the same input gives the same bytes. Nothing of a
shard is kept in memory but counts and a digest of each record.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgpack
from apache_beam.io.filesystems import FileSystems
from array_record.python.array_record_module import ArrayRecordWriter

from mm1_jax.data.build import files
from mm1_jax.data.build.filters import Refiner
from mm1_jax.data.build.formats import Unit, read
from mm1_jax.data.build.options import BuildOptions
from mm1_jax.data.build.rows import (
  SNIPPET_BYTES,
  Bad,
  Draft,
  Filtered,
  RowError,
  Skipped,
  digest,
  shorten,
)
from mm1_jax.data.build.stats import MAX_KINDS, Stats, texts
from mm1_jax.data.sources import WRITER_OPTIONS, Record
from mm1_jax.data.tokenizer import Tokenizer

TEMPORARY = ".tmp"
REPEATED = "repeated record"
# So many of a shard's latest records are compared with. Ten times a usual shard; 100 MB.
MAX_REMEMBERED = 1_000_000


class Job(NamedTuple):
  """A shard to build."""

  name: str  # 00003-of-00012
  unit: Unit
  key: str  # a hash of all that the shard depends on
  limit: int | None = None  # records


def shard_path(options: BuildOptions, name: str) -> str:
  return f"{options.output}-{name}.arrayrecord"


def work_folder(options: BuildOptions) -> str:
  return f"{options.output}.build"


def sidecar_path(options: BuildOptions, name: str) -> str:
  return f"{work_folder(options)}/{name}.json"


def dead_path(options: BuildOptions, name: str) -> str:
  return f"{work_folder(options)}/{name}.dead.jsonl.gz"


def build_shard(
  job: Job, options: BuildOptions, refiner: Refiner, tokenizer: Tokenizer | None
) -> dict[str, Any]:
  """Builds a shard, over what is there; returns its sidecar."""
  stats, start = Stats(), time.monotonic()
  with (
    finished(shard_path(options, job.name), options) as shard_file,
    finished(dead_path(options, job.name), options) as dead_file,
  ):
    with (
      contextlib.closing(ArrayRecordWriter(shard_file, WRITER_OPTIONS)) as shard,
      open(dead_file, "wb") as letters,
      gzip.GzipFile("", "wb", fileobj=letters, mtime=0) as dead,  # no name, no time: same bytes
    ):
      for record, packed in _records(job, options, refiner, stats, dead):
        shard.write(packed)
        num_tokens = sum(len(tokenizer.encode(t)) for t in texts(record)) if tokenizer else None
        stats.add(record, num_tokens)
    about = {"bytes": os.path.getsize(shard_file), "sha256": _sha256(shard_file)}
  sidecar = {
    "key": job.key,
    "options": json.loads(options.shard_key()),
    "input": [dataclasses.asdict(part) for part in job.unit],
    "seconds": round(time.monotonic() - start, 3),
    "shard": about,
    "stats": stats.to_dict(),
  }
  with finished(sidecar_path(options, job.name), options) as path, open(path, "w") as file:
    json.dump(sidecar, file, indent=1)
  return sidecar


def _records(
  job: Job, options: BuildOptions, refiner: Refiner, stats: Stats, dead: gzip.GzipFile
) -> Iterator[tuple[Record, bytes]]:
  """Yields the records that are kept, also packed, and counts the rows that are not."""
  records, ids = _Recent(), _Recent()
  for row in read(job.unit, options):
    if stats.records == job.limit:
      return
    if isinstance(row, Skipped):
      stats.skipped[row.reason] += 1
      continue
    stats.rows += 1
    try:
      if isinstance(row, Bad):
        stats.damaged_files += [row.where] if row.whole_file else []
        raise RowError(row.reason, row.found)
      record = refiner.refine(row, stats.lost_images)
      packed = msgpack.packb(record) or b""
      if records.has(digest(packed)):
        raise Filtered(REPEATED)
    except Filtered as e:
      stats.filtered[e.reason] += 1
    except RowError as e:
      stats.bad[e.reason] += 1
      if len(stats.first_bad) < MAX_KINDS:
        stats.first_bad.setdefault(e.reason, f"{row.where}: {e.found}" if e.found else row.where)
      dead.write(_letter(row, e))
    else:
      stats.repeated_ids += ids.has(digest(record["id"]))
      yield record, packed


class _Recent:
  """Tells which digests it has seen before, among the last `MAX_REMEMBERED`."""

  def __init__(self):
    self._seen: dict[bytes, None] = {}

  def has(self, mark: bytes) -> bool:
    if mark in self._seen:
      return True
    self._seen[mark] = None
    if len(self._seen) > MAX_REMEMBERED:
      del self._seen[next(iter(self._seen))]
    return False


def _letter(row: Bad | Draft, error: RowError) -> bytes:
  """Returns the line of a row in the dead letters."""
  if isinstance(row, Draft):
    row = Bad(error.reason, row.where, row.record["id"], shorten(row.record)[:SNIPPET_BYTES])
  letter = {"reason": error.reason, "where": row.where, "id": row.id, "row": row.row}
  letter |= {"found": error.found} if error.found else {}
  return json.dumps(letter).encode() + b"\n"


# --- files


@contextlib.contextmanager
def finished(path: str, options: BuildOptions) -> Iterator[str]:
  """Yields a local path to write to; the file gets its name when it is whole.

  The name is taken over at once where the file system can (local disks; object stores anyway).
  """
  remote = files.is_remote(path)
  folder = tempfile.gettempdir() if remote else work_folder(options)
  local = os.path.join(folder, f"{TEMPORARY}-{uuid.uuid4().hex}")
  try:
    yield local
    if remote:
      upload = f"{work_folder(options)}/{os.path.basename(local)}"
      with open(local, "rb") as source, files.create(upload) as target:
        shutil.copyfileobj(source, target, files.CHUNK_BYTES)
      FileSystems.rename([upload], [path])
    else:
      os.replace(local, path)
  finally:
    if os.path.exists(local):
      os.unlink(local)


def shard_fault(path: str, about: dict[str, Any]) -> str:
  """Returns how a file differs from the size and hash of a sidecar or manifest; '' if it does not.

  Raises:
    OSError: it cannot be read.
  """
  size, hasher = 0, hashlib.sha256()
  with files.open_raw(path) as file:
    while block := file.read(files.CHUNK_BYTES):
      size += len(block)
      hasher.update(block)
  if size != about["bytes"]:
    return f"has {size} bytes, not {about['bytes']}"
  if hasher.hexdigest() != about["sha256"]:
    return "is not what was built: its sha256 differs"
  return ""


def _sha256(path: str) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
