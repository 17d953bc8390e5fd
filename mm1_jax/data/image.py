# SPDX-License-Identifier: Apache-2.0
"""Image bytes to pixels.

Pillow reads the header of every picture, and the pixels of most formats. Nearly all pictures are
plain JPEGs: libjpeg-turbo decodes those by itself, and a vectorised convolution resizes them all.
Together that is three times as fast as Pillow alone, and within a rounding error of it.
"""

import io
import threading
from typing import Literal

import cykooz_resizer
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import simplejpeg

from mm1_jax.config import DataConfig

MAX_PIXELS = DataConfig.max_image_pixels
# What is not here is not a picture to us. Some of Pillow's other formats start programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "JPEG2000")
# CLIP's mean colour: a border of it is 0 to the encoder.
PAD_COLOR = (123, 117, 104)
# Why a picture cannot be used.
EMPTY = "empty image"
UNREADABLE = "unreadable image"
TRUNCATED = "truncated image"
TOO_LARGE = "image too large"

# Catmull-Rom is what Pillow calls bicubic.
_BICUBIC = cykooz_resizer.ResizeOptions(
  resize_alg=cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.catmull_rom),
  use_alpha=False,
)
_RGB = cykooz_resizer.PixelType.U8x3
_thread = threading.local()  # a resizer serves one thread at a time


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
    with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
      # The header tells the size: a bomb is never decoded.
      if image.width * image.height > max_pixels:
        raise ImageError(TOO_LARGE)
      pixels = _decode_jpeg(data, image, size)
      if pixels is None:
        pixels = _decode_any(image, size)
    return _resize(pixels, size) if fit == "squash" else _pad(pixels, size)
  except (ImageError, MemoryError):
    raise
  except PIL.Image.DecompressionBombError as e:
    raise ImageError(TOO_LARGE) from e
  except Exception as e:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
    raise ImageError(TRUNCATED if "truncated" in str(e).lower() else UNREADABLE) from e


def read_header(data: bytes) -> tuple[tuple[int, int], str]:
  """Returns height and width of an image, upright, and its format; (1, 1) and "" if damaged."""
  try:
    with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
      turned = image.getexif().get(PIL.ExifTags.Base.Orientation, 1) > 4
      height, width = image.size if turned else (image.height, image.width)
      return (height, width), str(image.format)
  except Exception:  # Pillow's plugins raise many types; decoding tells what is wrong
    return (1, 1), ""


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


def _decode_jpeg(data: bytes, image: PIL.Image.Image, size: tuple[int, int]) -> np.ndarray | None:
  """Returns the pixels of an upright RGB or grey JPEG; None for all else, and for damaged ones.

  `image` is the same picture, of which only the header has been read.
  """
  if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
    return None
  if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:
    return None
  least = _least_side(size)
  try:
    return simplejpeg.decode_jpeg(data, min_height=least, min_width=least, min_factor=2)
  except ValueError:  # it refuses what it could repair; Pillow knows what is worth repairing
    return None


def _decode_any(image: PIL.Image.Image, size: tuple[int, int]) -> np.ndarray:
  least = _least_side(size)
  image.draft("RGB", (least, least))
  PIL.ImageOps.exif_transpose(image, in_place=True)
  return np.asarray(on_white(image))


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
  if not hasattr(_thread, "resizer"):
    _thread.resizer = cykooz_resizer.Resizer()
  source = cykooz_resizer.ImageData(pixels.shape[1], pixels.shape[0], _RGB, pixels.tobytes())
  resized = cykooz_resizer.ImageData(size[1], size[0], _RGB)
  _thread.resizer.resize(source, resized, _BICUBIC)
  return np.frombuffer(resized.get_buffer(), np.uint8).reshape(*size, 3)
