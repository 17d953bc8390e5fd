# SPDX-License-Identifier: Apache-2.0
"""Parquet files, row by row; how much of one is in memory is known before it is read."""

import dataclasses
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet

from mm1_jax import parquet, untrusted
from mm1_jax.data.build.bounds import BOUNDS, PAGE_TOO_LARGE, ROW_TOO_LONG, Bounds
from mm1_jax.data.build.files import open_raw, reading
from mm1_jax.data.build.rows import BrokenFile, FilePart, Row

PARQUET = "parquet"  # layout of a part
ROWS_AT_ONCE = 16  # at most: a row of web text with embedded pictures may be large


def split_parquet(file: FilePart, rows_per_shard: int) -> list[FilePart]:
  """Returns parts of whole row groups, of about `rows_per_shard` rows."""
  try:
    with reading(file.path), pyarrow.parquet.ParquetFile(open_raw(file.path)) as table:
      sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
  except BrokenFile as e:
    return [dataclasses.replace(file, error=e.reason, cause=e.cause)]
  file = dataclasses.replace(file, layout=PARQUET)
  parts, start, rows = [], 0, 0
  for i, size in enumerate(sizes):
    if rows and rows + size > rows_per_shard:
      parts.append(dataclasses.replace(file, start=start, stop=i, rows=rows))
      start, rows = i, 0
    rows += size
  return [*parts, dataclasses.replace(file, start=start, stop=len(sizes), rows=rows)]


def parquet_rows(
  part: FilePart, columns: tuple[str, ...], bounds: Bounds = BOUNDS
) -> Iterator[Row]:
  """Yields rows as dicts of the columns that are there; a group above a bound as one bad row.

  Raises:
    BrokenFile: the file cannot be read on, or has none of the columns.
  """
  with (
    reading(part.path),
    open_raw(part.path) as pages,
    pyarrow.parquet.ParquetFile(open_raw(part.path)) as table,
  ):
    present = [c for c in columns if c in table.schema_arrow.names]
    if not present:
      found = ", ".join(table.schema_arrow.names)
      raise BrokenFile(f"none of the columns {', '.join(columns)}", f"its columns are {found}")
    row = sum(table.metadata.row_group(i).num_rows for i in range(part.start))
    for group in range(part.start, part.stop):
      num_rows = table.metadata.row_group(group).num_rows
      try:
        size = parquet.group_size(pages, table.metadata, group, tuple(present))
      except ValueError as e:
        raise pa.ArrowException(str(e)) from e
      if size.largest_page > bounds.page or size.total > bounds.row * max(num_rows, 1):
        yield Row(part.path, f"row group {group}", None, error=PAGE_TOO_LARGE)
      else:
        at_once = min(ROWS_AT_ONCE, max(1, bounds.page // max(1, size.largest_page)))
        yield from _group_rows(table, group, present, at_once, part.path, row, bounds)
      row += num_rows


def _group_rows(
  table: pyarrow.parquet.ParquetFile,
  group: int,
  columns: list[str],
  at_once: int,
  path: str,
  row: int,
  bounds: Bounds,
) -> Iterator[Row]:
  for batch in table.iter_batches(batch_size=at_once, row_groups=[group], columns=columns):
    for i in range(batch.num_rows):
      yield _row(batch.slice(i, 1), path, f"row {row}", bounds)
      row += 1


def _row(row: pa.RecordBatch, path: str, place: str, bounds: Bounds) -> Row:
  if row.nbytes > bounds.row:
    return Row(path, place, None, error=ROW_TOO_LONG)
  try:
    return Row(path, place, row.to_pylist()[0])
  except UnicodeDecodeError:
    return Row(path, place, None, error=untrusted.NOT_UTF8)
