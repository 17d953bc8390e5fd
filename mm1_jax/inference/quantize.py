# SPDX-License-Identifier: Apache-2.0
"""Weight-only quantisation by qwix: the blocks' matrices in int8 or int4, all else as it is.

Symmetric. In int8 each output channel has a scale; in int4 every `TILE` numbers that are summed
over have. Embedding, head, connector, norms and biases stay: they are few, or looked up.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mm1_jax import checkpoint, extras
from mm1_jax.config import ConfigError
from mm1_jax.inference import QUANTIZED
from mm1_jax.models.dequantize import SUMMED, Quantized
from mm1_jax.models.mm1 import MM1

TILE = 32
STACKS = ("decoder.units.", "vit.blocks.")


def check(kind: str) -> None:
  """Checks that weights can be quantised so, before they are loaded.

  Raises:
    ConfigError: there is no such kind.
    UserError: qwix is not installed.
  """
  if kind not in QUANTIZED:
    raise ConfigError(f"quantize is '{kind}'; it must be one of {', '.join(QUANTIZED)}.")
  extras.require("quant")


def quantize(model: MM1, kind: str, mesh: Mesh) -> MM1:
  """Returns the model with the matrices of its blocks quantised, on the same devices.

  Raises:
    UserError: as `check`.
  """
  check(kind)
  leaves: dict[str, Any] = checkpoint.to_names(model)
  for name, x in leaves.items():
    dims = SUMMED.get(name.split(".")[-1])
    if dims is not None and name.startswith(STACKS):
      leaves[name] = _quantize(x, dims, kind, mesh)
  return checkpoint.from_names(model, leaves)


def _quantize(x: jax.Array, summed: tuple[int, ...], kind: str, mesh: Mesh) -> Quantized:
  """Returns one stack of matrices quantised, block by block, on the host."""
  import qwix

  shape = x.shape[1:]
  dims = [dim % len(shape) for dim in summed]
  tiled = {}
  if kind == "int4":
    # Of several dims the last is tiled, and the others have scales of their own.
    size = shape[dims[-1]]
    tiled = {dims[-1]: TILE if size % TILE == 0 else size}
    dims = dims[-1:]
  channels = [dim for dim in range(len(shape)) if dim not in dims]
  values, scales = [], []
  for block in range(x.shape[0]):
    q = qwix.quantize(
      jnp.asarray(np.asarray(x[block], np.float32)),
      getattr(jnp, kind),
      channelwise_axes=channels,
      tiled_axes=tiled,
    )
    values.append(np.asarray(q.qvalue))
    scales.append(np.asarray(q.scale))
  assert isinstance(x.sharding, NamedSharding)
  return Quantized(
    jax.device_put(np.stack(values), x.sharding),
    jax.device_put(np.stack(scales), NamedSharding(mesh, P())),
  )
