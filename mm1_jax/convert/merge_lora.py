# SPDX-License-Identifier: Apache-2.0
"""A run with LoRA adapters to one without: the same model, with the adapters in its matrices.

A run with adapters can answer unmerged; merged it answers without computing the sums anew for every
token, can be exported, and can start another stage.
"""

import dataclasses
import pathlib

import jax
from etils import epath

from mm1_jax import checkpoint
from mm1_jax.convert import unfinished
from mm1_jax.convert.placement import params_mesh
from mm1_jax.models import lora
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import abstract_state


def merge(model: MM1) -> MM1:
  """Returns the model that is equal to one with adapters, without them."""
  model = jax.tree.map(lambda x: x, model)  # a copy
  units = model.decoder.units
  units.layers = type(units.layers)([jax.vmap(lora.merge)(layer) for layer in units.layers])
  return model


def merge_run(path: epath.PathLike, out: epath.PathLike, *, fsdp: int = -1) -> None:
  """Writes a run to `out` with the newest params of the run at `path`, merged.

  Raises:
    CheckpointError: there is none, it has no adapters, or there is a run at `out` already.
    ConvertError: its params do not divide over the `fsdp` devices.
  """
  run = checkpoint.read_run(path)
  if run.model.decoder.lora is None:
    raise checkpoint.CheckpointError(f"'{path}' has no adapters: model.decoder.lora is None.")
  checkpoint.refuse_run(out)
  mesh = params_mesh(run, fsdp)
  with jax.set_mesh(mesh):
    like = abstract_state(lambda: MM1(jax.random.key(0), run.model), mesh)
    params = jax.jit(merge)(checkpoint.restore_params(path, like))
  step = int(checkpoint.find_step(path).name)
  decoder = dataclasses.replace(run.model.decoder, lora=None)
  model = dataclasses.replace(run.model, decoder=decoder)
  with unfinished.folder(pathlib.Path(out)) as working:
    checkpoint.save_params(working, step, checkpoint.to_names(params))
    checkpoint.write_run_files(working, dataclasses.replace(run, model=model))
