# SPDX-License-Identifier: Apache-2.0
"""What flows through a build: parts of files, rows of them, drafts of records, and what is wrong.

A part is read row by row. A row that cannot be used becomes a `Bad`; the others become drafts:
records whose pictures are still to be fetched.
"""

import base64
import dataclasses
import difflib
import hashlib
import os
from typing import Any, NamedTuple

from mm1_jax import untrusted
from mm1_jax.data.sources import Record

SNIPPET_BYTES = 500  # of a row in the dead letters
HEADER_FIELDS = ("id", "source", "license", "credit", "url")  # that a row may have
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
  layout: str = ""  # how rows lie in the file: of `layouts`, or "parquet"
  error: str = ""  # the file is broken: nothing to read, one row to count
  cause: str = ""  # of the error, in the words of what found it


class RowError(ValueError):
  """A row that cannot be used.

  `reason` is short, and the same for rows of one kind; `found` is what this row has instead.
  """

  def __init__(self, reason: str, found: str = ""):
    super().__init__(reason)
    self.reason = reason
    self.found = found


class Filtered(RowError):
  """A row that could be used, and that a filter leaves out."""


class BrokenFile(Exception):
  """The rest of a file cannot be read; `reason` as in `RowError`, `cause` of whatever found it."""

  def __init__(self, reason: str, cause: str = ""):
    super().__init__(reason)
    self.reason = reason
    self.cause = cause[:SNIPPET_BYTES]


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
  found: str = ""  # what is there instead of what was looked for, or the cause


class Skipped(NamedTuple):
  """A part of a row or tar that is left out, and the rest of it is not."""

  reason: str


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
  problem: str = ""  # why it cannot be fetched: what says where it is, is odd


NAMELESS = "image without bytes, name or URL"
ODD_IMAGE = "an image is neither a name, a URL nor bytes"


def picture(value: Any) -> Image:
  """Returns the picture that a cell is: a name, a URL, or a dict of `bytes` and `path` or `url`.

  Raises:
    RowError: it is none of these.
  """
  if isinstance(value, bytes):
    return Image(data=value)
  if isinstance(value, str):
    if not value:
      raise RowError(NAMELESS)
    if value.startswith("data:"):
      return Image(data=_data_url(value))
    return Image(url=value) if "://" in value else Image(name=value)
  if not isinstance(value, dict):
    raise RowError(ODD_IMAGE, untrusted.shown(value))
  names = [value.get(key) for key in ("path", "file_name", "image", "url", "image_url")]
  name = next((name for name in names if name), None)
  if value.get("bytes"):
    return Image(data=_bytes(value["bytes"]), name=name if isinstance(name, str) else "")
  if name is None:
    raise RowError(NAMELESS, f"its keys are {_keys(value)}")
  return picture(name)


def _bytes(value: Any) -> bytes:
  if not isinstance(value, bytes):
    raise RowError(ODD_IMAGE, f"'bytes' is {untrusted.shown(value)}")
  return value


def _data_url(url: str) -> bytes:
  head, comma, text = url.partition(",")
  try:
    if not comma or not head.endswith(";base64"):
      raise ValueError("not of base64")
    return base64.b64decode(text, validate=True)
  except ValueError as e:
    raise RowError("an image's data: URL is damaged", str(e)) from e


def whole_number(value: Any) -> int | None:
  """Returns a number that is whole, be it written as 1 or 1.0; None of anything else."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return None
  return int(value) if value == value and abs(value) < 1 << 53 and value == int(value) else None


def text_of(value: Any) -> str | None:
  """Returns the text that a cell is, a number's too; None of anything else."""
  if isinstance(value, bool):
    return None
  return str(value) if isinstance(value, str | int | float) else None


def one_field(row: Any, names: tuple[str, ...], kind: Any) -> Any:
  """Returns the field of a row that has one of several names, the first that is there.

  Raises:
    RowError: none is there, or it is of another type; it tells what is.
  """
  value = next((v for v in (optional(row, name, kind) for name in names) if v is not None), None)
  if value is None:
    raise RowError(f"'{names[0]}' is missing", missing(row, names))
  return value


def missing(row: dict[str, Any], names: tuple[str, ...]) -> str:
  """Returns what a row has, and what was looked for."""
  if empty := [name for name in names if name in row]:
    return f"'{empty[0]}' is null"
  wanted = " or ".join(f"'{name}'" for name in names)
  return f"its keys are {_keys(row)}; looked for {wanted}{_near(row, names)}"


def _keys(row: dict[str, Any]) -> str:
  return ", ".join(f"'{clean(str(key))[:40]}'" for key in list(row)[:12]) or "none"


def _near(row: dict[str, Any], names: tuple[str, ...]) -> str:
  keys = [key for key in row if isinstance(key, str)][:100]
  close = [c for name in names for c in difflib.get_close_matches(name, keys, 1)]
  return f"; is it '{clean(close[0])[:40]}'?" if close else ""


def field(row: Any, name: str, kind: Any) -> Any:
  """Returns `row[name]`.

  Raises:
    RowError: it is missing or of another type.
  """
  value = optional(row, name, kind)
  if value is None:
    raise RowError(f"'{name}' is missing", missing(row, (name,)))
  return value


def optional(row: Any, name: str, kind: Any) -> Any:
  """Returns `row[name]`, None where there is none.

  Raises:
    RowError: it is of another type.
  """
  if not isinstance(row, dict):
    raise RowError("not an object", untrusted.shown(row))
  value = row.get(name)
  if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
    raise RowError(f"'{name}' is of the wrong type", f"it is {untrusted.shown(value)}")
  return value


def header(row: Any, default_id: str, options: Any) -> dict[str, str]:
  """Returns the fields that every record has, from the row's own where it has them."""

  def first(names: tuple[str, ...], default: str) -> str:
    values = [row.get(name) for name in names]
    values = [v if whole_number(v) is None else whole_number(v) for v in values]
    texts = [
      str(v) for v in values if isinstance(v, str | int) and v != "" and not isinstance(v, bool)
    ]
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
