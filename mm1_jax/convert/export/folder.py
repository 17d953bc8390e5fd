# SPDX-License-Identifier: Apache-2.0
"""Safetensors under our own names, with what it takes to use them: `--format=safetensors`.

The folder is laid out like a run, with params in model.safetensors instead of `checkpoints/`:
`config.json`, the tokenizer, `chat_template.json`, and a model card. A tensor has the name and
shape of ours, a stack's blocks apart: `decoder.units.3.layers.0.mlp.gate`. In bfloat16, what is
computed with in float32 stays float32. In int8 a matrix is NAME (int8) and NAME.int8_scale.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np

from mm1_jax import checkpoint
from mm1_jax.config import RunConfig
from mm1_jax.convert import ConvertError
from mm1_jax.convert.export import card, int8, shards
from mm1_jax.convert.export.format import ExportOptions
from mm1_jax.convert.export.run_reader import ParamPart, RunReader
from mm1_jax.convert.families import WeightPiece
from mm1_jax.convert.layouts import SAME
from mm1_jax.convert.tensors import INT8_SCALE, Tensors

DTYPES: tuple[str, ...] = ("float32", "bfloat16", "int8")
USE = """\
Names, shapes and orientation are mm1_jax's own; `config.json` and the tokenizer are beside them. To
run or train it there:

```
python -m mm1_jax.convert import --export=FOLDER --out=runs/mine
python -m mm1_jax.inference.generate --checkpoint=runs/mine --image=photo.jpg --prompt="..."
```

Anywhere else, read `model.safetensors` (or its shards, by the index). In int8, a matrix is NAME
times NAME.int8_scale, float32, which has one number for each output channel.
"""


def check(reader: RunReader, options: ExportOptions) -> None:
  """Raises nothing: every model of ours can be written."""


def write(reader: RunReader, out: pathlib.Path, options: ExportOptions) -> None:
  checkpoint.write_run_files(out, published(reader.run))
  (out / checkpoint.TEMPLATE).write_text(reader.encoder().template.to_json())
  (out / card.NAME).write_text(card.text(reader, options, USE))
  shards.write(_tensors(reader, options.dtype), out, options.max_shard_gb, {"format": "mm1_jax"})


def compare(reader: RunReader, out: pathlib.Path, options: ExportOptions) -> str:
  tensors = Tensors(out)
  for part, value in reader.read():
    made_of = piece(tensors, part)
    read = made_of.layout.load([tensors.read(name) for name in made_of.theirs], part.shape)
    read, value = read.astype(np.float32), value.astype(np.float32)
    dims = int8.summed_dims(part) if options.dtype == "int8" else None
    if dims is not None:
      # Half a scale, and what float32 rounds.
      bound = np.max(np.abs(value), axis=dims, keepdims=True) / 127 * 0.5001
      wrong = bool((np.abs(read - value) > bound).any())
    else:
      wrong = not np.array_equal(read, part.cast(value, options.dtype).astype(np.float32))
    if wrong:
      raise ConvertError(f"'{out}': {part.path} is not what was written; is the disk full?")
  how = "equal to the run's" if options.dtype != "int8" else "within half a step of the run's"
  return f"{len(reader.parts)} tensors read back, {how}"


def published(run: RunConfig) -> RunConfig:
  """Returns a run's config without where its data and its ancestors lay."""
  data = dataclasses.replace(run.data, sources=(), eval_sources=(), reweight=())
  train = dataclasses.replace(run.train, init_from=None)
  return dataclasses.replace(run, data=data, eval_tasks=(), train=train)


def piece(tensors: Tensors, part: ParamPart) -> WeightPiece:
  """Returns what a part of ours is made of in such a folder."""
  at = () if part.block is None else (part.block,)
  dims = int8.summed_dims(part)
  if dims is None or part.path + INT8_SCALE not in tensors:
    return WeightPiece(part.name, at, (part.path,), SAME)
  return WeightPiece(part.name, at, (part.path, part.path + INT8_SCALE), int8.Int8Layout(dims))


def _tensors(reader: RunReader, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
  for part, value in reader.read():
    dims = int8.summed_dims(part) if dtype == "int8" else None
    if dims is None:
      yield part.path, part.cast(value, dtype)
    else:
      quantized, scale = int8.quantize(value, dims)
      yield part.path, quantized
      yield part.path + INT8_SCALE, scale
