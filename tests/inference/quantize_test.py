# SPDX-License-Identifier: Apache-2.0
"""Weight-only quantisation: how far numbers move, what stays, and that the model still runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm1_jax import checkpoint
from mm1_jax.config import ConfigError
from mm1_jax.inference.model import Model
from mm1_jax.inference.quantize import TILE, quantize
from mm1_jax.models.dequantize import SUMMED, Quantized, dequantize
from tests.helpers import tiny
from tests.helpers.runs import run_config

pytestmark = pytest.mark.compiles

pytest.importorskip("qwix")


@pytest.mark.parametrize(("kind", "most"), [("int8", 127), ("int4", 7)])
def test_numbers_are_within_half_a_step(moe, kind, most):
  """The scales are those of float64: the largest of a channel, or of a tile, over the steps."""
  mesh = tiny.mesh()
  with jax.set_mesh(mesh):
    small = quantize(moe, kind, mesh)
    back = checkpoint.to_names(jax.jit(dequantize)(small))
  num = 0
  for name, x in checkpoint.to_names(moe).items():
    last = name.split(".")[-1]
    if not (name.startswith(("decoder.units.", "vit.blocks.")) and last in SUMMED):
      assert np.array_equal(x, back[name]), name
      continue
    num += 1
    x, y = np.asarray(x, np.float64), np.asarray(back[name], np.float64)
    dims = SUMMED[last]
    if kind == "int4":
      size, dim = x.shape[dims[-1]], x.ndim + dims[-1]
      tile = TILE if size % TILE == 0 else size
      shape = (*x.shape[:dim], size // tile, tile, *x.shape[dim + 1 :])
      x, y, dims = x.reshape(shape), y.reshape(shape), (dim + 1,)
    # qwix's int4 and int8 reach from -most - 0.5 to most + 0.5.
    step = np.abs(x).max(axis=dims, keepdims=True) / most
    assert (np.abs(x - y) <= 0.51 * step).all(), name
    assert np.abs(x - y).max() > 0, name
  assert num == 2 * 7 + 6


def test_matrices_are_stored_in_their_kind(moe):
  mesh = tiny.mesh()
  small = quantize(moe, "int8", mesh)
  gate = small.decoder.units.layers[1].mlp.gate.get_value()
  assert isinstance(gate, Quantized)
  assert gate.values.dtype == jnp.int8
  assert gate.scales.shape == (1, 4, 1, 24)  # units, experts, one for the width, mlp


@pytest.mark.slow
def test_it_answers_also_on_two_devices(workdir):
  """Fails if scales do not follow their values over the mesh."""
  one = Model.load(workdir, quantize="int8")
  two = Model.load(workdir, quantize="int8", tensor=2)
  prompt = [["Once upon a time"]]
  assert one.generate(prompt, max_new_tokens=5) == two.generate(prompt, max_new_tokens=5)
  assert one.run == two.run == Model.load(workdir).run


def test_unknown_kind_is_refused(moe):
  with pytest.raises(ConfigError, match="quantize is 'int3'; it must be one of int8, int4"):
    quantize(moe, "int3", tiny.mesh())
  assert run_config().model.dtype == "float32"
