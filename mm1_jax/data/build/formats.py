# SPDX-License-Identifier: Apache-2.0
"""The formats: how each lists its parts, reads their rows, and makes records of them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mm1_jax import untrusted
from mm1_jax.data.build import captions, conversations, documents, files, webdataset
from mm1_jax.data.build.options import BuildOptions
from mm1_jax.data.build.rows import (
  Bad,
  BrokenFile,
  Draft,
  FilePart,
  Row,
  RowError,
  Skipped,
  clean,
  snippet,
)
from mm1_jax.data.sources import Record

Unit = tuple[FilePart, ...]


class BuildFormat(NamedTuple):
  """Three functions; `parts` lists those of a file, or of all if there are no files."""

  parts: Callable[..., list[FilePart]]
  rows: Callable[[FilePart, BuildOptions], Iterator[Row | Skipped]]
  records: Callable[[Any, str, BuildOptions], Iterator[Record | Skipped]]


FORMATS = {
  "webdataset": BuildFormat(webdataset.parts, webdataset.rows, webdataset.records),
  "coco": BuildFormat(captions.coco_parts, captions.coco_rows, captions.coco_records),
  "llava": BuildFormat(documents.row_parts, documents.rows, conversations.llava_records),
  "obelics": BuildFormat(documents.row_parts, documents.rows, documents.obelics_records),
  "mmc4": BuildFormat(documents.row_parts, documents.rows, documents.mmc4_records),
  "text": BuildFormat(documents.text_parts, documents.text_rows, documents.text_records),
  "tfds": BuildFormat(captions.tfds_parts, captions.tfds_rows, captions.tfds_records),
}


def list_units(options: BuildOptions) -> list[Unit]:
  """Returns what each shard is made of: neighbouring parts, of about `rows_per_shard` rows.

  Raises:
    UserError: there is nothing to read, or it is not of the format.
  """
  split = FORMATS[options.format].parts
  if options.format == "tfds":
    parts = split(options)
  else:
    parts = [p for f in files.match(options.input, "--input") for p in split(f, options)]
  units: list[list[FilePart]] = []
  rows = options.rows_per_shard
  for part in parts:
    if rows + part.rows > options.rows_per_shard:
      units.append([])
      rows = 0
    units[-1].append(part)
    rows += part.rows
  return [tuple(unit) for unit in units]


def read(unit: Unit, options: BuildOptions) -> Iterator[Draft | Bad | Skipped]:
  """Yields the records of a unit in order, and what could not be made one."""
  for part in unit:
    if part.error:
      yield Bad(part.error, part.path, whole_file=True, found=part.cause)
      continue
    try:
      for row in FORMATS[options.format].rows(part, options):
        yield from [row] if isinstance(row, Skipped) else _drafts(row, options)
    except BrokenFile as e:
      yield Bad(e.reason, part.path, whole_file=True, found=e.cause)


def _drafts(row: Row, options: BuildOptions) -> Iterator[Draft | Bad | Skipped]:
  reason, found = row.error, ""
  if not reason:
    try:
      for record in FORMATS[options.format].records(row.value, row.default_id, options):
        yield record if isinstance(record, Skipped) else Draft(record, row.where)
    except RowError as e:
      reason, found = e.reason, e.found
    except (MemoryError, RecursionError):
      raise
    except Exception as e:  # a row of unforeseen form must not end a build of days
      reason, found = f"not of the format ({type(e).__name__})", untrusted.why(e)
  if reason:
    id = row.value.get("id", "") if isinstance(row.value, dict) else ""
    yield Bad(reason, row.where, clean(str(id)), snippet(row), found=clean(found))
