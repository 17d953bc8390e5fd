# SPDX-License-Identifier: Apache-2.0
"""Image bytes to pixels."""

import io

import numpy as np
import PIL.Image
import PIL.ImageOps

# A picture of more pixels than this is taken for an attack or a mistake: 64 MP decodes to 192 MB.
MAX_PIXELS = 64_000_000


class ImageError(ValueError):
  """An image that cannot be used; `reason` is short and the same for images of one kind."""

  def __init__(self, reason: str):
    super().__init__(reason)
    self.reason = reason


def decode_image(data: bytes, size: tuple[int, int]) -> np.ndarray:
  """Decodes an image, upright and on white, and resizes it without keeping its aspect ratio.

  Bicubic with antialiasing, as CLIP-like encoders expect ("squash" in open_clip).

  Args:
    data: an encoded image of any format that Pillow reads; of an animation, the first frame.
    size: height and width in pixels.

  Returns:
    uint8[H, W, 3], RGB.

  Raises:
    ImageError: the bytes are no whole image, or it has more than `MAX_PIXELS` pixels.
  """
  height, width = size
  try:
    with PIL.Image.open(io.BytesIO(data)) as image:
      if image.width * image.height > MAX_PIXELS:
        raise ImageError("image too large")
      # A JPEG decoder can skip detail that the resize would drop; twice the size loses nothing.
      image.draft("RGB", (2 * width, 2 * height))
      image = on_white(PIL.ImageOps.exif_transpose(image))
    return np.asarray(image.resize((width, height), PIL.Image.Resampling.BICUBIC))
  except PIL.Image.DecompressionBombError as e:
    raise ImageError("image too large") from e
  except ImageError:
    raise
  except (
    Exception
  ) as e:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
    raise ImageError("unreadable image") from e


def on_white(image: PIL.Image.Image) -> PIL.Image.Image:
  """Returns `image` in RGB, its transparent parts white."""
  if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
    image = image.convert("RGBA")
    white = PIL.Image.new("RGBA", image.size, "white")
    image = PIL.Image.alpha_composite(white, image)
  return image.convert("RGB")
