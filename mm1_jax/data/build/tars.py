# SPDX-License-Identifier: Apache-2.0
"""Tar files, member by member, in one pass and in bounded memory.

`tarfile` reads the headers that precede a member whole, whatever size they claim, searches them in
time that grows with its square, and follows them to any depth. Here a header is looked at first.
"""

import tarfile
from collections.abc import Callable, Iterator
from typing import Any

from mm1_jax.data.build.bounds import BOUNDS, HEADER_TOO_LONG, Bounds
from mm1_jax.data.build.files import CHUNK_BYTES, open_file, reading
from mm1_jax.data.build.rows import BrokenFile

SPARSE = "tar with sparse members"
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
# Of no member, or of no use: what is global, and where a link leads.
_PASSED_OVER = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)
_MAX_LENGTH_DIGITS = 20  # of a record's length, in a pax header
_CODING = ("utf-8", "surrogateescape")  # of names


def tar_members(
  path: str, wanted: Callable[[tarfile.TarInfo], bool], bounds: Bounds = BOUNDS
) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
  """Yields the members of a tar file that are not folders, with their bytes if `wanted` says so.

  Raises:
    BrokenFile: it is none, breaks off, or has a header above the bound.
  """
  with reading(path), open_file(path, bounds) as stream:
    at, name, pax = 0, "", {}
    ended = False
    while (head := stream.read(tarfile.BLOCKSIZE)) or not ended:
      if head and not head.strip(b"\0"):  # the end; `cat` puts another tar after it
        ended, at = True, at + len(head)
        continue
      ended = False
      member = tarfile.TarInfo.frombuf(head, *_CODING)
      member.offset, at = at, at + len(head)
      if member.type in (*_PAX, *_PASSED_OVER, tarfile.GNUTYPE_LONGNAME):
        data = _header(stream, member.size, bounds)
        at += _padded(member.size)
        if member.type in _PAX:
          pax = _records(data)
        elif member.type == tarfile.GNUTYPE_LONGNAME:
          name = data.partition(b"\0")[0].decode(*_CODING)
        continue
      _describe(member, name, pax)
      member.offset_data, name, pax = at, "", {}
      size = _padded(member.size) if _has_data(member) else 0
      data = None
      if member.isreg() and not member.issparse() and wanted(member):
        data = _read(stream, member.size)
        _skip(stream, size - member.size)
      else:
        _skip(stream, size)
      at += size
      if not member.isdir():
        yield member, data


def _describe(member: tarfile.TarInfo, name: str, pax: dict[str, str]) -> None:
  """Sets what the headers before a member say of it."""
  member.name = pax.get("path", name or member.name)
  if "size" in pax:
    member.size = _whole(pax["size"])
  if member.type == tarfile.GNUTYPE_SPARSE:  # more headers follow, of its holes
    raise BrokenFile(SPARSE)
  if any(key.startswith("GNU.sparse.") for key in pax):
    member.sparse = []  # pyright: ignore[reportAttributeAccessIssue]
  if member.size < 0:
    raise tarfile.ReadError(f"a member of {member.size} bytes")


def _has_data(member: tarfile.TarInfo) -> bool:
  return member.isreg() or member.type not in tarfile.SUPPORTED_TYPES


def _header(stream: Any, size: int, bounds: Bounds) -> bytes:
  if size > bounds.header:
    raise BrokenFile(HEADER_TOO_LONG)
  if size < 0:
    raise tarfile.ReadError(f"a header of {size} bytes")
  return _read(stream, _padded(size))[:size]


def _records(data: bytes) -> dict[str, str]:
  """Returns the records of a pax header: `LENGTH KEY=VALUE` and a line break each."""
  records, at = {}, 0
  while at < len(data) and data[at]:
    space = data.find(b" ", at, at + _MAX_LENGTH_DIGITS)
    length = _whole(data[at:space]) if space > at else 0
    if not max(0, space - at) < length <= len(data) - at:
      raise tarfile.ReadError("a pax header is damaged")
    key, _, value = data[space + 1 : at + length - 1].decode(*_CODING).partition("=")
    records[key] = value
    at += length
  return records


def _whole(text: str | bytes) -> int:
  try:
    return int(text)
  except ValueError as e:
    raise tarfile.ReadError("a pax header has letters for a number") from e


def _padded(size: int) -> int:
  return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _read(stream: Any, size: int) -> bytes:
  data = stream.read(size)
  if len(data) < size:
    raise EOFError
  return data


def _skip(stream: Any, size: int) -> None:
  if stream.seekable():
    stream.seek(size, 1)
    return
  while size:
    size -= len(_read(stream, min(size, CHUNK_BYTES)))
