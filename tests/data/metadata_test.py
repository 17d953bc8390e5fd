# SPDX-License-Identifier: Apache-2.0
"""Metadata decides nothing but the orientation, and that alike wherever a picture is read."""

import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest

from mm1_jax.convert.export.huggingface import pictures_mm1
from mm1_jax.data import image, metadata
from mm1_jax.data.build import images
from mm1_jax.data.image import ImageError
from mm1_jax.inference import prompts
from tests.helpers import fuzz

HEIGHT, WIDTH = 32, 48
SCENE = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
SCENE[:16, :24], SCENE[:16, 24:], SCENE[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
SHORT, LONG, ASCII, RATIONAL, FLOAT, DOUBLE, BYTE = 3, 4, 2, 5, 11, 12, 1


def encoded(format: str, **options) -> bytes:
  data = io.BytesIO()
  lossless = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
  PIL.Image.fromarray(SCENE).save(data, format, **lossless.get(format, {}), **options)
  return data.getvalue()


def tiff(*entries: tuple[int, int, int, bytes]) -> bytes:
  """EXIF of one directory: entries of tag, type, count and value."""
  at, body, values = 8 + 2 + 12 * len(entries) + 4, b"", b""
  for tag, kind, count, value in entries:
    if len(value) > 4:
      body += struct.pack("<HHII", tag, kind, count, at + len(values))
      values += value
    else:
      body += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
  return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4) + values


def orientation(kind: int, value: bytes, count: int = 1) -> bytes:
  return tiff((0x0112, kind, count, value))


SIX = struct.pack("<H", 6)
ZERO_RATIONAL = struct.pack("<II", 0, 0)
# What EXIF says, and the orientation that it is.
EXIF = {
  "garbage": (b"garbage-not-a-tiff-header", 1),
  "empty": (b"", 1),
  "one byte": (b"I", 1),
  "header only": (b"II*\0\x08\0\0\0", 1),
  "offset beyond the end": (b"II*\0\xff\xff\xff\xff", 1),
  "offset to itself": (b"MM\0*\0\0\0\0", 1),
  "zero": (orientation(SHORT, bytes(2)), 1),
  "nine": (orientation(SHORT, struct.pack("<H", 9)), 1),
  "65535": (orientation(SHORT, b"\xff\xff"), 1),
  "text": (orientation(ASCII, b"Horizontal\0", 11), 1),
  "text of a number": (orientation(ASCII, b"6\0", 2), 1),
  "text that is no UTF-8": (orientation(ASCII, b"\xff\xfe\xff\0", 4), 1),
  "two numbers": (orientation(SHORT, struct.pack("<HH", 6, 8), 2), 6),
  "no number": (orientation(SHORT, b"", 0), 1),
  "a million numbers": (orientation(SHORT, SIX, 1_000_000), 1),
  "byte": (orientation(BYTE, b"\6"), 1),
  "long": (orientation(LONG, struct.pack("<I", 6)), 6),
  "float": (orientation(FLOAT, struct.pack("<f", 6.0)), 6),
  "half": (orientation(FLOAT, struct.pack("<f", 6.5)), 1),
  "not a number": (orientation(DOUBLE, struct.pack("<d", float("nan"))), 1),
  "rational": (orientation(RATIONAL, struct.pack("<II", 12, 2)), 6),
  "zero denominator": (orientation(RATIONAL, struct.pack("<II", 6, 0)), 1),
  "unknown type": (orientation(99, SIX), 1),
  "a rational beside it": (
    tiff((0x0112, SHORT, 1, SIX), (0x011A, RATIONAL, 1, ZERO_RATIONAL)),
    6,
  ),
  "a damaged directory beside it": (
    tiff((0x0112, SHORT, 1, SIX), (0x8769, LONG, 1, b"\xff\xff\xff\x7f")),
    6,
  ),
  "right": (orientation(SHORT, SIX), 6),
}


def segment(marker: int, body: bytes) -> bytes:
  return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def in_jpeg(*segments: bytes) -> bytes:
  data = encoded("JPEG")
  return b"".join([data[:2], *segments, data[2:]])


def chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
  checksum = zlib.crc32(kind + body) if checksum is None else checksum
  return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def in_png(*chunks: bytes, last: bool = False) -> bytes:
  data = encoded("PNG")
  at = len(data) - 12 if last else 33  # before the end, or after the header
  return b"".join([data[:at], *chunks, data[at:]])


def in_webp(kind: bytes, body: bytes, claims: int | None = None) -> bytes:
  """VP8X with one more chunk at the end."""
  pixels = encoded("WEBP")[12:]
  flag = {b"EXIF": 8, b"XMP ": 4, b"ICCP": 0x20}.get(kind, 0)
  extended = b"VP8X" + struct.pack("<IB3x", 10, flag)
  extended += (WIDTH - 1).to_bytes(3, "little") + (HEIGHT - 1).to_bytes(3, "little")
  more = kind + struct.pack("<I", len(body) if claims is None else claims) + body
  data = b"WEBP" + extended + pixels + more + bytes(len(more) % 2)
  return b"RIFF" + struct.pack("<I", len(data) + (claims or 0)) + data


def with_exif(format: str, exif: bytes) -> bytes:
  match format:
    case "JPEG":
      return in_jpeg(segment(0xE1, b"Exif\0\0" + exif))
    case "PNG":
      return in_png(chunk(b"eXIf", exif))
    case "PNG, at its end":
      return in_png(chunk(b"eXIf", exif), last=True)
    case _:
      return in_webp(b"EXIF", exif)


def check(data: bytes, number: int) -> None:
  """Checks that all that reads a picture has one opinion of it."""
  turned = number >= 5
  size = (WIDTH, HEIGHT) if turned else (HEIGHT, WIDTH)
  expected = np.rot90(SCENE, -1) if turned else SCENE
  assert image.read_header(data)[0] == size
  assert images.measure(data, decode=False) == images.measure(data, decode=True) == size[::-1]
  assert image.count_pixels(data) == HEIGHT * WIDTH
  pixels = image.decode_image(data, size)
  np.testing.assert_allclose(pixels, expected, atol=6)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "PNG, at its end", "WEBP"])
@pytest.mark.parametrize("case", EXIF)
def test_exif(format: str, case: str):
  exif, number = EXIF[case]
  check(with_exif(format, exif), number)


@pytest.mark.parametrize("case", EXIF)
def test_pictures_in_memory_and_of_exports(case: str):
  """What Pillow opened is turned alike where it is a prompt, and where an exported folder runs."""
  exif, number = EXIF[case]
  data = with_exif("JPEG", exif)
  expected = np.rot90(SCENE, -1) if number >= 5 else SCENE
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Pillow's, of the EXIF
    opened = PIL.Image.open(io.BytesIO(data))
    assert metadata.orientation(opened) == metadata.orientation_of(data) == number
    png = prompts._encoded(opened)
    np.testing.assert_allclose(image.decode_image(png, expected.shape[:2]), expected, atol=6)
    theirs = pictures_mm1.Picture(data, 10**6)
    assert theirs.size == expected.shape[:2]
    np.testing.assert_allclose(theirs.decode(theirs.size, "squash"), expected, atol=6)


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="%s"/></x:xmpmeta>'
BOMB = zlib.compress(bytes(8 << 20))
OTHER: dict[str, tuple[Callable[[], bytes], int]] = {
  "JPEG: XMP": (lambda: in_jpeg(segment(0xE1, metadata._JPEG_XMP + XMP % b"6")), 6),
  "JPEG: XMP of 9": (lambda: in_jpeg(segment(0xE1, metadata._JPEG_XMP + XMP % b"9")), 1),
  "JPEG: XMP of 66": (lambda: in_jpeg(segment(0xE1, metadata._JPEG_XMP + XMP % b"66")), 1),
  "JPEG: short JFIF": (lambda: in_jpeg(segment(0xE0, b"JFIF\0")), 1),
  "JPEG: short Adobe": (lambda: in_jpeg(segment(0xEE, b"Adobe")), 1),
  "JPEG: damaged MPF": (lambda: in_jpeg(segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff")), 1),
  "JPEG: MPF without entries": (lambda: in_jpeg(segment(0xE2, b"MPF\0" + tiff())), 1),
  "JPEG: damaged ICC": (lambda: in_jpeg(segment(0xE2, b"ICC_PROFILE\0")), 1),
  "JPEG: damaged Photoshop": (
    lambda: in_jpeg(segment(0xED, b"Photoshop 3.0\0008BIM\x04\x04\xff")),
    1,
  ),
  "JPEG: odd comment": (lambda: in_jpeg(segment(0xFE, b"\xff\xd8\xff\xd9\xff\xda")), 1),
  "JPEG: bytes that fill up": (
    lambda: in_jpeg(b"\xff\xff", segment(0xE1, b"Exif\0\0" + EXIF["right"][0])),
    6,
  ),
  "PNG: checksum of a text": (lambda: in_png(chunk(b"tEXt", b"Title\0x", 1)), 1),
  "PNG: checksum of EXIF": (lambda: in_png(chunk(b"eXIf", EXIF["right"][0], 1)), 1),
  "PNG: text too large": (lambda: in_png(chunk(b"zTXt", b"a\0\0" + BOMB)), 1),
  "PNG: text too large, at its end": (
    lambda: in_png(chunk(b"zTXt", b"a\0\0" + BOMB), last=True),
    1,
  ),
  "PNG: raw profile": (
    lambda: in_png(
      chunk(
        b"zTXt",
        b"Raw profile type exif\0\0"
        + zlib.compress(b"\nexif\n 9\n" + (b"Exif\0\0" + EXIF["right"][0]).hex().encode()),
      )
    ),
    6,
  ),
  "PNG: damaged raw profile": (
    lambda: in_png(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nzz")),
    1,
  ),
  "PNG: raw profile too large": (
    lambda: in_png(chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB)),
    1,
  ),
  "PNG: XMP": (lambda: in_png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % b"6")), 6),
  "PNG: short pHYs": (lambda: in_png(chunk(b"pHYs", b"\0")), 1),
  "PNG: short gAMA": (lambda: in_png(chunk(b"gAMA", b"")), 1),
  "PNG: short cHRM": (lambda: in_png(chunk(b"cHRM", b"\0\1")), 1),
  "PNG: no sRGB": (lambda: in_png(chunk(b"sRGB", b"")), 1),
  "PNG: damaged ICC": (lambda: in_png(chunk(b"iCCP", b"name\0\x07nonsense")), 1),
  "PNG: ICC too large": (lambda: in_png(chunk(b"iCCP", b"name\0\0" + BOMB)), 1),
  "PNG: short tRNS": (lambda: in_png(chunk(b"tRNS", b"\0")), 1),
  "PNG: animation of no frames": (lambda: in_png(chunk(b"acTL", bytes(8))), 1),
  "PNG: short animation": (lambda: in_png(chunk(b"acTL", b"")), 1),
  "PNG: private chunk": (lambda: in_png(chunk(b"vpAg", b"x" * 99)), 1),
  "PNG: bytes after its end": (lambda: encoded("PNG") + b"\0trailing", 1),
  "WEBP: damaged ICC": (lambda: in_webp(b"ICCP", b"nonsense"), 1),
  "WEBP: EXIF that breaks off": (lambda: in_webp(b"EXIF", b"II*\0", claims=1000), 1),
  "WEBP: EXIF with JPEG's prefix": (lambda: in_webp(b"EXIF", b"Exif\0\0" + EXIF["right"][0]), 6),
  "WEBP: XMP": (lambda: in_webp(b"XMP ", XMP % b"6"), 6),
  "WEBP: unknown chunk": (lambda: in_webp(b"ZZZZ", b"x" * 9), 1),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_metadata(case: str):
  make, number = OTHER[case]
  check(make(), number)


@pytest.mark.parametrize("format", ["AVIF", "TIFF"])
def test_formats_whose_metadata_is_inside(format: str):
  """AVIF has items, TIFF tags. Damaged EXIF of the first is passed over."""
  if format == "TIFF":
    data = encoded(format, tiffinfo={0x0112: 6})
    check(data, 6)
    entry = struct.pack("<HHIHH", 0x0112, SHORT, 1, 6, 0)
    assert data.count(entry) == 1
    check(data.replace(entry, struct.pack("<HHIHH", 0x0112, SHORT, 1, 9, 0)), 1)
    check(data.replace(entry, struct.pack("<HHI4s", 0x0112, ASCII, 2, b"6")), 1)
    return
  data = encoded(format, exif=tiff((0x010E, ASCII, 5, b"text\0")), quality=100)
  assert data.count(b"II*\0") == 1
  for damaged in (data, data.replace(b"II*\0", b"junk")):
    assert image.read_header(damaged)[0] == (HEIGHT, WIDTH)
    assert image.decode_image(damaged, (HEIGHT, WIDTH)).shape == SCENE.shape


def test_damage_to_pixels_is_seen_at_once():
  """A flipped bit in a PNG's pixels: the build's verdict is training's."""
  data = bytearray(encoded("PNG"))
  data[data.index(b"IDAT") + 12] ^= 1
  for read in (lambda d: image.decode_image(d, (8, 8)), lambda d: images.measure(d, decode=False)):
    with pytest.raises(ImageError):
      read(bytes(data))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["JPEG", "PNG", "PNG, at its end", "WEBP"])
def test_damaged_metadata_changes_no_pixel(format: str):
  """EXIF changed at random, by seed: never an error, one opinion, and the pixels are the same."""
  good = tiff(
    (0x0112, SHORT, 1, SIX), (0x010E, ASCII, 9, b"a camera\0"), (0x011A, RATIONAL, 1, SIX)
  )
  rng = random.Random(0)
  for exif in fuzz.mutations(good, 1500, seed=1):
    data = with_exif(format, exif[:60_000])
    size = image.look_at(data)[0]
    assert size in ((HEIGHT, WIDTH), (WIDTH, HEIGHT))
    if rng.random() < 0.05:
      assert image.decode_image(data, size).any()
      images.measure(data, decode=False)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_damaged_files_raise_one_error(format: str):
  """Whole files changed at random: pixels or an ImageError, and a header never says otherwise."""
  good = encoded(format, exif=tiff((0x0112, SHORT, 1, SIX)))
  for data in fuzz.mutations(good, 1500, seed=2):
    try:
      pixels = image.decode_image(data, (8, 8))
    except ImageError:
      continue
    assert pixels.shape == (8, 8, 3)
    assert image.look_at(data)[0] != (1, 1)
