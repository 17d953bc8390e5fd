# SPDX-License-Identifier: Apache-2.0
"""What a file is, by its first bytes: its name may say otherwise.

gzip, zstd, bzip2 and xz are read as what is inside of them.
"""

import bz2
import gzip
import io
import lzma
import os
import re
import tarfile
from collections.abc import Callable
from typing import Any, BinaryIO

import zstandard

from mm1_jax.data.build.bounds import FILE_TOO_LARGE, Bounds
from mm1_jax.data.build.rows import BrokenFile

HEAD_BYTES = 1 << 12
PARQUET, TAR = "a Parquet file", "a tar"
_COMPRESSED = {
  "gzip": re.compile(rb"\x1f\x8b\x08"),
  # Also of frames that are skipped, as pzstd writes them first.
  "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL),
  "bzip2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
  "xz": re.compile(rb"\xfd7zXZ\0"),
}
_KINDS = {
  PARQUET: re.compile(rb"PAR1"),
  "a zip archive": re.compile(rb"PK(?:\x03\x04|\x05\x06)"),
  "a 7-zip archive": re.compile(rb"7z\xbc\xaf\x27\x1c"),
  "a RAR archive": re.compile(rb"Rar!\x1a\x07"),
  "an lz4 file": re.compile(rb"\x04\x22\x4d\x18"),
  "a web page": re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html)", re.IGNORECASE),
  "a pointer of Git LFS": re.compile(rb"version https://git-lfs"),
  "text in UTF-16": re.compile(rb"\xff\xfe|\xfe\xff"),
}
_FIXES = {
  "a web page": "download it again",
  "a pointer of Git LFS": "fetch it with git lfs pull",
  "text in UTF-16": "write it as UTF-8",
  PARQUET: "no format of text",
  TAR: "unpack it",
}
LITTER = "file of an operating system: ._NAME, .DS_Store"
# What macOS and Windows put beside files, and what macOS' archives add.
_SYSTEM_FILES = (".ds_store", "thumbs.db", "desktop.ini")
_STEP = 1 << 10  # compressed bytes at once: they may be a hundred thousand times as many


def is_litter(name: str) -> bool:
  """Returns whether a file is what an operating system put beside others: ._a.jpg, .DS_Store."""
  folder, base = os.path.split(name)
  return base.startswith("._") or base.lower() in _SYSTEM_FILES or "__MACOSX" in folder.split("/")


def compression(head: bytes) -> str:
  """Returns what a file that begins so is compressed with; '' if it is not."""
  return next((name for name, magic in _COMPRESSED.items() if magic.match(head)), "")


def kind(head: bytes) -> str:
  """Returns what a file that begins so is, decompressed; '' of text and all that has no magic."""
  found = next((name for name, magic in _KINDS.items() if magic.match(head)), "")
  return found or (TAR if _is_tar(head[: tarfile.BLOCKSIZE]) else "")


def refusal(found: str) -> str:
  """Returns the reason for which a file of a kind is left out, with what to do."""
  return f"{found}: {_FIXES.get(found, 'unpack it')}"


def _is_tar(block: bytes) -> bool:
  try:
    return bool(tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape"))
  except tarfile.TarError:
    return False


def decompressed(raw: Any, name: str, bounds: Bounds) -> BinaryIO:
  """Returns a stream of what is compressed with `name`.

  It ends with a BrokenFile after `bounds.file` bytes: a few bytes of the file make thousands of
  them. A window or dictionary above `bounds.window` is refused by the libraries.
  """
  window = bounds.window
  stream: Any
  if name == "gzip":
    stream = gzip.GzipFile(fileobj=raw)
  elif name == "bzip2":
    stream = _Frames(raw, bz2.BZ2Decompressor)
  elif name == "xz":
    stream = _Frames(raw, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=window))
  else:
    context = zstandard.ZstdDecompressor(max_window_size=window)
    stream = _Frames(raw, context.decompressobj)
  return io.BufferedReader(_Counted(stream, bounds.file), 1 << 20)


class _Frames:
  """Frames that follow each other in a file, decompressed; one that is cut off is an EOFError."""

  def __init__(self, raw: Any, new: Callable[[], Any]):
    self._raw = raw
    self._new = new
    self._frame: Any = None
    self._in = b""
    self._out = memoryview(b"")

  def read(self, size: int) -> bytes:
    while not self._out:
      self._in = self._in or self._raw.read(_STEP)
      if not self._in:
        if self._frame is None:
          return b""
        raise EOFError("the compressed data ends within a frame")
      if self._frame is None:
        self._in = self._in.lstrip(b"\0")  # what fills up blocks, between frames and at the end
        if not self._in:
          continue
        self._frame = self._new()
      self._out = memoryview(self._frame.decompress(self._in))
      self._in = self._frame.unused_data if self._frame.eof else b""
      self._frame = None if self._frame.eof else self._frame
    data, self._out = bytes(self._out[:size]), self._out[size:]
    return data


class _Counted(io.RawIOBase):
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
