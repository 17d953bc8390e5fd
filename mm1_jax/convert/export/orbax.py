# SPDX-License-Identifier: Apache-2.0
"""A run of params alone, which this package reads: `--format=orbax`.

A third of a run's checkpoint, or a sixth in bfloat16, where what is computed with in float32 stays
float32. It answers like the run, and starts others with `train.init_from`.
"""

import pathlib

import numpy as np

from mm1_jax import checkpoint
from mm1_jax.convert import ConvertError
from mm1_jax.convert.export import card
from mm1_jax.convert.export.folder import published
from mm1_jax.convert.export.format import Options
from mm1_jax.convert.export.source import Source
from mm1_jax.convert.placement import params_mesh

DTYPES: tuple[str, ...] = ("float32", "bfloat16")
USE = """\
A run of mm1_jax, without what only training needs:

```
python -m mm1_jax.inference.generate --checkpoint=FOLDER --image=photo.jpg --prompt="..."
python -m mm1_jax.main --config=... --config.train.init_from=FOLDER
```
"""


def check(source: Source, options: Options) -> None:
  """Raises nothing: every model of ours can be written."""


def write(source: Source, out: pathlib.Path, options: Options) -> None:
  like = source.abstract(params_mesh(source.run), options.dtype)
  params = checkpoint.restore_params(source.params.parent, like)
  checkpoint.save_params(out, source.step, checkpoint.to_names(params))
  checkpoint.write_run_files(out, published(source.run))
  (out / card.NAME).write_text(card.text(source, options, USE))


def compare(source: Source, out: pathlib.Path, options: Options) -> str:
  for (part, read), (_, value) in zip(Source(out).read(), source.read(), strict=True):
    if not np.array_equal(read, value.astype(read.dtype)):
      raise ConvertError(f"'{out}': {part.path} is not what was written; is the disk full?")
  return f"{len(source.parts)} arrays read back, equal to the run's"
