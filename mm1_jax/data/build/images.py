# SPDX-License-Identifier: Apache-2.0
"""Pictures: found in a store, and looked at without decoding them.

A store is a folder, or tars with an index of what is where. Rows name their pictures by file name
or by URL:

  folder  by file name below it; by URL as a file called the URL's sha256 in hex, with or without
          a suffix
  tars    by member name, whole or without its folders; by URL if the picture has a .json beside it
          that tells it, as img2dataset writes
"""

import errno
import functools
import hashlib
import os
import pathlib
import posixpath
import shutil
import sqlite3
import stat
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import PIL.Image
from absl import logging
from apache_beam.io.filesystems import FileSystems

from mm1_jax.data import image as pixels
from mm1_jax.data import metadata
from mm1_jax.data.build import containers, files, tars
from mm1_jax.data.build.bounds import BOUNDS, Bounds
from mm1_jax.data.build.rows import BrokenFile, FilePart, Image, RowError
from mm1_jax.data.image import ImageError
from mm1_jax.data.sources import DataError

MISSING = "image not found"
OUTSIDE = "image name leaves the store"
NO_FILE = "image is no regular file"
FILE_TOO_LARGE = "image file too large"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".avif", ".bmp", ".tif", ".tiff", ".jp2")
_OPEN_TARS = 16
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


class Store(Protocol):
  """Where pictures are found."""

  def read(self, image: Image) -> bytes:
    """Returns the encoded picture.

    Raises:
      ImageError: it is not there, or too large.
    """
    ...


class Folder:
  """Pictures as files below a folder."""

  def __init__(self, root: str, max_bytes: int):
    self._root = root
    self._max_bytes = max_bytes

  def read(self, image: Image) -> bytes:
    """Returns the bytes of a file; see `Store.read`."""
    names = [relative(image.name)] if image.name else []
    if image.url:
      stem = hashlib.sha256(image.url.encode("utf-8", "replace")).hexdigest()
      names += [stem + ending for ending in ("", *SUFFIXES)]
    for name in names:
      data = self._read(f"{self._root.rstrip('/')}/{name}")
      if data is not None:
        return data
    raise ImageError(MISSING)

  def _read(self, path: str) -> bytes | None:
    if files.is_remote(path):
      if not FileSystems.exists(path):
        return None
    else:
      try:
        info = os.stat(path)
      except OSError as e:
        if e.errno in _ABSENT:
          return None
        raise
      except ValueError:  # half a character, which no file name has
        return None
      if not stat.S_ISREG(info.st_mode):  # a pipe would never end
        raise ImageError(NO_FILE)
    with files.open_raw(path) as stream:
      data = stream.read(self._max_bytes + 1)
    if len(data) > self._max_bytes:
      raise ImageError(FILE_TOO_LARGE)
    return data


class Tars:
  """Pictures as members of tars, through the index that `index_tars` wrote."""

  def __init__(self, index: str, max_bytes: int):
    self._max_bytes = max_bytes
    self._index = sqlite3.connect(f"file:{_local_copy(index)}?mode=ro&immutable=1", uri=True)
    self._open = functools.lru_cache(_OPEN_TARS)(files.open_raw)

  def read(self, image: Image) -> bytes:
    """Returns the bytes of a member; see `Store.read`."""
    name = relative(image.name) if image.name else ""
    for kind, key in (("name", name), ("base", name), ("url", image.url)):
      query = "SELECT tar, start, size FROM images WHERE key = ?"
      found = self._index.execute(query, (_key(kind, key),)).fetchone() if key else None
      if found:
        path, start, size = found
        if size > self._max_bytes:
          raise ImageError(FILE_TOO_LARGE)
        stream = self._open(path)
        stream.seek(start)
        return stream.read(size)
    raise ImageError(MISSING)


def relative(name: str) -> str:
  """Returns a name that stays below the folder it is looked up in.

  Raises:
    ImageError: it does not.
  """
  parts = name.replace("\\", "/").split("/")
  if not name.strip() or "\0" in name or "://" in name or not parts[0] or ".." in parts:
    raise ImageError(OUTSIDE)
  return posixpath.normpath("/".join(parts))


def index_tars(store: Iterable[FilePart], path: str, bounds: Bounds = BOUNDS) -> list[str]:
  """Writes the index of a store of tars; returns those that are broken.

  Raises:
    DataError: one is compressed, or another archive: pictures are read from their places in it.
  """
  broken = []
  with tempfile.TemporaryDirectory() as folder:
    local = os.path.join(folder, "index.sqlite")
    index = sqlite3.connect(local)
    index.execute("PRAGMA journal_mode = OFF")
    index.execute("CREATE TABLE images (key BLOB PRIMARY KEY, tar TEXT, start INT, size INT)")
    for tar in store:
      _check_tar(tar.path, bounds)
      try:
        for row in _index_rows(tar.path, bounds):
          index.execute("INSERT OR IGNORE INTO images VALUES (?, ?, ?, ?)", row)
      except BrokenFile as e:
        logging.warning("%s: %s; what is before the damage is used", tar.path, e.reason)
        broken.append(tar.path)
    index.commit()
    index.close()
    with open(local, "rb") as source, files.create(path) as target:
      shutil.copyfileobj(source, target)
  return broken


def _check_tar(path: str, bounds: Bounds) -> None:
  kind = files.kind_of(path, bounds)
  if files.is_compressed(path):
    kind = "compressed"
  if kind not in (containers.TAR, ""):
    raise DataError(
      f"--images: {path} is {kind}. Pictures are read from their places in uncompressed tars; "
      f"unpack it, or into a folder, and give that."
    )


def _index_rows(path: str, bounds: Bounds) -> Iterator[tuple[bytes, str, int, int]]:
  """Yields the index rows of a tar's pictures; a picture and its .json are neighbours."""
  stem, url, place = "", "", None
  for member, data in tars.tar_members(path, _is_small_json, bounds):
    if containers.is_litter(member.name):
      continue
    name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if os.path.splitext(name)[0] != stem:
      stem, url, place = os.path.splitext(name)[0], "", None
    if data is not None:
      url = _url(data)
    elif name.lower().endswith(SUFFIXES) and member.isreg() and not member.issparse():
      place = path, member.offset_data, member.size
      yield _key("name", posixpath.normpath(name)), *place
      yield _key("base", posixpath.basename(name)), *place
    if place and url:
      yield _key("url", url), *place
      url = ""


def _is_small_json(member: Any) -> bool:
  return member.name.endswith(".json") and member.size < files.CHUNK_BYTES


def _url(data: bytes) -> str:
  try:
    value = files.parse_json(data)
  except RowError:
    return ""
  url = value.get("url") if isinstance(value, dict) else None
  return url if isinstance(url, str) else ""


def _key(kind: str, key: str) -> bytes:
  return hashlib.sha256(f"{kind}:{key}".encode("utf-8", "replace")).digest()[:16]


@functools.lru_cache(1)
def _local_copy(path: str) -> str:
  """Returns a path of this machine with the same content; sqlite reads no other."""
  if not files.is_remote(path):
    return os.path.abspath(path)
  copy = pathlib.Path(tempfile.mkdtemp()) / "index.sqlite"
  with files.open_raw(path) as source, copy.open("wb") as target:
    shutil.copyfileobj(source, target)
  return str(copy)


# --- what a picture is


def measure(data: bytes, *, decode: bool) -> tuple[int, int]:
  """Returns width and height in pixels, upright, of a picture that training will be able to decode.

  Only its header is read, and whether its end is there; all of it if `decode` is set, or if the
  end is not where it should be.

  Raises:
    ImageError: it cannot be decoded, or has too many pixels.
  """
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # we have our own bound
    (height, width), kind = pixels.look_at(data)
  if height * width > pixels.MAX_PIXELS:
    raise ImageError(pixels.TOO_LARGE)
  if decode or not _has_end(data, kind):
    pixels.decode_image(data, (16, 16))
  return width, height


def _has_end(data: bytes, kind: str) -> bool:
  """Returns whether a file that was cut off would look otherwise; False where we cannot tell."""
  if kind == "JPEG":
    # Within a scan FF D9 marks nothing but the end; a thumbnail's end is before the last scan.
    return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
  if kind == "PNG":
    return metadata.is_whole_png(data)
  if kind == "WEBP":
    return len(data) >= 8 + int.from_bytes(data[4:8], "little")
  if kind == "GIF":
    return data.rstrip(b"\0").endswith(b";")
  return False
