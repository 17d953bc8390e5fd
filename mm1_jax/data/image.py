# SPDX-License-Identifier: Apache-2.0
"""Image bytes to pixels.

Nearly all pictures are plain JPEGs: libjpeg-turbo decodes those by itself. Pillow reads all else,
and a vectorised convolution resizes them all. Together that is three times as fast as Pillow alone.
Where that convolution has no build, as for Linux on ARM, Pillow resizes too. The two differ, in
levels of 255, by less than 0.3 on average and 24 at most: they begin with different axes, and round
to 8 bits after each.
"""

import importlib.util
import threading
from typing import Literal

import numpy as np
import PIL.Image
import simplejpeg

from mm1_jax.config import DataConfig
from mm1_jax.data import metadata

# setup.py asks for it on the machines that it has a build for.
HAS_CONVOLUTION = importlib.util.find_spec("cykooz_resizer") is not None
MAX_PIXELS = DataConfig.max_image_pixels
# Other formats are refused. Some that Pillow reads start programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "JPEG2000")
# CLIP's mean colour: a border of it is 0 to the encoder.
PAD_COLOR = (123, 117, 104)
# Why a picture cannot be used.
EMPTY = "empty image"
UNREADABLE = "unreadable image"
TRUNCATED = "truncated image"
TOO_LARGE = "image too large"


class _Decoded(threading.local):
  """Memory that a thread decodes picture after picture to: new memory costs a third more."""

  MAX_BYTES = 1 << 24  # larger pictures are rare, and would stay in memory

  def __init__(self):
    self._bytes = bytearray()

  def buffer(self, num_bytes: int) -> bytearray | None:
    """Returns memory for a decoder to write to; None for it to find some."""
    if num_bytes > self.MAX_BYTES:
      return None
    if len(self._bytes) < num_bytes:
      self._bytes = bytearray(num_bytes)
    return self._bytes


_decoded = _Decoded()


class ImageError(ValueError):
  """An image that cannot be used; `reason` is short and the same for images of one kind."""

  def __init__(self, reason: str):
    super().__init__(reason)
    self.reason = reason


def decode_image(
  data: bytes,
  size: tuple[int, int],
  *,
  fit: Literal["squash", "pad"] = "squash",
  max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
  """Decodes an image, upright and on white, and resizes it: bicubic with antialiasing.

  Args:
    data: an encoded image of one of `FORMATS`; of an animation, the first frame.
    size: height and width in pixels.
    fit: whether the image is squashed to `size`, as CLIP's descendants at 378 pixels expect, or
      keeps its aspect ratio in the middle of a `PAD_COLOR` border.
    max_pixels: an image of more is taken for an attack or a mistake.

  Returns:
    uint8[H, W, 3], RGB; not to be written to.

  Raises:
    ImageError: the bytes are no whole image, or it has more than `max_pixels` pixels.
  """
  if not data:
    raise ImageError(EMPTY)
  try:
    pixels = _decode_jpeg(data, size, max_pixels)
    if pixels is None:
      pixels = _decode_any(data, size, max_pixels)
    return _resize(pixels, size) if fit == "squash" else _pad(pixels, size)
  except (ImageError, MemoryError):
    raise
  except PIL.Image.DecompressionBombError as e:
    raise ImageError(TOO_LARGE) from e
  except Exception as e:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
    raise ImageError(TRUNCATED if "truncated" in str(e).lower() else UNREADABLE) from e


def look_at(data: bytes) -> tuple[tuple[int, int], str]:
  """Returns height and width of an image, upright, and its format, by its header alone.

  Raises:
    ImageError: it has none that can be read.
  """
  try:
    image, orientation = metadata.open_image(data, FORMATS)
    with image:
      turned = orientation >= metadata.SIDEWAYS
      return image.size if turned else (image.height, image.width), str(image.format)
  except PIL.Image.DecompressionBombError as e:
    raise ImageError(TOO_LARGE) from e
  except MemoryError:
    raise
  except Exception as e:  # Pillow's plugins raise many types
    raise ImageError(UNREADABLE if data else EMPTY) from e


def read_header(data: bytes) -> tuple[tuple[int, int], str]:
  """As `look_at`; (1, 1) and "" of a damaged one: decoding tells what is wrong."""
  try:
    return look_at(data)
  except ImageError:
    return (1, 1), ""


def count_pixels(data: bytes) -> int:
  """Returns the pixels of an image by its header alone.

  Raises:
    ImageError: it has none that can be read.
  """
  height, width = look_at(data)[0]
  return height * width


def on_white(image: PIL.Image.Image) -> PIL.Image.Image:
  """Returns `image` in RGB, its transparent parts white.

  Raises:
    ImageError: its values are no colours: floats, or integers of 32 bits.
  """
  if image.mode in ("I", "F"):
    raise ImageError(UNREADABLE)
  if image.mode.startswith("I;16"):  # Pillow would clip what is above 255
    image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
    image = image.convert("RGBA")
    white = PIL.Image.new("RGBA", image.size, "white")
    image = PIL.Image.alpha_composite(white, image)
  return image.convert("RGB")


def _decode_jpeg(data: bytes, size: tuple[int, int], max_pixels: int) -> np.ndarray | None:
  """Returns the pixels of an upright RGB or grey JPEG; None for all else, and for damaged ones.

  They are overwritten when this thread decodes the next picture.
  """
  if not _is_upright_jpeg(data):
    return None
  least = _least_side(size)
  try:
    height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    if colors not in ("YCbCr", "RGB", "Gray"):
      return None
    height, width = int(height), int(width)
    _check_pixels(height, width, max_pixels)
    return simplejpeg.decode_jpeg(
      data,
      min_height=least,
      min_width=least,
      min_factor=2,
      buffer=_decoded.buffer(3 * height * width),
    )
  except ImageError:
    raise
  except ValueError:  # it refuses repairable files, too; Pillow decodes those
    return None


def _is_upright_jpeg(data: bytes) -> bool:
  """Returns whether the markers before a JPEG's pixels are in order, and leave it upright.

  Walking along them takes a twentieth of the time that Pillow takes to open it.
  """
  if not data.startswith(b"\xff\xd8"):
    return False
  segments = list(metadata.jpeg_segments(data))
  scan = segments[-1][2] if segments else 2
  if data[scan : scan + 2] != metadata.SCAN:
    return False
  may_turn = any(marker == metadata.MAY_TURN for marker, _, _ in segments)
  return not may_turn or metadata.orientation_of(data) == 1


def _decode_any(data: bytes, size: tuple[int, int], max_pixels: int) -> np.ndarray:
  image, orientation = metadata.open_image(data, FORMATS)
  with image:
    _check_pixels(image.height, image.width, max_pixels)
    least = _least_side(size)
    image.draft("RGB", (least, least))
    return np.asarray(on_white(metadata.upright(image, orientation)))


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
  """Checks the size by the header alone, so that a decompression bomb is never decoded."""
  if height * width > max_pixels:
    raise ImageError(TOO_LARGE)


def _least_side(size: tuple[int, int]) -> int:
  """Returns the side down to which a JPEG decoder may skip detail.

  At twice the size that is asked for, the resize still drops more than was skipped.
  """
  return 2 * max(size)


def _pad(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  scale = min(size[0] / pixels.shape[0], size[1] / pixels.shape[1])
  height, width = (max(1, round(scale * side)) for side in pixels.shape[:2])
  top, left = (size[0] - height) // 2, (size[1] - width) // 2
  padded = np.full((*size, 3), PAD_COLOR, np.uint8)
  padded[top : top + height, left : left + width] = _resize(pixels, (height, width))
  return padded


def _resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  if HAS_CONVOLUTION:
    from mm1_jax.data import convolution

    return convolution.resize(pixels, size)
  return resize_with_pillow(pixels, size)


def resize_with_pillow(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Returns uint8[H, W, 3] of `size` height and width: bicubic with antialiasing."""
  height, width = size
  image = PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.BICUBIC)
  return np.asarray(image)
