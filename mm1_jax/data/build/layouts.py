# SPDX-License-Identifier: Apache-2.0
"""How rows lie in a JSON file, by its content: its name does not tell.

lines    a row a line
array    the elements of a list
wrapped  the elements of the only list of objects in an object: {"data": [...], "version": 1}
values   objects over several lines each, one after another; or one alone
"""

import itertools
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from mm1_jax import untrusted
from mm1_jax.data.build.bounds import ROW_TOO_LONG, Bounds
from mm1_jax.data.build.rows import BrokenFile

LINES, ARRAY, WRAPPED, VALUES = "lines", "array", "wrapped", "values"
# Before the first value: spaces, a byte order mark, and the record separator of RFC 7464.
BLANK = b"\xef\xbb\xbf \t\r\n\x1e"
# A whole string, or a character that matters outside of strings; a quote alone opens a string that
# ends in a later chunk.
TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},"]', re.DOTALL)
# Between two objects. Within a value there is a comma, and in strings there are no line breaks.
_BOUNDARY = re.compile(rb"\}[ \t\r]*\n\s*(?=\{)")
_HEAD = 1 << 20  # bytes that tell lines from all else
_TRIED = 20  # objects in them


class Layout(NamedTuple):
  """A layout, and the byte where the first element of a list may begin."""

  kind: str
  start: int = 0


def detect(stream: Any, marks: Collection[str], bounds: Bounds) -> Layout:
  """Returns how the rows of a file lie.

  Args:
    stream: of the file, from its beginning; read no further than the first object's end.
    marks: fields of which a row has at least one. An object with one of them is a row, and no
      wrapper of a list.
    bounds: of a string; what has a longer one is no wrapper of a list.
  """
  head = stream.read(_HEAD)
  text = head.lstrip(BLANK)
  if text.startswith(b"["):
    return Layout(ARRAY, len(head) - len(text) + 1)
  first, line_break, rest = text.partition(b"\n")
  whole = _is_json(first)
  cut = not line_break and len(head) == _HEAD  # within a long line
  of_lines = bool(rest.strip()) if whole else not _spread(text, whole_file=len(head) < _HEAD)
  if not text.startswith(b"{") or (of_lines and not cut):
    return Layout(LINES)
  keys, lists = _scan(_Chained(head, stream), bounds) or ([], [])
  alone = Layout(LINES if whole or not line_break else VALUES)
  if len(lists) != 1 or not {key.decode("utf-8", "replace") for key in keys}.isdisjoint(marks):
    return alone
  return Layout(WRAPPED, lists[0])


def values(stream: Any, bounds: Bounds) -> Iterator[tuple[int, bytes]]:
  """Yields objects that lie one after another, unparsed, with their place.

  Raises:
    BrokenFile: one is too long.
  """
  buffer, offset = b"", 0
  while chunk := stream.read(max(_HEAD, len(buffer))):
    buffer += chunk
    begin = 0
    for match in _BOUNDARY.finditer(buffer):
      yield offset + begin, buffer[begin : match.end()]
      begin = match.end()
    buffer, offset = buffer[begin:], offset + begin
    if len(buffer) > bounds.row:
      raise BrokenFile(ROW_TOO_LONG)
  yield offset, buffer


def _is_json(line: bytes) -> bool:
  try:
    untrusted.loads(line)
  except untrusted.Malformed:
    return False
  return True


def _spread(text: bytes, *, whole_file: bool) -> bool:
  """Returns whether objects take several lines, of which none is a row of its own.

  A file of lines may begin with one that is cut off: so one of the first objects must be JSON, if
  there is a whole one.
  """
  first, _, rest = text.partition(b"\n")
  if not first.rstrip().endswith((b"{", b"[", b",")) or rest.lstrip()[:1] in (b"{", b""):
    return False
  ends = [match.start() + 1 for match in itertools.islice(_BOUNDARY.finditer(text), _TRIED)]
  if len(ends) < _TRIED and whole_file:
    ends.append(len(text))
  objects = [text[start:end].strip(BLANK) for start, end in itertools.pairwise([0, *ends])]
  return not objects or any(b"\n" in value and _is_json(value) for value in objects)


class _Chained:
  """What was read of a stream, and then the rest of it."""

  def __init__(self, head: bytes, stream: Any):
    self._head = head
    self._stream = stream

  def read(self, size: int) -> bytes:
    data, self._head = self._head, b""
    return data or self._stream.read(size)


def _scan(stream: Any, bounds: Bounds) -> tuple[list[bytes], list[int]] | None:
  """Returns the keys of the first object, and where its lists of objects begin.

  None if it has no end, or a string above the bound.
  """
  keys: list[bytes] = []
  lists: list[int] = []
  depth, is_key, opened = 0, False, -1
  for place, token in _tokens(stream, bounds):
    if opened >= 0 and token == b"{":
      lists.append(opened)
    opened = -1
    if token[:1] == b'"':
      if is_key:
        keys.append(token[1:-1])
      is_key = False
    elif token in (b"{", b"["):
      depth += 1
      if depth == 2 and token == b"[":
        opened = place + 1
      is_key = depth == 1
    elif token in (b"}", b"]"):
      depth -= 1
      if depth <= 0:
        return keys, lists
    else:
      is_key = depth == 1
  return (keys, lists) if lists else None


def _tokens(stream: Any, bounds: Bounds) -> Iterator[tuple[int, bytes]]:
  """Yields tokens with their place, up to a string that is too long."""
  buffer, offset = b"", 0
  while chunk := stream.read(max(_HEAD, len(buffer))):
    buffer += chunk
    done = 0
    for match in TOKEN.finditer(buffer):
      if match[0] == b'"':
        break
      yield offset + match.start(), match[0]
      done = match.end()
    buffer, offset = buffer[done:], offset + done
    if len(buffer) > bounds.row:
      return
