# SPDX-License-Identifier: Apache-2.0
"""The run that is exported: its config, tokenizer and params, of which little is read at once.

A stacked param, such as `decoder.units.layers.0.mlp.gate` of all units, is read as `ParamPart`s,
one for each block of the stack. So a model that is larger than the host's memory can be exported.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mm1_jax import checkpoint
from mm1_jax.checksum import host_sum, to_hex
from mm1_jax.config import MeshConfig, RunConfig
from mm1_jax.convert import ConvertError
from mm1_jax.data.examples import Encoder, make_encoder
from mm1_jax.data.tokenizer import Tokenizer
from mm1_jax.inference.answers import Answers, answers
from mm1_jax.inference.model import abstract_params
from mm1_jax.models.mm1 import IN_FLOAT32, MM1
from mm1_jax.sharding import abstract_state, make_params_mesh

STACKS = ("decoder.units", "vit.blocks")
# Bytes of a stacked param that are read at once, or of one block of it if that is more. As many
# again may be in memory where a checkpoint was saved with larger chunks than blocks.
READ_BYTES = 1 << 30


class ParamPart(NamedTuple):
  """A param by its name in a checkpoint; or one block of it, where it is stacked."""

  name: str
  block: int | None
  shape: tuple[int, ...]  # without the stack's dim

  @property
  def path(self) -> str:
    """Its name with the block's number in it: `decoder.units.3.layers.0.mlp.gate`."""
    if self.block is None:
      return self.name
    stack = next(s for s in STACKS if self.name.startswith(f"{s}."))
    return f"{stack}.{self.block}{self.name.removeprefix(stack)}"

  @property
  def in_float32(self) -> bool:
    """Whether it is computed with in float32, whatever a model's dtype is."""
    return self.name.split(".")[-1] in IN_FLOAT32

  def cast(self, value: np.ndarray, dtype: str) -> np.ndarray:
    """Returns its value in bfloat16 if that is the dtype and computes no less; else in float32."""
    half = dtype == "bfloat16" and not self.in_float32
    return value.astype(ml_dtypes.bfloat16 if half else np.float32)


class RunReader:
  """A run to export.

  Args:
    path: a run's workdir, or a step's folder `checkpoints/STEP` in one.

  Attributes:
    run: its config, with the tokenizer that travels with it.
    workdir: where it is.
    step: number of the step that is exported.
    params: where they are.
    parts: all of them.

  Raises:
    CheckpointError, ConfigError: there is no run, or no checkpoint of it, or it is damaged.
    ConvertError: its adapters are not merged.
  """

  def __init__(self, path: epath.PathLike):
    path = checkpoint.absolute(path)
    step = path if (path / checkpoint.PARAMS).exists() else None
    self.workdir = path.parent.parent if step else path
    self.run: RunConfig = checkpoint.read_run(self.workdir)
    if self.run.model.decoder.lora is not None:
      raise ConvertError(
        f"'{path}' has LoRA adapters (model.decoder.lora); merge them first: python -m "
        f"mm1_jax.convert merge_lora --checkpoint={self.workdir} --out=NEW_RUN; then export that."
      )
    self.params = checkpoint.find_step(path) / checkpoint.PARAMS
    self.step = int(self.params.parent.name)
    wanted = checkpoint.to_names(_abstract(self.run))
    checkpoint.check_match(checkpoint.saved_shapes(self.params), wanted, self.params)
    self.parts = [part for name, x in wanted.items() for part in parts(name, x.shape)]
    self.tokenizer = Tokenizer(self.run.data.tokenizer)

  @property
  def num_params(self) -> int:
    return sum(int(np.prod(part.shape)) for part in self.parts)

  def num_blocks(self, name: str) -> int:
    """Returns how many parts a param has."""
    return sum(part.name == name for part in self.parts)

  def abstract(self, mesh: Mesh, dtype: str) -> MM1:
    """Returns the model's shapes on a mesh, in a dtype of params that float32 is not needed for."""
    cfg = dataclasses.replace(self.run.model, remat="none")
    model = abstract_state(lambda: MM1(jax.random.key(0), cfg), mesh)
    whole = {part.name for part in self.parts if part.in_float32}
    leaves = {
      name: jax.ShapeDtypeStruct(
        x.shape, jnp.float32 if name in whole else jnp.dtype(dtype), sharding=x.sharding
      )
      for name, x in checkpoint.to_names(model).items()
    }
    return checkpoint.from_names(model, leaves)

  def encoder(self) -> Encoder:
    """Returns the encoder of texts and pictures to ids, as in training."""
    return make_encoder(
      self.run.data,
      self.tokenizer,
      self.run.input_spec,
    )

  def answers(self) -> Answers:
    """Returns the tokens that the model may generate, as in `inference.model`."""
    return answers(self.encoder(), self.run.model.decoder.vocab_size)

  def read(self) -> Iterator[tuple[ParamPart, np.ndarray]]:
    """Yields all parts with their values, in the dtype that they are saved in.

    Raises:
      CheckpointError: the checkpoint is damaged.
      ConvertError: a param is not finite.
    """
    recorded = checkpoint.read_checksums(self.params.parent)
    checkpoint.warn_of_changes(self.params.parent, recorded)
    saved = recorded[checkpoint.ARRAYS][checkpoint.PARAMS] if recorded else {}
    for name in dict.fromkeys(part.name for part in self.parts):
      blocks = [part for part in self.parts if part.name == name]
      array = self._open(name)
      size = max(1, int(np.prod(blocks[0].shape)) * array.dtype.numpy_dtype.itemsize)
      at_once = max(1, READ_BYTES // size)
      sums, num_read = np.zeros(2, np.uint32), 0
      for start in range(0, len(blocks), at_once):
        group = blocks[start : start + at_once]
        for part, value in zip(group, self._read(array, name, group), strict=True):
          sums, num_read = sums + host_sum(value, num_read), num_read + value.size
          if not np.isfinite(value.astype(np.float32)).all():
            raise ConvertError(f"'{self.params}': {part.path} has values that are not finite.")
          yield part, value
      if name in saved and to_hex(sums) != saved[name].checksum:
        raise checkpoint.not_as_saved(self.params, [name])

  def _open(self, name: str) -> Any:
    try:
      return checkpoint.open_array(self.params, name)
    except Exception as e:
      raise checkpoint.damaged(f"{self.params}: {name}", e) from e

  def _read(self, array: Any, name: str, group: list[ParamPart]) -> list[np.ndarray]:
    try:
      first = group[0].block
      if first is None:
        return [array.read().result()]
      return list(array[first : first + len(group)].read().result())
    except Exception as e:
      raise checkpoint.damaged(f"{self.params}: {name}", e) from e


def _abstract(run: RunConfig) -> Any:
  """Returns the model's shapes, on a mesh of one device."""
  return abstract_params(run, make_params_mesh(run.model, MeshConfig(), jax.devices()[:1]))


def parts(name: str, shape: tuple[int, ...]) -> list[ParamPart]:
  """Returns the parts of a param of a checkpoint: one for each block, where it is stacked."""
  if not name.startswith(tuple(f"{stack}." for stack in STACKS)):
    return [ParamPart(name, None, shape)]
  return [ParamPart(name, i, shape[1:]) for i in range(shape[0])]
