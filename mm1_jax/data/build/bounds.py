# SPDX-License-Identifier: Apache-2.0
"""How much of a stranger's file is held in memory at once; each bound is a flag of the build."""

from typing import NamedTuple


class Bounds(NamedTuple):
  """In bytes; what is larger is dropped and counted, and not read."""

  row: int = 64_000_000  # a longer row is a mistake, and would not fit a small worker
  header: int = 64_000  # of a tar: a member's long name and the like
  page: int = 256_000_000  # of Parquet, decompressed whole
  file: int = 64_000_000_000  # decompressed; of a file that is read whole, in memory
  window: int = 1 << 31  # of zstd and xz, kept in memory; `zstd --long=31` makes one of this size
  held: int = 256_000_000  # of pictures of an unsorted tar that wait for their captions


BOUNDS = Bounds()
ROW_TOO_LONG = "row above --max-row-mb"
HEADER_TOO_LONG = "tar header above --max-header-kb"
PAGE_TOO_LARGE = "Parquet page above --max-page-mb"
WINDOW_TOO_LARGE = "window of zstd or xz above --max-window-mb"
FILE_TOO_LARGE = "file above --max-file-gb"
