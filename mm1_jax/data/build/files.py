# SPDX-License-Identifier: Apache-2.0
"""Files, row by row, with bounded memory: JSON, JSON lines, text, parquet, tar; plain, gzip, zstd.

Everything is opened through Beam's FileSystems, so gs:// and the like work where Beam has them
installed. A file that breaks off gives the rows before the break, then a `BrokenFile`.
"""

import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet
from apache_beam.io.filesystem import BeamIOError, CompressionTypes
from apache_beam.io.filesystems import FileSystems

from mm1_jax.data.build.rows import SNIPPET_BYTES, BrokenFile, FilePart, Row, RowError
from mm1_jax.data.sources import DataError

MAX_ROW_BYTES = 64 << 20  # a longer row is a mistake, and would not fit a small worker
CHUNK_BYTES = 1 << 20
NOT_UTF8 = "not UTF-8"
NOT_JSON = "not JSON"
TOO_DEEP = "JSON nested too deeply"
ROW_TOO_LONG = "row longer than 64 MiB"
_COMPRESSED = (".gz", ".zst")
# A whole string, or a character that matters outside of strings; a quote alone opens a string that
# ends in a later chunk.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},"]', re.DOTALL)


# --- files


def match(pattern: str, flag: str) -> list[FilePart]:
  """Returns the files of a glob, sorted, each as one part.

  Raises:
    DataError: there is none, or the place cannot be listed.
  """
  try:
    (result,) = FileSystems.match([pattern])
  except (BeamIOError, ValueError, OSError) as e:
    raise DataError(f"{flag}={pattern} cannot be listed: {e}") from e
  files = sorted(result.metadata_list, key=lambda f: f.path)
  if not files:
    raise DataError(
      f"{flag}={pattern}: no file matches. Quote the glob, and mind that ** is any folder and [ ] "
      f"a set of characters."
    )
  return [FilePart(f.path, f.size_in_bytes, f.last_updated_in_seconds) for f in files]


def is_remote(path: str) -> bool:
  return "://" in path


def suffix(path: str) -> str:
  """Returns the suffix before any of compression: .jsonl of a.jsonl.gz."""
  name = path.lower()
  for ending in _COMPRESSED:
    name = name.removesuffix(ending)
  return os.path.splitext(name)[1]


def is_compressed(path: str) -> bool:
  return path.lower().endswith(_COMPRESSED)


def open_raw(path: str) -> Any:
  return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)


def create(path: str) -> Any:
  return FileSystems.create(path, compression_type=CompressionTypes.UNCOMPRESSED)


def open_file(path: str) -> BinaryIO:
  """Opens a file for reading, decompressed if its name says so."""
  raw = open_raw(path)
  if path.lower().endswith(".gz"):
    return io.BufferedReader(gzip.GzipFile(fileobj=raw), CHUNK_BYTES)  # pyright: ignore
  if path.lower().endswith(".zst"):
    # pyarrow's reader reports a frame that is cut off; zstandard's own takes it for the end.
    return io.BufferedReader(_Raw(pa.CompressedInputStream(raw, "zstd")), CHUNK_BYTES)
  return raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)


class _Raw(io.RawIOBase):
  """A pyarrow stream as Python's."""

  def __init__(self, stream: Any):
    self._stream = stream

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    data = self._stream.read(len(buffer))
    buffer[: len(data)] = data
    return len(data)


# --- text


def parse_text(raw: Any) -> str:
  """Returns the text of bytes.

  Raises:
    RowError: they are none.
  """
  if not isinstance(raw, bytes):
    raise RowError("not a text")
  try:
    return raw.decode("utf-8-sig")
  except UnicodeDecodeError as e:
    raise RowError(NOT_UTF8) from e


def text_rows(path: str, split: str, name: str) -> Iterator[Row]:
  """Yields the documents of a text file as dicts of one field.

  Args:
    path: of the file.
    split: the text between documents; '' if the file is one.
    name: of the field.

  Raises:
    BrokenFile: the file breaks off.
  """
  mark = split.encode()
  with reading(path), open_file(path) as stream:
    buffer, offset, too_long = b"", 0, False
    while True:
      chunk = stream.read(CHUNK_BYTES)
      buffer += chunk
      *whole, buffer = buffer.split(mark) if mark else [buffer]
      for raw in whole if chunk else [*whole, buffer]:
        error = ROW_TOO_LONG if too_long or len(raw) > MAX_ROW_BYTES else ""
        if raw.strip() or error or not mark:
          place = f"byte {offset}" if mark else ""
          yield Row(path, place, {name: raw}, raw[:SNIPPET_BYTES], error)
        offset += len(raw) + len(mark)
        too_long = False
      if not chunk:
        return
      if len(buffer) > MAX_ROW_BYTES:  # keeps reading, to find its end
        keep = len(mark) if mark else 0
        offset += len(buffer) - keep
        buffer, too_long = buffer[len(buffer) - keep :], True


# --- JSON and JSON lines


def split_json(file: FilePart, rows_per_shard: int) -> list[FilePart]:
  """Returns parts of about `rows_per_shard` rows of a JSON array, or of JSON lines."""
  try:
    with reading(file.path):
      if is_array(file.path) and not is_compressed(file.path):
        return _split_array(file, rows_per_shard)
      return _split_lines(file, rows_per_shard)
  except BrokenFile as e:
    return [dataclasses.replace(file, error=e.reason)]


def json_rows(part: FilePart) -> Iterator[Row]:
  """Yields the rows of a part, parsed.

  Raises:
    BrokenFile: the file breaks off.
  """
  with reading(part.path), open_file(part.path) as stream:
    array = is_array(part.path)
    for offset, raw in _array_rows(stream, part) if array else line_rows(stream, part):
      if raw is None or raw.strip() or array:
        yield _parse(part.path, f"byte {offset}", raw)


def is_array(path: str) -> bool:
  """Returns whether a file begins with `[`."""
  with open_file(path) as stream:
    return stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def parse_json(raw: bytes) -> Any:
  """Returns the value of a JSON text.

  Raises:
    RowError: it is none.
  """
  try:
    return json.loads(raw.decode("utf-8-sig"))
  except UnicodeDecodeError as e:
    raise RowError(NOT_UTF8) from e
  except RecursionError as e:
    raise RowError(TOO_DEEP) from e
  except ValueError as e:
    raise RowError(NOT_JSON) from e


def _parse(path: str, place: str, raw: bytes | None) -> Row:
  if raw is None:
    return Row(path, place, None, error=ROW_TOO_LONG)
  try:
    return Row(path, place, parse_json(raw), raw[:SNIPPET_BYTES])
  except RowError as e:
    return Row(path, place, None, raw[:SNIPPET_BYTES], e.reason)


def line_rows(stream: BinaryIO, part: FilePart) -> Iterator[tuple[int, bytes | None]]:
  """Yields the lines that begin in a part, with their place; None for one that is too long."""
  offset = part.start
  if part.start:  # the line that begins before is the part before's
    stream.seek(part.start - 1)
    offset += _skip_line(stream) - 1
  while part.stop < 0 or offset < part.stop:
    line = stream.readline(MAX_ROW_BYTES)
    if not line:
      return
    length = len(line)
    if length == MAX_ROW_BYTES and not line.endswith(b"\n"):
      length += _skip_line(stream)
      yield offset, None
    else:
      yield offset, line
    offset += length


def _skip_line(stream: BinaryIO) -> int:
  """Reads to the end of a line; returns the number of bytes."""
  total = 0
  while line := stream.readline(CHUNK_BYTES):
    total += len(line)
    if line.endswith(b"\n"):
      break
  return total


def _split_lines(file: FilePart, rows_per_shard: int) -> list[FilePart]:
  """Cuts by bytes, after the mean length of the first lines: nothing is read but those."""
  with open_file(file.path) as stream:
    head = stream.read(CHUNK_BYTES)
  mean = len(head) / max(1, head.count(b"\n"))
  if is_compressed(file.path):  # cannot be entered in the middle
    return [dataclasses.replace(file, rows=max(1, int(4 * file.size / max(1, mean))))]
  rows = max(1, round(file.size / max(1, mean)))
  num = max(1, round(rows / rows_per_shard))
  cuts = [file.size * i // num for i in range(num + 1)]
  return [
    dataclasses.replace(file, start=start, stop=stop, rows=rows // num)
    for start, stop in itertools.pairwise(cuts)
  ]


def _split_array(file: FilePart, rows_per_shard: int) -> list[FilePart]:
  """Cuts between elements, which are found in one pass."""
  starts, stop, rows = [], 0, 0
  error = ""
  with open_file(file.path) as stream:
    try:
      for offset, raw in _elements(stream, _to_array(stream), closed=True):
        if rows % rows_per_shard == 0:
          starts.append(offset)
        stop = offset + len(raw)
        rows += 1
    except BrokenFile as e:
      error = e.reason
  cuts = [*starts, stop]
  parts = [
    dataclasses.replace(file, start=start, stop=stop, rows=min(rows, rows_per_shard))
    for start, stop in itertools.pairwise(cuts)
  ]
  return [*parts, dataclasses.replace(file, error=error)] if error else parts


def _array_rows(stream: BinaryIO, part: FilePart) -> Iterator[tuple[int, bytes]]:
  if part.stop < 0:
    yield from _elements(stream, _to_array(stream), closed=True)
  else:
    stream.seek(part.start)
    yield from _elements(_Range(stream, part.stop - part.start), part.start, closed=False)


def _to_array(stream: BinaryIO) -> int:
  """Reads through the `[` that begins an array; returns the number of bytes."""
  total = 1
  while stream.read(1) != b"[":
    total += 1
  return total


class _Range:
  """The next `length` bytes of a stream."""

  def __init__(self, stream: BinaryIO, length: int):
    self._stream = stream
    self._left = length

  def read(self, size: int) -> bytes:
    data = self._stream.read(min(size, self._left))
    self._left -= len(data)
    return data


def _elements(stream: Any, offset: int, *, closed: bool) -> Iterator[tuple[int, bytes]]:
  """Yields the elements of a JSON array, unparsed, with their place.

  An element that is no JSON is yielded like the others: quotes and brackets tell where it ends.

  Args:
    stream: positioned after the `[`, or where an element begins.
    offset: its place.
    closed: whether there must be a `]`.

  Raises:
    BrokenFile: an element is too long, or there is no `]`.
  """
  buffer, scanned, depth = b"", 0, 0
  while chunk := stream.read(max(CHUNK_BYTES, len(buffer))):
    buffer += chunk
    begin = 0
    for token in _TOKEN.finditer(buffer, scanned):
      kind = token[0]
      if kind == b'"':
        break
      scanned = token.end()
      if kind in (b"[", b"{"):
        depth += 1
      elif kind in (b"]", b"}"):
        depth -= 1
      if depth < 0 or (kind == b"," and depth == 0):
        raw = buffer[begin : token.start()]
        if depth == 0 or raw.strip():
          yield offset + begin, raw
        begin = scanned
      if depth < 0:
        if (buffer[scanned:] + stream.read(CHUNK_BYTES)).strip():
          raise BrokenFile("JSON array with something after its end")
        return
    buffer, offset, scanned = buffer[begin:], offset + begin, scanned - begin
    if len(buffer) > MAX_ROW_BYTES:
      raise BrokenFile(ROW_TOO_LONG)
  if closed:
    raise BrokenFile("JSON array without an end")
  if buffer.strip():
    yield offset, buffer


# --- parquet


def split_parquet(file: FilePart, rows_per_shard: int) -> list[FilePart]:
  """Returns parts of whole row groups, of about `rows_per_shard` rows."""
  try:
    with reading(file.path), pyarrow.parquet.ParquetFile(open_raw(file.path)) as table:
      sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
  except BrokenFile as e:
    return [dataclasses.replace(file, error=e.reason)]
  parts, start, rows = [], 0, 0
  for i, size in enumerate(sizes):
    if rows and rows + size > rows_per_shard:
      parts.append(dataclasses.replace(file, start=start, stop=i, rows=rows))
      start, rows = i, 0
    rows += size
  return [*parts, dataclasses.replace(file, start=start, stop=len(sizes), rows=rows)]


def parquet_rows(part: FilePart, columns: tuple[str, ...]) -> Iterator[Row]:
  """Yields rows as dicts of the columns that are there.

  Raises:
    BrokenFile: the file cannot be read on, or has none of the columns.
  """
  with reading(part.path), pyarrow.parquet.ParquetFile(open_raw(part.path)) as table:
    present = [c for c in columns if c in table.schema_arrow.names]
    if not present:
      raise BrokenFile(f"none of the columns {', '.join(columns)}")
    groups = list(range(part.start, part.stop))
    row = sum(table.metadata.row_group(i).num_rows for i in range(part.start))
    # Small batches: a row of web text with embedded pictures may be large.
    for batch in table.iter_batches(batch_size=16, row_groups=groups, columns=present):
      for i in range(batch.num_rows):
        yield _parquet_row(batch.slice(i, 1), part.path, f"row {row}")
        row += 1


def _parquet_row(row: pa.RecordBatch, path: str, place: str) -> Row:
  try:
    return Row(path, place, row.to_pylist()[0])
  except UnicodeDecodeError:
    return Row(path, place, None, error=NOT_UTF8)


# --- tar


def tar_members(
  path: str, wanted: Callable[[tarfile.TarInfo], bool]
) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
  """Yields the members of a tar file that are not folders, with their bytes if `wanted` says so.

  Raises:
    BrokenFile: it is none, or breaks off.
  """
  with (
    reading(path),
    open_file(path) as stream,
    tarfile.open(fileobj=stream, mode="r:", errors="surrogateescape") as tar,
  ):
    while member := tar.next():
      tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it keeps them all
      if not member.isdir():
        file = tar.extractfile(member) if member.isreg() and wanted(member) else None
        yield member, file.read() if file else None
    # At a header that it cannot read, tarfile takes the file for finished. The true end is zeros.
    stream.seek(tar.offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
      raise BrokenFile(_broken(path))


# --- damage


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
  """Turns what the readers raise at damage into a `BrokenFile`.

  Other errors pass: a disk or a network that fails is no property of the file.
  """
  try:
    yield
  except (EOFError, zlib.error, pa.ArrowException, tarfile.TarError, OverflowError) as e:
    raise BrokenFile(_broken(path)) from e
  except OSError as e:
    # gzip's and pyarrow's own; what the operating system raises has a number.
    if e.errno is None and type(e) in (OSError, gzip.BadGzipFile):
      raise BrokenFile(_broken(path)) from e
    raise


def _broken(path: str) -> str:
  """Returns the reason of a broken file: the same for all files of a kind."""
  return f"broken {os.path.splitext(path)[1].lower()} file"
