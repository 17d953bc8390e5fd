# SPDX-License-Identifier: Apache-2.0
"""Pictures to pixels, as MM1 was trained on them, with NumPy and Pillow alone."""

import io

import numpy as np
import PIL.ExifTags
import PIL.Image

PAD_COLOR = (123, 117, 104)  # CLIP's mean: 0 to the encoder
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "JPEG2000")
# What makes a picture of each orientation upright (EXIF 2.32, tag 274).
_TRANSPOSE = PIL.Image.Transpose
_TURNS = {
  2: _TRANSPOSE.FLIP_LEFT_RIGHT,
  3: _TRANSPOSE.ROTATE_180,
  4: _TRANSPOSE.FLIP_TOP_BOTTOM,
  5: _TRANSPOSE.TRANSPOSE,
  6: _TRANSPOSE.ROTATE_270,
  7: _TRANSPOSE.TRANSVERSE,
  8: _TRANSPOSE.ROTATE_90,
}


class Picture:
  """A picture in any form: a path, a URL, encoded bytes, base64, a PIL image, uint8[H, W, 3]."""

  def __init__(self, image, max_pixels: int):
    self._image, self._data = None, None
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
      from transformers.image_utils import load_image

      image = load_image(image)
    if isinstance(image, np.ndarray):
      image = PIL.Image.fromarray(image)
    if isinstance(image, PIL.Image.Image):
      self._image = image
    elif isinstance(image, bytes):
      self._data = image
    else:
      with open(image, "rb") as file:
        self._data = file.read()
    opened = self._open()
    if opened.width * opened.height > max_pixels:
      raise ValueError(
        f"a picture of {opened.width} x {opened.height} is above {max_pixels} pixels."
      )
    # height, width
    self.size = opened.size if _orientation(opened) > 4 else opened.size[::-1]

  def decode(self, size, fit: str):
    """Returns uint8[H, W, 3], upright, on white, of `size`."""
    image = self._open()
    turn = _TURNS.get(_orientation(image))
    if self._image is None:
      # A JPEG is read at a size that it is made smaller from, not at its own.
      image.draft("RGB", (2 * max(size),) * 2)
    pixels = np.asarray(on_white(image if turn is None else image.transpose(turn)))
    if fit == "squash":
      return resize(pixels, size)
    scale = min(size[0] / pixels.shape[0], size[1] / pixels.shape[1])
    height, width = (max(1, round(scale * side)) for side in pixels.shape[:2])
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    padded = np.full((*size, 3), PAD_COLOR, np.uint8)
    padded[top : top + height, left : left + width] = resize(pixels, (height, width))
    return padded

  def _open(self):
    if self._image is not None:
      return self._image
    return PIL.Image.open(io.BytesIO(self._data), formats=FORMATS)


def _orientation(image):
  """Returns 1 to 8, as a picture's EXIF has it; 1, upright, if that is damaged or of no sense."""
  if image.format == "TIFF":  # Pillow turns those itself
    return 1
  try:
    value = image.getexif().get(PIL.ExifTags.Base.Orientation)
    return next((number for number in range(1, 9) if value == number), 1)
  except Exception:  # Pillow's readers of EXIF raise many types
    return 1


def on_white(image):
  """Returns a picture in RGB, its transparent parts white."""
  if image.mode in ("I", "F"):
    raise ValueError(f"a picture of mode {image.mode} has no colours.")
  if image.mode.startswith("I;16"):
    image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
    image = image.convert("RGBA")
    image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
  return image.convert("RGB")


def resize(pixels, size):
  """Resizes uint8[h, w, C] bicubically, down first and then across, in fixed-point numbers.

  That is what training's library computes, to the last bit; Pillow goes across first, and differs
  by a few levels where that clips.
  """
  for axis, side in enumerate(size):
    if pixels.shape[axis] == side:
      continue
    taps, weights, bits = _kernel(pixels.shape[axis], side)
    source = np.moveaxis(pixels, axis, 0)
    out = np.full((side, *source.shape[1:]), 1 << (bits - 1), np.int32)
    for tap, weight in zip(taps.T, weights.T, strict=True):
      out += source[tap].astype(np.int32) * weight[:, None, None]
    pixels = np.moveaxis(np.clip(out >> bits, 0, 255).astype(np.uint8), 0, axis)
  return np.ascontiguousarray(pixels)


def _kernel(num, side):
  """Returns which of `num` pixels make each of `side`, int[side, k], their weights, and the bits.

  Weights are Catmull-Rom's, rounded to 16-bit numbers with as many bits after the point as fit.
  """
  scale = num / side
  wide = max(scale, 1.0)
  centres = (np.arange(side) + 0.5) * scale
  first = np.maximum(0, np.floor(centres - 2 * wide)).astype(int)
  last = np.minimum(num, np.ceil(centres + 2 * wide)).astype(int)
  taps = first[:, None] + np.arange((last - first).max())
  x = np.abs((taps - centres[:, None] + 0.5) / wide)
  near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
  weights = np.where(x < 1, near, np.where(x < 2, far, 0)) * (taps < last[:, None])
  weights /= weights.sum(axis=1, keepdims=True)
  bits = 0
  while bits < 21 and np.floor(weights.max() * (1 << (bits + 1)) + 0.5) < 1 << 15:
    bits += 1
  rounded = np.floor(np.abs(weights) * (1 << bits) + 0.5) * np.sign(weights)
  return np.minimum(taps, num - 1), rounded.astype(np.int32), bits
