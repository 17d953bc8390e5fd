# SPDX-License-Identifier: Apache-2.0
"""Resizes pictures by a vectorised convolution, to memory that each thread keeps."""

import threading

import cykooz_resizer
import numpy as np

# Catmull-Rom is what Pillow calls bicubic.
_BICUBIC = cykooz_resizer.ResizeOptions(
  resize_alg=cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.catmull_rom),
  use_alpha=False,
)
_RGB = cykooz_resizer.PixelType.U8x3


class _Scratch(threading.local):
  """What a thread uses for picture after picture: new memory each time costs a third more."""

  def __init__(self):
    self.resizer = cykooz_resizer.Resizer()
    self._resized = cykooz_resizer.ImageData(1, 1, _RGB)

  def for_resizing(self, size: tuple[int, int]) -> cykooz_resizer.ImageData:
    """Returns memory for the resizer to write to."""
    if (self._resized.height, self._resized.width) != size:
      self._resized = cykooz_resizer.ImageData(size[1], size[0], _RGB)
    return self._resized


_scratch = _Scratch()


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Returns a picture of another size: bicubic with antialiasing.

  Args:
    pixels: uint8[H, W, 3].
    size: height and width to resize to.

  Returns:
    uint8 of `size` and 3; not to be written to, and overwritten by this thread's next call.
  """
  height, width = pixels.shape[:2]
  image = cykooz_resizer.ImageData(width, height, _RGB, pixels.tobytes())
  if height < size[0]:
    # The resizer would begin with the height, as suits pictures that become smaller. The other
    # way round, the width, which costs more, is resized in fewer rows.
    wide = cykooz_resizer.ImageData(size[1], height, _RGB)
    _scratch.resizer.resize(image, wide, _BICUBIC)
    image = wide
  resized = _scratch.for_resizing(size)
  _scratch.resizer.resize(image, resized, _BICUBIC)
  return np.frombuffer(resized.get_buffer(), np.uint8).reshape(*size, 3)
