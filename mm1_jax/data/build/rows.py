# SPDX-License-Identifier: Apache-2.0
"""What flows through a build: parts of files, rows of them, drafts of records, and what is wrong.

A part is read row by row. A row that cannot be used becomes a `Bad`; the others become drafts:
records whose pictures are still to be fetched.
"""

import dataclasses
import hashlib
import os
from typing import Any, NamedTuple

from mm1_jax.data.sources import Record

SNIPPET_BYTES = 500  # of a row in the dead letters
MAX_HEADER_CHARS = 2_000  # of an id, a licence or a credit line


@dataclasses.dataclass(frozen=True)
class FilePart:
  """A piece of a file that is read in one go."""

  path: str
  size: int  # bytes of the whole file
  mtime: float
  start: int = 0  # bytes, row groups or rows, as the format has it
  stop: int = -1  # -1: the end
  rows: int = 1  # about how many
  error: str = ""  # the file is broken: nothing to read, one row to count


class RowError(ValueError):
  """A row that cannot be used; `reason` is short, and the same for rows of one kind."""

  def __init__(self, reason: str):
    super().__init__(reason)
    self.reason = reason


class Filtered(RowError):
  """A row that could be used, and that a filter leaves out."""


class BrokenFile(Exception):
  """The rest of a file cannot be read; `reason` as in `RowError`."""

  def __init__(self, reason: str):
    super().__init__(reason)
    self.reason = reason


class Row(NamedTuple):
  """A row as it is in its file."""

  path: str
  place: str  # in the file
  value: Any  # what was parsed
  raw: bytes = b""  # its beginning
  error: str = ""  # why it could not be parsed

  @property
  def where(self) -> str:
    return f"{self.path}, {self.place}" if self.place else self.path

  @property
  def default_id(self) -> str:
    return f"{os.path.basename(self.path)}/{self.place}".rstrip("/")


class Bad(NamedTuple):
  """A row that cannot be used, for the dead letters."""

  reason: str
  where: str
  id: str = ""
  row: str = ""
  whole_file: bool = False  # the rest of its file is lost too


class Draft(NamedTuple):
  """A record whose items may hold `Image` instead of bytes."""

  record: Record
  where: str


@dataclasses.dataclass
class Image:
  """A picture that is still to be fetched: from a store by name or URL, or it is there already."""

  name: str = ""
  url: str = ""
  data: bytes | None = None


def field(row: Any, name: str, kind: Any) -> Any:
  """Returns `row[name]`.

  Raises:
    RowError: it is missing or of another type.
  """
  value = optional(row, name, kind)
  if value is None:
    raise RowError(f"'{name}' is missing")
  return value


def optional(row: Any, name: str, kind: Any) -> Any:
  """Returns `row[name]`, None where there is none.

  Raises:
    RowError: it is of another type.
  """
  if not isinstance(row, dict):
    raise RowError("not an object")
  value = row.get(name)
  if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
    raise RowError(f"'{name}' is of the wrong type")
  return value


def header(row: Any, default_id: str, options: Any) -> dict[str, str]:
  """Returns the fields that every record has, from the row's own where it has them."""

  def first(names: tuple[str, ...], default: str) -> str:
    values = [row.get(name) for name in names]
    texts = [str(v) for v in values if isinstance(v, str | int) and v not in ("", True, False)]
    return clean(texts[0] if texts else default)

  return {
    "id": first(("id", "key"), default_id),
    "source": first(("source",), options.source),
    "license": first(("license",), options.license),
    "credit": first(("credit", "url"), ""),
  }


def clean(text: str) -> str:
  """Returns a header field that any reader can take: short, no NUL, no half character."""
  text = text[:MAX_HEADER_CHARS].replace("\0", "")
  return text.encode("utf-8", "replace").decode("utf-8")


def snippet(row: Row) -> str:
  """Returns the beginning of a row as text, for a person to read."""
  raw = row.raw or shorten(row.value).encode("utf-8", "replace")
  return raw[:SNIPPET_BYTES].decode("utf-8", "replace")


def shorten(value: Any) -> str:
  """Returns `repr` of a value, without writing out megabytes."""
  if isinstance(value, str | bytes):
    return repr(value[:SNIPPET_BYTES])
  if isinstance(value, dict):
    return "{" + ", ".join(f"{k!r}: {shorten(v)}" for k, v in list(value.items())[:20]) + "}"
  if isinstance(value, list):
    return "[" + ", ".join(map(shorten, value[:20])) + "]"
  return repr(value)


def digest(data: str | bytes) -> bytes:
  """Returns 16 bytes that identify a URL or a picture."""
  if isinstance(data, str):
    data = b"url:" + data.encode("utf-8", "replace")
  return hashlib.sha256(data).digest()[:16]
