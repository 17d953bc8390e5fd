# SPDX-License-Identifier: Apache-2.0
"""High resolution: a picture becomes sub-images of the encoder's size, and an overview.

MM1 (section 4.1) cuts every picture alike: 1344 x 1344 pixels are 2 x 2 sub-images of 672 and the
whole, 5 x 144 = 720 tokens. MM1.5 (arXiv 2409.20566, section 4.5) chooses the grid that suits the
picture. To the rest of the pipeline each sub-image is a picture of its own, one after another.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np

from mm1_jax.config import TilingConfig
from mm1_jax.data.image import decode_image, read_header

WHOLE = (1, 1)


class Tile(NamedTuple):
  """A part of a picture: number 0, 1, ... row by row in a grid of (rows, columns)."""

  image: bytes
  grid: tuple[int, int]
  number: int
  fit: Literal["squash", "pad"]


def choose_grid(
  size: tuple[int, int], tile_size: tuple[int, int], cfg: TilingConfig
) -> tuple[int, int]:
  """Returns the rows and columns that a picture is cut into.

  For each grid the picture is resized to fit it, its aspect kept. Of the grids that hold it without
  making it smaller, the one with the least padding is taken; else the one that loses the fewest
  pixels (MM1.5, section 4.5). Among equals it is the one with the fewest sub-images, then the
  fewest rows; the paper does not say.

  Args:
    size: height and width of the picture.
    tile_size: of a sub-image.
    cfg: which grids there are.
  """
  if cfg.grid is not None:
    return cfg.grid
  best, best_key = WHOLE, None
  for grid in candidate_grids(cfg):
    room = grid[0] * tile_size[0], grid[1] * tile_size[1]
    scale = min(Fraction(room[0], size[0]), Fraction(room[1], size[1]))
    area = scale * scale * size[0] * size[1]
    # Exact numbers: a tie is a tie. What holds the picture comes before what does not.
    loss = room[0] * room[1] - area if scale >= 1 else size[0] * size[1] - area
    key = (scale < 1, loss, grid[0] * grid[1], grid[0])
    if best_key is None or key < best_key:
      best, best_key = grid, key
  return best


def candidate_grids(cfg: TilingConfig) -> list[tuple[int, int]]:
  """Returns all (rows, columns) of `min_tiles` to `max_tiles` sub-images."""
  sides = range(1, cfg.max_tiles + 1)
  return [
    (rows, columns)
    for rows, columns in itertools.product(sides, sides)
    if cfg.min_tiles <= rows * columns <= cfg.max_tiles
  ]


@dataclasses.dataclass(frozen=True)
class Tiler:
  """Cuts the pictures of an example.

  Args:
    cfg: how.
    tile_size: height and width of a sub-image, the encoder's.
    fit: how a picture gets the size of a fixed grid; chosen grids pad.
  """

  cfg: TilingConfig
  tile_size: tuple[int, int]
  fit: Literal["squash", "pad"] = "squash"

  def cut(self, contents: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Returns items with `Tile`s in place of pictures, over all contents of one example."""
    num = sum("image" in item for items in contents for item in items)
    first = 0 if num <= self.cfg.max_images else num
    first = first if self.cfg.last is None else max(0, num - self.cfg.last)
    numbers = itertools.count()
    return [
      [part for item in items for part in self._cut_item(item, numbers, first)]
      for items in contents
    ]

  def _cut_item(self, item: Any, numbers: Any, first: int) -> list[Any]:
    """Returns the items that replace one: of pictures from number `first` on, their parts."""
    if "image" not in item:
      return [item]
    number = next(numbers)
    return [item] if number < first else self._cut_picture(item["image"], number)

  def _cut_picture(self, image: bytes, number: int) -> list[Any]:
    grid = choose_grid(read_header(image)[0], self.tile_size, self.cfg)
    fit = self.fit if self.cfg.grid is not None else "pad"
    whole = [({"image": Tile(image, WHOLE, 0, fit)}, (0, 0))]
    places = itertools.product(range(1, grid[0] + 1), range(1, grid[1] + 1))
    parts = [({"image": Tile(image, grid, i, fit)}, at) for i, at in enumerate(places)]
    if grid == WHOLE:
      parts = whole
    elif self.cfg.overview != "none":
      parts = parts + whole if self.cfg.overview == "last" else whole + parts
    if self.cfg.marks == "none":
      return [part for part, _ in parts]
    mark = _index if self.cfg.marks == "index" else _separator
    marked, before = [], None
    for part, at in parts:
      text = mark(number, at, before)
      marked += [{"text": text}, part] if text else [part]
      before = at
    return marked


def _index(number: int, at: tuple[int, int], _: tuple[int, int] | None) -> str:
  """Returns (image, row, column) from 0, 1, 1 on; rows and columns of the overview are 0."""
  return f"({number},{at[0]},{at[1]})"


def _separator(_: int, at: tuple[int, int], before: tuple[int, int] | None) -> str:
  """Returns the separator between a sub-image and the one before: of column, row or overview."""
  if before is None:
    return ""
  if (0, 0) in (at, before):
    return ":"
  return "," if at[0] == before[0] else "\n"


def decode_pictures(
  images: Sequence[bytes | Tile],
  size: tuple[int, int],
  *,
  fit: Literal["squash", "pad"],
  max_pixels: int,
) -> Iterator[np.ndarray]:
  """Yields uint8[H, W, 3] for each picture or part of one; a grid is decoded once.

  Raises:
    ImageError: as `decode_image`.
  """
  last, parts = None, []
  for image in images:
    if isinstance(image, bytes):
      yield decode_image(image, size, fit=fit, max_pixels=max_pixels)
      continue
    if last is None or last[0] is not image.image or last[1] != image.grid:
      last = image.image, image.grid
      parts = _decode_grid(image, size, max_pixels)
    yield parts[image.number]


def _decode_grid(tile: Tile, size: tuple[int, int], max_pixels: int) -> list[np.ndarray]:
  """Returns all sub-images of a grid, row by row."""
  (rows, columns), (height, width) = tile.grid, size
  whole = decode_image(
    tile.image, (rows * height, columns * width), fit=tile.fit, max_pixels=max_pixels
  )
  parts = whole.reshape(rows, height, columns, width, 3).swapaxes(1, 2)
  return list(parts.reshape(rows * columns, height, width, 3))
