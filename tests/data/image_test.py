# SPDX-License-Identifier: Apache-2.0
"""Any picture becomes RGB of the asked size; anything else an ImageError.

The reference is Pillow: it decodes and resizes every picture here a second time, by itself.
"""

import io
import itertools
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL.Image
import pytest

from mm1_jax.config import DataConfig, InputSpec, SourceConfig
from mm1_jax.data import image
from mm1_jax.data.pipeline import make_pipeline
from mm1_jax.data.sources import Source
from tests.helpers.records import SAMPLE


def encode(picture: np.ndarray | PIL.Image.Image, format: str = "PNG", **options) -> bytes:
  if isinstance(picture, np.ndarray):
    picture = PIL.Image.fromarray(picture)
  data = io.BytesIO()
  picture.save(data, format, **options)
  return data.getvalue()


def by_pillow(data: bytes, size: tuple[int, int]) -> np.ndarray:
  picture = PIL.Image.open(io.BytesIO(data)).convert("RGB")
  return np.asarray(picture.resize(size[::-1], PIL.Image.Resampling.BICUBIC))


def smooth(width: int, height: int) -> PIL.Image.Image:
  """A picture with soft edges in all colours, which every codec keeps well."""
  few = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  return PIL.Image.fromarray(few).resize((width, height), PIL.Image.Resampling.BICUBIC)


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.abs(a.astype(int) - b)


# --- size, and what fills it


def test_squashes_to_height_and_width():
  halves = np.zeros((40, 20, 3), np.uint8)
  halves[:20, :, 0] = 200  # the upper half is red
  decoded = image.decode_image(encode(halves), (6, 10))
  assert decoded.shape == (6, 10, 3)
  assert decoded.dtype == np.uint8
  np.testing.assert_array_equal(decoded[0], [[200, 0, 0]] * 10)
  np.testing.assert_array_equal(decoded[-1], [[0, 0, 0]] * 10)


@pytest.mark.parametrize(
  ("shape", "where"),
  [
    ((10, 20), np.s_[2:6, :]),  # twice as wide as high: half of the height
    ((20, 10), np.s_[:, 2:6]),
    ((10, 10), np.s_[:, :]),
    ((1000, 1), np.s_[:, 3:4]),  # never less than a pixel wide
  ],
)
def test_pads_around_the_middle(shape: tuple[int, int], where):
  decoded = image.decode_image(encode(np.full((*shape, 3), 9, np.uint8)), (8, 8), fit="pad")
  expected = np.full((8, 8, 3), image.PAD_COLOR, np.uint8)
  expected[where] = 9
  np.testing.assert_array_equal(decoded, expected)


def test_a_border_is_zero_to_the_encoder():
  from mm1_jax.models.vit import PIXEL_MEAN

  np.testing.assert_allclose(np.array(image.PAD_COLOR) / 255, PIXEL_MEAN, atol=0.5 / 255)


# --- close to Pillow


@pytest.mark.parametrize("size", [(378, 378), (96, 224), (33, 17)])
@pytest.mark.parametrize("fast", [True, False])
def test_real_pictures_are_as_pillow_has_them(size: tuple[int, int], fast: bool, monkeypatch):
  if not fast:
    monkeypatch.setattr(image, "_decode_jpeg", lambda *_: None)
  source = Source(SourceConfig("captions", str(SAMPLE / "captions-heldout-*.arrayrecord")))
  pictures = [item["image"] for i in range(30) for item in source[i]["content"] if "image" in item]
  errors = [difference(image.decode_image(p, size), by_pillow(p, size)) for p in pictures]
  print(f"mean {np.mean([e.mean() for e in errors]):.3f}, max {max(e.max() for e in errors)}")
  assert np.mean([e.mean() for e in errors]) < 0.3
  assert max(e.max() for e in errors) < 24


WITHOUT_CONVOLUTION = """
import pathlib, sys
sys.modules["cykooz_resizer"] = None  # as where there is no build of it
import numpy as np
from mm1_jax.data import image
np.save(sys.argv[2], image.decode_image(pathlib.Path(sys.argv[1]).read_bytes(), (40, 60)))
"""


def test_pillow_resizes_where_the_convolution_has_no_build(tmp_path):
  data = encode(smooth(100, 90), "JPEG")
  (tmp_path / "picture.jpg").write_bytes(data)
  files = tmp_path / "picture.jpg", tmp_path / "pixels.npy"
  subprocess.run([sys.executable, "-c", WITHOUT_CONVOLUTION, *map(str, files)], check=True)
  np.testing.assert_array_equal(np.load(files[1]), by_pillow(data, (40, 60)))


def test_large_jpegs_are_decoded_small_and_close(monkeypatch):
  """A JPEG of 8 times the size is decoded at a quarter of it."""
  shapes, resize = [], image._resize
  monkeypatch.setattr(image, "_resize", lambda p, s: shapes.append(p.shape) or resize(p, s))
  data = encode(smooth(512, 1024), "JPEG", quality=95)
  decoded = image.decode_image(data, (64, 64))
  assert shapes == [(256, 128, 3)]
  error = difference(decoded, by_pillow(data, (64, 64)))
  assert error.mean() < 1
  assert error.max() < 8


def test_a_jpeg_that_is_not_much_larger_is_decoded_whole(monkeypatch):
  shapes, resize = [], image._resize
  monkeypatch.setattr(image, "_resize", lambda p, s: shapes.append(p.shape) or resize(p, s))
  image.decode_image(encode(smooth(140, 120), "JPEG"), (64, 64))
  assert shapes == [(120, 140, 3)]


def test_damage_that_pillow_repairs_is_repaired():
  data = bytearray(encode(smooth(64, 64), "JPEG", quality=90))
  middle = len(data) * 2 // 3
  data[middle : middle + 8] = b"\xff\xd3" * 4  # restart markers that do not belong there
  decoded = image.decode_image(bytes(data), (64, 64))
  np.testing.assert_array_equal(decoded, by_pillow(bytes(data), (64, 64)))


# --- formats and modes

FLAT = PIL.Image.new("RGB", (8, 8), (200, 100, 50))


@pytest.mark.parametrize(
  ("format", "options"),
  [
    ("JPEG", {"quality": 100, "subsampling": 0}),
    ("JPEG", {"quality": 100, "progressive": True}),
    ("PNG", {}),
    ("WEBP", {"lossless": True}),
    ("GIF", {}),
    ("AVIF", {"quality": 100}),
    ("BMP", {}),
    ("TIFF", {}),
    ("JPEG2000", {}),
    ("MPO", {"save_all": True, "append_images": [PIL.Image.new("RGB", (8, 8))], "quality": 100}),
  ],
)
def test_formats(format: str, options: dict):
  decoded = image.decode_image(encode(FLAT, format, **options), (4, 4))
  np.testing.assert_allclose(decoded, np.full((4, 4, 3), (200, 100, 50)), atol=3)


@pytest.mark.parametrize(
  ("mode", "format", "color"),
  [
    ("L", "PNG", 153),
    ("L", "JPEG", 153),
    ("1", "PNG", 255),
    ("P", "PNG", 153),
    ("LA", "PNG", 153),
    ("CMYK", "TIFF", 153),
    ("RGBA", "WEBP", 153),
  ],
)
def test_modes_become_rgb(mode: str, format: str, color: int):
  picture = PIL.Image.new("RGB", (4, 4), (color,) * 3).convert(mode)
  options = {"lossless": True} if format == "WEBP" else {}
  decoded = image.decode_image(encode(picture, format, **options), (2, 2))
  np.testing.assert_allclose(decoded, np.full((2, 2, 3), color), atol=1)


def test_inverted_cmyk_jpeg():
  """Adobe, and so Pillow, writes JPEGs of four inks upside down, and says so in a marker."""
  data = encode(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
  assert b"Adobe" in data
  np.testing.assert_allclose(image.decode_image(data, (1, 1)), [[[255, 0, 0]]], atol=2)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(format: str):
  levels = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
  decoded = image.decode_image(encode(levels, format), (2, 3))
  np.testing.assert_array_equal(decoded[..., 0], [[0, 0, 1], [128, 255, 255]])


def test_16_bits_per_color():
  rows = b"".join(b"\0" + struct.pack(">6H", 0xC800, 0x6400, 0x3200, 0, 0, 0) for _ in range(2))
  data = png(2, 2, zlib.compress(rows), bits=16)
  np.testing.assert_array_equal(image.decode_image(data, (2, 2)), [[[200, 100, 50], [0, 0, 0]]] * 2)


def test_floats_are_no_colors():
  with pytest.raises(image.ImageError, match="unreadable image"):
    image.decode_image(encode(np.ones((4, 4), np.float32), "TIFF"), (2, 2))


def test_alpha_is_over_white():
  pixels = np.zeros((1, 3, 4), np.uint8)
  pixels[0, :, 0], pixels[0, :, 3] = 255, [0, 128, 255]  # red: clear, half, full
  decoded = image.decode_image(encode(pixels), (1, 3))
  np.testing.assert_array_equal(decoded, [[[255, 255, 255], [255, 127, 127], [255, 0, 0]]])


def test_a_transparent_palette_entry_is_white():
  picture = PIL.Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
  picture.putpalette([10, 20, 30, 40, 50, 60])
  decoded = image.decode_image(encode(picture, transparency=1), (1, 2))
  np.testing.assert_array_equal(decoded, [[[10, 20, 30], [255, 255, 255]]])


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format: str):
  frames = [PIL.Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
  data = encode(frames[0], format, save_all=True, append_images=frames[1:], duration=9)
  np.testing.assert_allclose(image.decode_image(data, (1, 1)), [[[255, 0, 0]]], atol=3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation: int, format: str):
  """What a camera stored is undone: all eight of one scene come out the same."""
  scene = np.zeros((16, 24, 3), np.uint8)
  scene[:8, :12], scene[:8, 12:], scene[8:, :12] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
  stored = {  # from the scene to the orientation of that number
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
  }[orientation](scene)
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
  data = encode(np.ascontiguousarray(stored), format, exif=exif, **options.get(format, {}))
  np.testing.assert_allclose(image.decode_image(data, (16, 24)), scene, atol=6)


def test_nonsense_in_exif_is_no_reason_to_drop():
  data = encode(FLAT, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense")
  assert image.decode_image(data, (2, 2)).shape == (2, 2, 3)


# --- what cannot be used


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated(format: str, share: float):
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  data = encode(noise, format)
  with pytest.raises(image.ImageError, match="truncated image"):
    image.decode_image(data[: int(share * len(data))], (8, 8))


@pytest.mark.parametrize(
  ("data", "reason"),
  [
    (b"", "empty image"),
    (b"\0" * 1000, "unreadable image"),
    (b"GIF89a", "unreadable image"),
    (b"\xff\xd8\xff\xe0" + b"\0" * 50, "unreadable image"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "unreadable image"),
    (b"<html>404</html>", "unreadable image"),
    # Pillow would have Ghostscript run this program.
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "unreadable image"),
  ],
)
def test_no_picture(data: bytes, reason: str):
  with pytest.raises(image.ImageError) as caught:
    image.decode_image(data, (4, 4))
  assert caught.value.reason == reason


def test_too_many_pixels():
  data = encode(np.zeros((4, 5, 3), np.uint8))
  assert image.decode_image(data, (4, 4), max_pixels=20).shape == (4, 4, 3)
  with pytest.raises(image.ImageError, match="image too large"):
    image.decode_image(data, (4, 4), max_pixels=19)


def png(width: int, height: int, idat: bytes, bits: int = 8) -> bytes:
  """A PNG with any size in its header."""

  def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", idat) + chunk(b"IEND", b"")


BOMBS = """
import io, resource, sys
import PIL.Image
from mm1_jax.data import image
image.decode_image(open(sys.argv[1], 'rb').read(), (378, 378))  # what is loaded lazily
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
  try:
    image.decode_image(open(path, 'rb').read(), (378, 378))
  except image.ImageError as e:
    assert e.reason == 'image too large', e.reason
  else:
    raise SystemExit(f'{path} was decoded')
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_bombs_are_never_decoded(tmp_path):
  """A few kB that say they are gigabytes cost no memory: they are refused by their headers."""
  rows = zlib.compressobj(9)
  idat = b"".join(rows.compress(bytes(1 << 20)) for _ in range(290)) + rows.flush()
  jpeg = bytearray(encode(FLAT, "JPEG"))
  at = jpeg.index(b"\xff\xc0") + 5
  jpeg[at : at + 4] = struct.pack(">HH", 65000, 65000)
  gif = bytearray(encode(FLAT, "GIF"))
  gif[6:10] = struct.pack("<HH", 65000, 65000)
  bombs = {
    "a.png": png(10_000, 10_000, idat),  # all of its 300 MB are there
    "b.png": png(100_000, 100_000, idat),
    "c.jpg": bytes(jpeg),
    "d.gif": bytes(gif),
  }
  (tmp_path / "good.jpg").write_bytes(encode(smooth(640, 480), "JPEG"))
  for name, data in bombs.items():
    (tmp_path / name).write_bytes(data)
  paths = [str(tmp_path / name) for name in ("good.jpg", *bombs)]
  command = [sys.executable, "-W", "ignore", "-c", BOMBS, *paths]
  out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
  assert int(out) < 20_000  # kB


# --- through the pipeline


def test_the_config_says_how_pictures_fit_and_how_large_they_may_be(write):
  small = encode(np.full((4, 8, 3), 9, np.uint8))
  large = encode(np.full((40, 80, 3), 9, np.uint8))
  data = DataConfig(
    sources=(write("s", [[small, "a"], [large, "a"]]),),
    tokenizer=str(SAMPLE / "tokenizer.model"),
    seq_len=16,
    batch_size=1,
    images_per_row=1,
    window_rows=2,
    image_fit="pad",
    max_image_pixels=32,
  )
  pipeline = make_pipeline(data, InputSpec((8, 8), 2, 4))
  batches = [batch for batch, _ in itertools.islice(pipeline, 4)]
  pipeline.close()
  pictures = [b.images[0, 0] for b in batches if b.image_mask.any()]
  assert len(pictures) == pipeline.drops["s: image too large"] == 2
  expected = np.full((8, 8, 3), image.PAD_COLOR, np.uint8)
  expected[2:6] = 9
  np.testing.assert_array_equal(pictures[0], expected)
