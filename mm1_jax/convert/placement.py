# SPDX-License-Identifier: Apache-2.0
"""A mesh for params alone, where no batch has to fit."""

import dataclasses

import jax
from jax.sharding import Mesh

from mm1_jax.config import ConfigError, MeshConfig, RunConfig
from mm1_jax.convert import ConvertError
from mm1_jax.sharding import make_mesh


def params_mesh(run: RunConfig, fsdp: int = -1) -> Mesh:
  """Returns a mesh whose `fsdp` axis has so many devices; -1 takes all there are.

  Raises:
    ConvertError: there are not as many, or the params do not divide over them.
  """
  num = jax.device_count() if fsdp == -1 else fsdp
  # Rows are not of interest, only the params have to divide.
  fitted = dataclasses.replace(
    run,
    mesh=MeshConfig(fsdp=num),
    data=dataclasses.replace(run.data, batch_size=num),
    train=dataclasses.replace(run.train, accumulation_steps=1),
  )
  try:
    return make_mesh(fitted, jax.devices()[:num])
  except ConfigError as e:
    raise ConvertError(f"{e} --fsdp=1 puts all params on one device.") from e
