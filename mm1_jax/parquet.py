# SPDX-License-Identifier: Apache-2.0
"""How much memory a Parquet file asks for, before any of it is decompressed.

A page is decompressed whole, and what repeats takes few bytes: 300 MB of a letter fit into 10 kB.
The file's own totals may lie, so the header of each page is read: it is what a reader reserves
memory by. Headers are in Thrift's compact protocol (parquet-format, `PageHeader`).
"""

import struct
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from etils import epath

_I32_BYTES = 4  # of a value's level, or its index in a dictionary


class GroupSize(NamedTuple):
  """What the pages of a row group decompress to, in bytes."""

  largest_page: int
  total: int


def group_size(file: IO[bytes], metadata: Any, group: int, columns: tuple[str, ...]) -> GroupSize:
  """Returns the sizes of a row group.

  Args:
    file: the Parquet file; left where the last page ends.
    metadata: pyarrow's of the file.
    group: index of the row group.
    columns: names of the columns that will be read; all that is below them counts.

  Raises:
    ValueError: a page's header is damaged, or where the file has none.
  """
  largest, total = 0, 0
  row_group = metadata.row_group(group)
  for i in range(row_group.num_columns):
    chunk = row_group.column(i)
    if chunk.path_in_schema.partition(".")[0] not in columns:
      continue
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    at, end = min(start, chunk.data_page_offset), start + chunk.total_compressed_size
    while at < end:
      size, at = _page(file, at)
      largest, total = max(largest, size), total + size
  return GroupSize(largest, total)


def check(path: epath.PathLike, most: int) -> None:
  """Refuses a file with a page above `most` bytes, decompressed.

  Raises:
    ValueError: it has one, or is damaged.
  """
  import pyarrow.parquet as pq  # of an extra

  with epath.Path(path).open("rb") as file:
    metadata = pq.read_metadata(file)
    columns = tuple({name.partition(".")[0] for name in _leaves(metadata)})
    for group in range(metadata.num_row_groups):
      largest = group_size(file, metadata, group, columns).largest_page
      if largest > most:
        raise ValueError(f"a page of {largest:,} bytes in row group {group}; {most:,} can be read")


def _leaves(metadata: Any) -> Iterator[str]:
  for i in range(metadata.num_columns):
    yield metadata.schema.column(i).path


def _page(file: IO[bytes], at: int) -> tuple[int, int]:
  """Returns the size of the page at a place, decompressed, and where the next one begins."""
  if at < 0:
    raise ValueError(f"no page can be at {at}")
  file.seek(at)
  header = _Compact(file).struct()
  size, stored = header.get(2), header.get(3)
  if not isinstance(size, int) or not isinstance(stored, int) or min(size, stored) < 0:
    raise ValueError(f"the page at {at} has no size")
  # Of the header of its kind: data, dictionary, or data of version 2.
  values = [kind.get(1, 0) for kind in map(header.get, (5, 7, 8)) if isinstance(kind, dict)]
  counted = [_I32_BYTES * number for number in values if isinstance(number, int)]
  return max(size, *counted, 0), file.tell() + stored


class _Compact:
  """Reads structs in Thrift's compact protocol, as dicts by the fields' numbers."""

  def __init__(self, file: IO[bytes]):
    self._file = file

  def struct(self, depth: int = 0) -> dict[int, Any]:
    if depth > 8:
      raise ValueError("a page's header is nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while head := self._byte():
      number = number + (head >> 4) if head >> 4 else self._number()
      fields[number] = self._value(head & 15, depth)
    return fields

  def _value(self, kind: int, depth: int) -> Any:
    if kind in (1, 2):
      return kind == 1
    if kind == 3:
      return self._byte()
    if kind in (4, 5, 6):
      return self._number()
    if kind == 7:
      return struct.unpack("<d", self._bytes(8))[0]
    if kind == 8:  # a statistic: of no use here
      return self._file.seek(self._varint(), 1)
    if kind == 12:
      return self.struct(depth + 1)
    raise ValueError(f"a page's header has a field of type {kind}")

  def _number(self) -> int:
    zigzag = self._varint()
    return (zigzag >> 1) ^ -(zigzag & 1)

  def _varint(self) -> int:
    value = 0
    for shift in range(0, 70, 7):
      byte = self._byte()
      value |= (byte & 127) << shift
      if byte < 128:
        return value
    raise ValueError("a page's header has a number without an end")

  def _byte(self) -> int:
    return self._bytes(1)[0]

  def _bytes(self, number: int) -> bytes:
    data = self._file.read(number)
    if len(data) < number:
      raise ValueError("a page's header breaks off")
    return data
