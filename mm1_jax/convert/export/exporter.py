# SPDX-License-Identifier: Apache-2.0
"""The steps of an export: check the run, write, read back, compare, sign.

The code of each format is in a module of its own, with the functions that `format.py` asks for.
"""

import pathlib
import time

from absl import logging
from etils import epath

from mm1_jax.convert import ConvertError, unfinished
from mm1_jax.convert.export import folder, huggingface, llava, manifest, orbax, stablehlo
from mm1_jax.convert.export.format import ExportFormat, ExportOptions
from mm1_jax.convert.export.run_reader import RunReader

FORMATS: dict[str, ExportFormat] = {
  "safetensors": folder,
  "huggingface": huggingface,
  "llava": llava,
  "stablehlo": stablehlo,
  "orbax": orbax,
}


def export(path: epath.PathLike, out: pathlib.Path, name: str, options: ExportOptions) -> str:
  """Exports a run, or one of its steps, and returns what was compared.

  `out` has its name only when it is whole, compared and signed.

  Raises:
    ConvertError: the format cannot express the run, or `out` is not empty, or what was written
      differs from the run.
    CheckpointError, ConfigError, DataError: the run cannot be read.
  """
  form = FORMATS[name]
  if options.dtype not in form.DTYPES:
    raise ConvertError(
      f"--format={name} has no --dtype={options.dtype}; it has {', '.join(form.DTYPES)}."
    )
  if options.max_shard_gb <= 0:
    raise ConvertError(f"--max-shard-gb={options.max_shard_gb:g} must be positive.")
  unfinished.refuse(out)
  reader = RunReader(path)
  form.check(reader, options)
  logging.info("exporting step %d, %.3g params, as %s", reader.step, reader.num_params, name)
  with unfinished.folder(out) as working:
    return _write(reader, working, name, options)


def _write(reader: RunReader, out: pathlib.Path, name: str, options: ExportOptions) -> str:
  """Writes, compares and signs; returns what was compared."""
  form, start = FORMATS[name], time.perf_counter()
  form.write(reader, out, options)
  logging.info("written in %.0f s; reading it back", time.perf_counter() - start)
  compared = form.compare(reader, out, options)
  facts = {"format": name, "dtype": options.dtype, "run": reader.run.name, "step": reader.step}
  manifest.write(out, {**facts, "compared": compared})
  return compared
