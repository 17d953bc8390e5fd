# SPDX-License-Identifier: Apache-2.0
"""A run with params alone, which this package reads: `--format=orbax`.

A third of a run's checkpoint, or a sixth in bfloat16, where what is computed with in float32 stays
float32. It answers like the run, and starts others with `train.init_from`.
"""

import pathlib

import numpy as np

from mm1_jax import checkpoint
from mm1_jax.convert import ConvertError
from mm1_jax.convert.export import card
from mm1_jax.convert.export.folder import published
from mm1_jax.convert.export.format import ExportOptions
from mm1_jax.convert.export.run_reader import RunReader
from mm1_jax.convert.placement import params_mesh

DTYPES: tuple[str, ...] = ("float32", "bfloat16")
USE = """\
A run of mm1_jax, without what only training needs:

```
python -m mm1_jax.inference.generate --checkpoint=FOLDER --image=photo.jpg --prompt="..."
python -m mm1_jax.main --config=... --config.train.init_from=FOLDER
```
"""


def check(reader: RunReader, options: ExportOptions) -> None:
  """Raises nothing: every model of ours can be written."""


def write(reader: RunReader, out: pathlib.Path, options: ExportOptions) -> None:
  like = reader.abstract(params_mesh(reader.run), options.dtype)
  params = checkpoint.restore_params(reader.params.parent, like)
  checkpoint.save_params(out, reader.step, checkpoint.to_names(params))
  checkpoint.write_run_files(out, published(reader.run))
  (out / card.NAME).write_text(card.text(reader, options, USE))


def compare(reader: RunReader, out: pathlib.Path, options: ExportOptions) -> str:
  for (part, read), (_, value) in zip(RunReader(out).read(), reader.read(), strict=True):
    if not np.array_equal(read, value.astype(read.dtype)):
      raise ConvertError(f"'{out}': {part.path} is not what was written; is the disk full?")
  return f"{len(reader.parts)} arrays read back, equal to the run's"
