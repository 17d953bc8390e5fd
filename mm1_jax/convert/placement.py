# SPDX-License-Identifier: Apache-2.0
"""A mesh for params alone, where no batch has to fit."""

import jax
from jax.sharding import Mesh

from mm1_jax.config import ConfigError, MeshConfig, RunConfig
from mm1_jax.convert import ConvertError
from mm1_jax.sharding import make_params_mesh


def params_mesh(run: RunConfig, fsdp: int = -1) -> Mesh:
  """Returns a mesh whose `fsdp` axis has so many devices; -1 takes all there are.

  Raises:
    ConvertError: there are not as many, or the params do not divide over them.
  """
  num = jax.device_count() if fsdp == -1 else fsdp
  try:
    return make_params_mesh(run.model, MeshConfig(fsdp=num), jax.devices()[:num])
  except ConfigError as e:
    raise ConvertError(f"{e} --fsdp=1 puts all params on one device.") from e
