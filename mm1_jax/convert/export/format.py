# SPDX-License-Identifier: Apache-2.0
"""What each export format has to implement."""

import pathlib
from typing import NamedTuple, Protocol

from mm1_jax.convert.export.run_reader import RunReader


class ExportOptions(NamedTuple):
  """What the command line says besides the run and the folder."""

  dtype: str = "bfloat16"  # float32, bfloat16 or int8
  max_shard_gb: float = 5.0  # of a file of weights


class ExportFormat(Protocol):
  """A module with these; it is listed in `exporter.FORMATS`."""

  DTYPES: tuple[str, ...]  # those that weights can have

  def check(self, reader: RunReader, options: ExportOptions) -> None:
    """Raises ConvertError naming what of the run this format cannot express; writes nothing."""
    ...

  def write(self, reader: RunReader, out: pathlib.Path, options: ExportOptions) -> None:
    """Writes all files but the manifest into the empty folder `out`."""
    ...

  def compare(self, reader: RunReader, out: pathlib.Path, options: ExportOptions) -> str:
    """Reads `out` back and returns in a line what was compared and how it agrees.

    Raises:
      ConvertError: it does not agree.
    """
    ...
