# SPDX-License-Identifier: Apache-2.0
"""Any picture becomes RGB of the asked size; anything else an ImageError."""

import io

import numpy as np
import PIL.Image
import pytest

from mm1_jax.data import image


def encode(array: np.ndarray, mode: str | None = None, format: str = "PNG", **options) -> bytes:
  data = io.BytesIO()
  picture = PIL.Image.fromarray(array)
  (picture.convert(mode) if mode else picture).save(data, format, **options)
  return data.getvalue()


def test_squashes_to_height_and_width():
  halves = np.zeros((40, 20, 3), np.uint8)
  halves[:20, :, 0] = 200  # the upper half is red
  decoded = image.decode_image(encode(halves), (6, 10))
  assert decoded.shape == (6, 10, 3)
  assert decoded.dtype == np.uint8
  np.testing.assert_array_equal(decoded[0], [[200, 0, 0]] * 10)
  np.testing.assert_array_equal(decoded[-1], [[0, 0, 0]] * 10)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA"])
def test_other_modes_become_rgb(mode):
  grey = np.full((4, 4, 3), 255, np.uint8)
  format = "TIFF" if mode == "CMYK" else "PNG"
  decoded = image.decode_image(encode(grey, mode, format), (2, 2))
  np.testing.assert_array_equal(decoded, np.full((2, 2, 3), 255))


def test_transparent_is_white():
  clear = np.zeros((4, 4, 4), np.uint8)
  np.testing.assert_array_equal(image.decode_image(encode(clear), (1, 1)), [[[255, 255, 255]]])


def test_exif_orientation_is_applied():
  left = np.zeros((8, 16, 3), np.uint8)
  left[:, :8] = 255
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes top
  data = encode(left, format="JPEG", exif=exif, quality=95)
  decoded = image.decode_image(data, (16, 8))
  assert decoded[:7].min() > 240
  assert decoded[9:].max() < 15


def test_large_jpeg_is_close_to_the_full_decode():
  rng = np.random.default_rng(0)
  smooth = PIL.Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((600, 600))
  data = encode(np.asarray(smooth), format="JPEG", quality=95)
  whole = smooth.resize((64, 64), PIL.Image.Resampling.BICUBIC)
  error = np.abs(image.decode_image(data, (64, 64)).astype(int) - np.asarray(whole))
  assert error.mean() < 2


@pytest.mark.parametrize("cut", [0, 10, 400])
def test_broken_bytes(cut):
  noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  with pytest.raises(image.ImageError, match="unreadable image"):
    image.decode_image(encode(noise, format="JPEG")[:cut], (4, 4))


def test_too_many_pixels(monkeypatch):
  monkeypatch.setattr(image, "MAX_PIXELS", 15)
  with pytest.raises(image.ImageError, match="image too large"):
    image.decode_image(encode(np.zeros((4, 4, 3), np.uint8)), (4, 4))
