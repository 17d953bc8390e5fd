# SPDX-License-Identifier: Apache-2.0
"""Files, row by row, with bounded memory: JSON, JSON lines and text; plain or compressed.

Everything is opened through Beam's FileSystems, so gs:// and the like work where Beam has them
installed. A file that breaks off gives the rows before the break, then a `BrokenFile`.
"""

import contextlib
import dataclasses
import gzip
import io
import itertools
import lzma
import os
import tarfile
import zlib
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import zstandard
from absl import logging
from apache_beam.io.filesystem import BeamIOError, CompressionTypes
from apache_beam.io.filesystems import FileSystems

from mm1_jax import untrusted
from mm1_jax.data.build import containers, layouts
from mm1_jax.data.build.bounds import (
  BOUNDS,
  FILE_TOO_LARGE,
  ROW_TOO_LONG,
  WINDOW_TOO_LARGE,
  Bounds,
)
from mm1_jax.data.build.rows import SNIPPET_BYTES, BrokenFile, FilePart, Row, RowError
from mm1_jax.data.sources import DataError

CHUNK_BYTES = 1 << 20
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


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
  used = [f for f in files if not containers.is_litter(f.path)]
  if not used:
    raise DataError(f"{flag}={pattern} matches only what an operating system put beside files.")
  if len(used) < len(files):
    left_out = len(files) - len(used)
    logging.warning("%s: %d left out: %s", flag, left_out, containers.LITTER)
  return [FilePart(f.path, f.size_in_bytes, f.last_updated_in_seconds) for f in used]


def is_remote(path: str) -> bool:
  return "://" in path


def suffix(path: str) -> str:
  """Returns the suffix before any of compression: .jsonl of a.jsonl.gz."""
  name = path.lower()
  for ending in _COMPRESSED:
    name = name.removesuffix(ending)
  return os.path.splitext(name)[1]


def open_raw(path: str) -> Any:
  return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)


def create(path: str) -> Any:
  return FileSystems.create(path, compression_type=CompressionTypes.UNCOMPRESSED)


def open_file(path: str, bounds: Bounds = BOUNDS) -> BinaryIO:
  """Opens a file for reading, decompressed if it is compressed.

  What is decompressed ends with a BrokenFile after `bounds.file` bytes.
  """
  raw = open_raw(path)
  name = containers.compression(_head_of(raw))
  if name:
    return containers.decompressed(raw, name, bounds)
  return raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)


def is_compressed(path: str) -> bool:
  with open_raw(path) as raw:
    return bool(containers.compression(_head_of(raw)))


def kind_of(path: str, bounds: Bounds = BOUNDS) -> str:
  """Returns what a file is, as `containers.kind`; '' of one that cannot be decompressed."""
  try:
    with reading(path), open_file(path, bounds) as stream:
      return containers.kind(stream.read(containers.HEAD_BYTES))
  except BrokenFile:
    return ""


def looks_like_json(path: str, bounds: Bounds = BOUNDS) -> bool:
  """Returns whether a file begins as objects or a list do."""
  try:
    with reading(path), open_file(path, bounds) as stream:
      head = stream.read(containers.HEAD_BYTES)
  except BrokenFile:
    return False
  return head.lstrip(layouts.BLANK)[:1] in (b"{", b"[")


def _head_of(raw: Any) -> bytes:
  head = raw.read(containers.HEAD_BYTES)
  raw.seek(0)
  return head


def read_whole(path: str, bounds: Bounds) -> bytearray:
  """Returns the bytes of a file, decompressed.

  Raises:
    BrokenFile: there are more than `bounds.file`.
  """
  data = bytearray()
  with reading(path), open_file(path, bounds) as stream:
    while chunk := stream.read(CHUNK_BYTES):
      data += chunk
      if len(data) > bounds.file:
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
  with reading(path), open_file(path, bounds) as stream:
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


def split_json(
  file: FilePart, rows_per_shard: int, bounds: Bounds = BOUNDS, marks: Collection[str] = ()
) -> list[FilePart]:
  """Returns parts of about `rows_per_shard` rows of a file of JSON, however they lie in it.

  Args:
    file: whole.
    rows_per_shard: of a part.
    bounds: of what is read.
    marks: fields of which a row has at least one.
  """
  try:
    with reading(file.path):
      with open_file(file.path, bounds) as stream:
        layout = layouts.detect(stream, marks, bounds)
      found = dataclasses.replace(file, layout=layout.kind, start=layout.start)
      if layout.kind in (layouts.ARRAY, layouts.WRAPPED) and not is_compressed(file.path):
        return _split_array(found, rows_per_shard, bounds)
      return _split_lines(found, rows_per_shard, bounds)
  except BrokenFile as e:
    return [dataclasses.replace(file, error=e.reason, cause=e.cause)]


def json_rows(part: FilePart, bounds: Bounds = BOUNDS) -> Iterator[Row]:
  """Yields the rows of a part, parsed.

  Raises:
    BrokenFile: the file breaks off.
  """
  with reading(part.path), open_file(part.path, bounds) as stream:
    in_list = part.layout in (layouts.ARRAY, layouts.WRAPPED)
    if in_list:
      rows = _array_rows(stream, part, bounds)
    elif part.layout == layouts.VALUES:
      rows = layouts.values(stream, bounds)
    else:
      rows = line_rows(stream, part, bounds)
    for offset, raw in rows:
      if raw is None or raw.strip(layouts.BLANK) or in_list:
        yield _parse(part.path, f"byte {offset}", raw)


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
    # Lines may be elements of a list whose brackets are missing, or begin with a separator.
    value = parse_json(raw.strip(layouts.BLANK).removesuffix(b","))
    return Row(path, place, value, raw[:SNIPPET_BYTES])
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


def _split_lines(file: FilePart, rows_per_shard: int, bounds: Bounds) -> list[FilePart]:
  """Cuts by bytes, after the mean length of the first lines: nothing is read but those."""
  with open_file(file.path, bounds) as stream:
    head = stream.read(CHUNK_BYTES)
  mean = len(head) / max(1, head.count(b"\n"))
  # These cannot be entered in the middle.
  if file.layout != layouts.LINES or is_compressed(file.path):
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
  with open_file(file.path, bounds) as stream:
    try:
      for offset, raw in _all_elements(stream, file, bounds):
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
    yield from _all_elements(stream, part, bounds)
  else:
    stream.seek(part.start)
    yield from _elements(_Range(stream, part.stop - part.start), part.start, bounds)


def _all_elements(stream: BinaryIO, file: FilePart, bounds: Bounds) -> Iterator[tuple[int, bytes]]:
  """Yields the elements of a list that begin at `file.start`."""
  left = file.start
  while left:
    left -= len(stream.read(min(left, CHUNK_BYTES)))
  end = layouts.WRAPPED if file.layout == layouts.WRAPPED else layouts.ARRAY
  yield from _elements(stream, file.start, bounds, end=end)


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
  stream: Any, offset: int, bounds: Bounds, *, end: str = ""
) -> Iterator[tuple[int, bytes]]:
  """Yields the elements of a JSON array, unparsed, with their place.

  An element that is no JSON is yielded like the others: quotes and brackets tell where it ends.

  Args:
    stream: positioned after the `[`, or where an element begins.
    offset: its place.
    bounds: of an element.
    end: of an array, with nothing after its `]`; of one that is wrapped; or '' of a piece of one.

  Raises:
    BrokenFile: an element is too long, or there is no `]`.
  """
  buffer, scanned, depth = b"", 0, 0
  while chunk := stream.read(max(CHUNK_BYTES, len(buffer))):
    buffer += chunk
    begin = 0
    for token in layouts.TOKEN.finditer(buffer, scanned):
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
        rest = (buffer[scanned:] + stream.read(CHUNK_BYTES)).strip()
        if rest and end != layouts.WRAPPED:
          raise BrokenFile("JSON array with something after its end")
        return
    buffer, offset, scanned = buffer[begin:], offset + begin, scanned - begin
    if len(buffer) > bounds.row:
      raise BrokenFile(ROW_TOO_LONG)
  if end:
    raise BrokenFile("JSON array without an end")
  if buffer.strip():
    yield offset, buffer


# --- damage

_OF_WINDOWS = (zstandard.ZstdError, lzma.LZMAError)
_DAMAGE = (
  *(EOFError, zlib.error, pa.ArrowException, tarfile.TarError, OverflowError),
  *_OF_WINDOWS,
)


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
  """Turns what the readers raise at damage into a `BrokenFile`.

  Other errors pass: a disk or a network that fails is no property of the file.
  """
  try:
    yield
  except _DAMAGE as e:
    memory = "memory" in str(e).lower()
    unread = WINDOW_TOO_LARGE if memory and isinstance(e, _OF_WINDOWS) else _broken(path)
    raise BrokenFile(unread, f"{type(e).__name__}: {e}") from e
  except OSError as e:
    # gzip's and pyarrow's own; what the operating system raises has a number.
    if e.errno is None and type(e) in (OSError, gzip.BadGzipFile):
      raise BrokenFile(_broken(path), f"{type(e).__name__}: {e}") from e
    raise


def _broken(path: str) -> str:
  """Returns the reason of a broken file: the same for all files of a kind."""
  return f"broken {os.path.splitext(path)[1].lower()} file"
