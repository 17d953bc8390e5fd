# SPDX-License-Identifier: Apache-2.0
"""Files, row by row, with bounded memory: JSON, JSON lines and text; plain, gzip or zstd.

Everything is opened through Beam's FileSystems, so gs:// and the like work where Beam has them
installed. A file that breaks off gives the rows before the break, then a `BrokenFile`.
"""

import contextlib
import dataclasses
import gzip
import io
import itertools
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
from apache_beam.io.filesystem import BeamIOError, CompressionTypes
from apache_beam.io.filesystems import FileSystems

from mm1_jax import untrusted
from mm1_jax.data.build.bounds import BOUNDS, FILE_TOO_LARGE, ROW_TOO_LONG, Bounds
from mm1_jax.data.build.rows import SNIPPET_BYTES, BrokenFile, FilePart, Row, RowError
from mm1_jax.data.sources import DataError

CHUNK_BYTES = 1 << 20
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


def open_file(path: str, most: int = BOUNDS.file) -> BinaryIO:
  """Opens a file for reading, decompressed if its name says so.

  What is decompressed ends with a BrokenFile after `most` bytes: a few bytes of the file make
  thousands of them.
  """
  raw = open_raw(path)
  if path.lower().endswith(".gz"):
    return io.BufferedReader(_Decompressed(gzip.GzipFile(fileobj=raw), most), CHUNK_BYTES)
  if path.lower().endswith(".zst"):
    # pyarrow's reader reports a frame that is cut off; zstandard's own takes it for the end.
    return io.BufferedReader(
      _Decompressed(pa.CompressedInputStream(raw, "zstd"), most), CHUNK_BYTES
    )
  return raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)


class _Decompressed(io.RawIOBase):
  """A stream that is counted as it is read, for Python's buffer."""

  def __init__(self, stream: Any, most: int):
    self._stream = stream
    self._left = most

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    data = self._stream.read(len(buffer))
    self._left -= len(data)
    if self._left < 0:
      raise BrokenFile(FILE_TOO_LARGE)
    buffer[: len(data)] = data
    return len(data)


def read_whole(path: str, most: int) -> bytearray:
  """Returns the bytes of a file, decompressed.

  Raises:
    BrokenFile: there are more than `most`.
  """
  data = bytearray()
  with reading(path), open_file(path, most) as stream:
    while chunk := stream.read(CHUNK_BYTES):
      data += chunk
      if len(data) > most:
        raise BrokenFile(FILE_TOO_LARGE)
  return data


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
    raise RowError(untrusted.NOT_UTF8) from e


def text_rows(path: str, split: str, name: str, bounds: Bounds = BOUNDS) -> Iterator[Row]:
  """Yields the documents of a text file as dicts of one field.

  Args:
    path: of the file.
    split: the text between documents; '' if the file is one.
    name: of the field.
    bounds: of a document, and of the file.

  Raises:
    BrokenFile: the file breaks off.
  """
  mark = split.encode()
  with reading(path), open_file(path, bounds.file) as stream:
    buffer, offset, too_long = b"", 0, False
    while True:
      chunk = stream.read(CHUNK_BYTES)
      buffer += chunk
      *whole, buffer = buffer.split(mark) if mark else [buffer]
      for raw in whole if chunk else [*whole, buffer]:
        error = ROW_TOO_LONG if too_long or len(raw) > bounds.row else ""
        if raw.strip() or error or not mark:
          place = f"byte {offset}" if mark else ""
          yield Row(path, place, {name: raw}, raw[:SNIPPET_BYTES], error)
        offset += len(raw) + len(mark)
        too_long = False
      if not chunk:
        return
      if len(buffer) > bounds.row:  # keeps reading, to find its end
        keep = len(mark) if mark else 0
        offset += len(buffer) - keep
        buffer, too_long = buffer[len(buffer) - keep :], True


# --- JSON and JSON lines


def split_json(file: FilePart, rows_per_shard: int, bounds: Bounds = BOUNDS) -> list[FilePart]:
  """Returns parts of about `rows_per_shard` rows of a JSON array, or of JSON lines."""
  try:
    with reading(file.path):
      if is_array(file.path) and not is_compressed(file.path):
        return _split_array(file, rows_per_shard, bounds)
      return _split_lines(file, rows_per_shard)
  except BrokenFile as e:
    return [dataclasses.replace(file, error=e.reason)]


def json_rows(part: FilePart, bounds: Bounds = BOUNDS) -> Iterator[Row]:
  """Yields the rows of a part, parsed.

  Raises:
    BrokenFile: the file breaks off.
  """
  with reading(part.path), open_file(part.path, bounds.file) as stream:
    array = is_array(part.path)
    rows = _array_rows if array else line_rows
    for offset, raw in rows(stream, part, bounds):
      if raw is None or raw.strip() or array:
        yield _parse(part.path, f"byte {offset}", raw)


def is_array(path: str) -> bool:
  """Returns whether a file begins with `[`."""
  with open_file(path) as stream:
    return stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def parse_json(raw: bytes | bytearray) -> Any:
  """Returns the value of a JSON text.

  Raises:
    RowError: it is none.
  """
  try:
    return untrusted.loads(raw)
  except untrusted.Malformed as e:
    raise RowError(e.reason) from e


def _parse(path: str, place: str, raw: bytes | None) -> Row:
  if raw is None:
    return Row(path, place, None, error=ROW_TOO_LONG)
  try:
    return Row(path, place, parse_json(raw), raw[:SNIPPET_BYTES])
  except RowError as e:
    return Row(path, place, None, raw[:SNIPPET_BYTES], e.reason)


def line_rows(
  stream: BinaryIO, part: FilePart, bounds: Bounds
) -> Iterator[tuple[int, bytes | None]]:
  """Yields the lines that begin in a part, with their place; None for one that is too long."""
  offset = part.start
  if part.start:  # the line that begins before is the part before's
    stream.seek(part.start - 1)
    offset += _skip_line(stream) - 1
  while part.stop < 0 or offset < part.stop:
    line = stream.readline(bounds.row)
    if not line:
      return
    length = len(line)
    if length == bounds.row and not line.endswith(b"\n"):
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


def _split_array(file: FilePart, rows_per_shard: int, bounds: Bounds) -> list[FilePart]:
  """Cuts between elements, which are found in one pass."""
  starts, stop, rows = [], 0, 0
  error = ""
  with open_file(file.path) as stream:
    try:
      for offset, raw in _elements(stream, _to_array(stream), bounds, closed=True):
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


def _array_rows(stream: BinaryIO, part: FilePart, bounds: Bounds) -> Iterator[tuple[int, bytes]]:
  if part.stop < 0:
    yield from _elements(stream, _to_array(stream), bounds, closed=True)
  else:
    stream.seek(part.start)
    yield from _elements(_Range(stream, part.stop - part.start), part.start, bounds, closed=False)


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


def _elements(
  stream: Any, offset: int, bounds: Bounds, *, closed: bool
) -> Iterator[tuple[int, bytes]]:
  """Yields the elements of a JSON array, unparsed, with their place.

  An element that is no JSON is yielded like the others: quotes and brackets tell where it ends.

  Args:
    stream: positioned after the `[`, or where an element begins.
    offset: its place.
    bounds: of an element.
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
    if len(buffer) > bounds.row:
      raise BrokenFile(ROW_TOO_LONG)
  if closed:
    raise BrokenFile("JSON array without an end")
  if buffer.strip():
    yield offset, buffer


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
