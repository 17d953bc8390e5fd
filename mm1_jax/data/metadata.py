# SPDX-License-Identifier: Apache-2.0
"""What a picture's file says besides its pixels, and which way up it is.

Cameras, editors and web servers write EXIF, XMP, profiles, comments and thumbnails, and write them
wrong. None of it may decide whether a picture can be read: the files are opened without it. All
that is used of it is the orientation (EXIF 2.32, tag 274), and one that is not of the standard's
1 to 8 is 1: upright.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import PIL.ExifTags
import PIL.Image

_TRANSPOSE = PIL.Image.Transpose
# What makes a picture of each orientation upright.
_TURNS = {
  2: _TRANSPOSE.FLIP_LEFT_RIGHT,
  3: _TRANSPOSE.ROTATE_180,
  4: _TRANSPOSE.FLIP_TOP_BOTTOM,
  5: _TRANSPOSE.TRANSPOSE,
  6: _TRANSPOSE.ROTATE_270,
  7: _TRANSPOSE.TRANSVERSE,
  8: _TRANSPOSE.ROTATE_90,
}
SIDEWAYS = 5  # and above: height and width change places
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])(?=["<])')

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_RAW_EXIF = b"Raw profile type exif\0"
_PNG_XMP = b"XML:com.adobe.xmp\0"
# The bytes of tRNS by the colour type: of grey and RGB one colour, else any number.
_PNG_CLEAR = {0: 2, 2: 6}
_MAX_TEXT = 1 << 20  # bytes of a compressed text, inflated

# Markers of JPEG: of what may hold EXIF or XMP, and of where the pixels begin.
MAY_TURN, SCAN = 0xE1, b"\xff\xda"
_APP0, _APP14, _APP15, _COMMENT = 0xE0, 0xEE, 0xEF, 0xFE
_JPEG_EXIF, _JPEG_XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"

_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
_WEBP_METADATA = 0x20 | 0x08 | 0x04  # flags of VP8X: ICCP, EXIF and XMP are there
# In AVIF's list of items, an item's version, id and protection, and its kind.
_AVIF_EXIF = re.compile(rb"(infe[\x02\x03]\x00\x00.(?:..){2,3})Exif", re.DOTALL)


class Parts(NamedTuple):
  """A file in two: `pixels` is an image without metadata, or the whole file if it is damaged."""

  pixels: bytes
  exif: bytes = b""
  xmp: bytes = b""


def split(data: bytes) -> Parts:
  """Returns the parts of a JPEG, PNG, WebP or AVIF; of another file, all of it as `pixels`."""
  if data.startswith(b"\xff\xd8"):
    return _split_jpeg(data)
  if data.startswith(_PNG):
    return _split_png(data)
  if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
    return _split_webp(data)
  return Parts(data)


def open_image(data: bytes, formats: tuple[str, ...]) -> tuple[PIL.Image.Image, int]:
  """Opens an encoded picture, undecoded; returns it and its orientation.

  Raises whatever Pillow's plugins raise if its pixels cannot be read.
  """
  parts = split(data)
  try:
    image = PIL.Image.open(io.BytesIO(parts.pixels), formats=formats)
  except (MemoryError, PIL.Image.DecompressionBombError):
    raise
  except Exception:
    if not _is_avif(data):
      raise
    # Pillow parses its EXIF at once. As an item of an unknown kind it is passed over.
    bare = _AVIF_EXIF.sub(rb"\1free", data)
    image = PIL.Image.open(io.BytesIO(bare), formats=formats)
  return image, orientation(image) if parts.pixels is data else _of(parts)


def orientation_of(data: bytes) -> int:
  """Returns the orientation of a JPEG, PNG or WebP, as `open_image` does, and opens nothing."""
  return _of(split(data))


def orientation(image: PIL.Image.Image) -> int:
  """Returns 1 to 8, as EXIF or XMP of an opened picture has it; 1 if neither does.

  What is kept of a picture in memory may be of any form, too: it is never an error. A TIFF is
  upright: Pillow turns those itself, its size where it opens one and its pixels where it loads.
  """
  if image.format == "TIFF":
    return 1
  try:
    return _number(image.getexif().get(PIL.ExifTags.Base.Orientation)) or 1
  except Exception:  # Pillow's readers of metadata raise many types
    return 1


def upright(image: PIL.Image.Image, number: int | None = None) -> PIL.Image.Image:
  """Returns a picture turned by its orientation, or by `number` if that is known already."""
  turn = _TURNS.get(orientation(image) if number is None else number)
  return image if turn is None else image.transpose(turn)


def _of(parts: Parts) -> int:
  return _of_exif(parts.exif) or _of_xmp(parts.xmp) or 1


def _of_exif(data: bytes) -> int:
  """Returns the orientation in the bytes of EXIF; 0 if there is none."""
  try:
    exif = PIL.Image.Exif()
    exif.load(data)
    return _number(exif.get(PIL.ExifTags.Base.Orientation))
  except Exception:  # as in `orientation`
    return 0


def _of_xmp(data: bytes) -> int:
  match = _XMP.search(data)
  return int(match[1]) if match else 0


def _number(value: Any) -> int:
  """Returns the one of 1 to 8 that a value of any kind is equal to; 0 if it is none of them."""
  return next((number for number in range(1, 9) if value == number), 0)


# --- JPEG


def _split_jpeg(data: bytes) -> Parts:
  """Drops APPn and comments, but for the two segments that tell the colours."""
  kept, exif, xmp, at = [data[:2]], [], b"", 2
  for marker, start, stop in jpeg_segments(data):
    body = data[start + 4 : stop]
    if marker == MAY_TURN:
      if body.startswith(_JPEG_EXIF):
        exif.append(body if not exif else body[len(_JPEG_EXIF) :])
      elif body.startswith(_JPEG_XMP):
        xmp = body
    optional = marker == _COMMENT or _APP0 <= marker <= _APP15
    if not optional or _tells_colors(marker, body):
      kept.append(data[start:stop])
    at = stop
  return Parts(b"".join([*kept, data[at:]]), b"".join(exif), xmp)


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
  """Yields marker, start and end of a JPEG's segments before its pixels, as far as they are whole.

  Those of a JPEG in order end where its scan starts.
  """
  at = 2
  while at + 3 < len(data) and data[at] == 0xFF:
    if data[at + 1] == 0xFF:  # bytes that fill up
      at += 1
      continue
    stop = at + 2 + int.from_bytes(data[at + 2 : at + 4])
    if data[at : at + 2] == SCAN or stop > len(data) or stop < at + 4:
      return
    yield data[at + 1], at, stop
    at = stop


def _tells_colors(marker: int, body: bytes) -> bool:
  """Returns whether a segment is JFIF's or Adobe's, and whole."""
  if marker == _APP0:
    return body.startswith(b"JFIF\0") and len(body) >= 14
  return marker == _APP14 and body.startswith(b"Adobe") and len(body) >= 12


# --- PNG


def _split_png(data: bytes) -> Parts:
  """Drops chunks without which the pixels are the same, and what is after the end."""
  kept, exif, xmp, at, color = [_PNG], b"", b"", len(_PNG), -1
  for kind, body, whole, stop in _png_chunks(data):
    if kind == b"IHDR":
      color = int.from_bytes(body[9:10])
    critical = not kind[0] & 0x20
    if critical or (whole and kind == b"tRNS" and len(body) >= _PNG_CLEAR.get(color, 0)):
      kept.append(data[at:stop])
    elif whole and kind == b"eXIf":
      exif = body
    elif whole and kind in _PNG_TEXTS:
      exif, xmp = exif or _raw_exif(body), xmp or (body if body.startswith(_PNG_XMP) else b"")
    at = stop
    if kind == b"IEND":
      return Parts(b"".join(kept), exif, xmp)
  return Parts(b"".join([*kept, data[at:]]), exif, xmp)


def is_whole_png(data: bytes) -> bool:
  """Returns whether a PNG has its end, and each chunk of its pixels the checksum that it tells."""
  for kind, _, whole, _ in _png_chunks(data):
    if kind == b"IEND":
      return True
    if not whole and not kind[0] & 0x20:
      return False
  return False


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bool, int]]:
  """Yields kind, content, whether its checksum is right, and end of the chunks that are there."""
  at = len(_PNG)
  while at + 12 <= len(data):
    (length,) = struct.unpack_from(">I", data, at)
    kind, stop = data[at + 4 : at + 8], at + 12 + length
    if stop > len(data):
      return
    body = data[at + 8 : stop - 4]
    whole = zlib.crc32(body, zlib.crc32(kind)) == int.from_bytes(data[stop - 4 : stop])
    yield kind, body, whole, stop
    at = stop


def _raw_exif(body: bytes) -> bytes:
  """Returns the EXIF that ImageMagick writes as a text of hexadecimal digits; b"" if it is none."""
  if not body.startswith(_PNG_RAW_EXIF):
    return b""
  text = body[len(_PNG_RAW_EXIF) :]
  try:
    if text.startswith(b"\0x"):  # zTXt: its way of compression, and zlib's first byte
      text = zlib.decompressobj().decompress(text[1:], _MAX_TEXT)
    return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode())
  except (ValueError, zlib.error):
    return b""


# --- WebP


def _split_webp(data: bytes) -> Parts:
  """Drops all chunks but those of pixels; one of them that breaks off is left so."""
  kept, exif, xmp, at = [], b"", b"", 12
  while at + 8 <= len(data):
    (length,) = struct.unpack_from("<I", data, at + 4)
    kind, body = data[at : at + 4], data[at + 8 : at + 8 + length]
    chunk = data[at : at + 8] + body + bytes(length % 2)  # the last one may lack its padding
    if kind == b"VP8X" and body:
      kept.append(chunk[:8] + bytes([body[0] & ~_WEBP_METADATA]) + chunk[9:])
    elif kind in _WEBP_PIXELS:
      kept.append(chunk)
    elif kind == b"EXIF":
      exif = body
    elif kind == b"XMP ":
      xmp = body
    at += 8 + length + length % 2
  chunks = b"".join(kept)
  size = struct.pack("<I", 4 + len(chunks))
  return Parts(b"".join([b"RIFF", size, b"WEBP", chunks]), exif, xmp)


# --- AVIF


def _is_avif(data: bytes) -> bool:
  return data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis", b"mif1", b"msf1")
