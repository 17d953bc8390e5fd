# SPDX-License-Identifier: Apache-2.0
"""No sum that decides a gradient is made in bfloat16, and none crosses slices more than once."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from mm1_jax.config import ConnectorConfig, LoRAConfig, ModelConfig, RunConfig
from mm1_jax.models.layers import broadcast, rows_of
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import abstract_state
from mm1_jax.train.optimizer import split_frozen
from mm1_jax.train.step import _gradients
from tests.helpers import tiny

pytestmark = pytest.mark.compiles

# What adds one number after another. Matrix products keep float32 sums inside.
SUMS = ("reduce_sum", "scatter-add", "cumsum", "reduce_window_sum")


def with_model(model: ModelConfig, **decoder) -> RunConfig:
  model = dataclasses.replace(
    model, dtype="bfloat16", decoder=dataclasses.replace(model.decoder, **decoder)
  )
  return dataclasses.replace(tiny.run_config(), model=model)


def with_connector(kind: str) -> RunConfig:
  connector = ConnectorConfig(kind=kind, token_grid=(1, 2), hidden=8, depth=1, num_heads=2)
  return with_model(tiny.model_config(connector=connector))


RUNS = {
  "dense": with_model(tiny.model_config(), qkv_bias=True, qk_norm=True),
  "untied": with_model(tiny.model_config(remat="full"), tie_embeddings=False),
  "groups": with_model(tiny.model_config(image_group=1)),
  "unrolled": with_model(tiny.model_config(scan=False)),
  "attention_pool": with_connector("attention_pool"),
  "average_pool": with_connector("average_pool"),
  "dropless": with_model(tiny.model_config(tiny.SPARSE)),
  "capacity": with_model(tiny.model_config(tiny.BOUNDED)),
  "lora": with_model(tiny.model_config(tiny.SPARSE), lora=LoRAConfig(rank=3, alpha=5.0)),
}


def traced(run: RunConfig, *sizes: int):
  """Returns the jaxpr of a step's gradients on a mesh."""
  mesh = tiny.mesh(*sizes)
  model = abstract_state(lambda: MM1(jax.random.key(0), run.model), mesh)
  batch = abstract_state(lambda: tiny.put(tiny.BATCH, mesh), mesh)
  with jax.set_mesh(mesh):
    trainable, frozen = split_frozen(model, ())
    return jax.make_jaxpr(lambda *args: _gradients(*args, run))(trainable, frozen, batch).jaxpr


def equations(jaxpr, scans: int = 0) -> Iterator[tuple]:
  """Yields every equation and how many scans it is in."""
  for equation in jaxpr.eqns:
    yield equation, scans
    inside = scans + (equation.primitive.name == "scan")
    for sub in jaxprs_in_params(equation.params):
      yield from equations(sub, inside)


@pytest.mark.parametrize("kind", RUNS)
def test_no_gradient_is_a_sum_in_bfloat16(kind):
  """A bias, a kernel, a table of positions or of ids: each is a sum over all positions."""
  model = RUNS[kind].model
  # Exact in any dtype: an image token is picked by one placeholder, and by others times 0.
  tokens = tiny.BATCH.images.shape[1] * model.connector.num_tokens

  def rounds(equation) -> bool:
    of = equation.invars[0].aval
    once = equation.params.get("unique_indices") or of.shape[1:] == (tokens, model.decoder.width)
    return of.dtype == jnp.bfloat16 and not once

  found = [
    f"{equation.primitive.name} of {equation.invars[0].aval.str_short()}"
    for equation, _ in equations(traced(RUNS[kind], 1, 2, 1, 2))
    if equation.primitive.name in SUMS and rounds(equation)
  ]
  assert not found


def relative_error(actual, exact: np.ndarray) -> float:
  difference = np.asarray(actual, np.float64) - exact
  return float(np.linalg.norm(difference) / np.linalg.norm(exact))


def test_a_biass_gradient_is_exact_to_its_terms():
  """In bfloat16 the sum of 32k positions is 10% and more off; the terms' rounding averages out."""
  terms = jnp.asarray(0.1 + np.random.default_rng(0).standard_normal((32768, 8)), jnp.bfloat16)

  def gradient(add):
    loss = lambda bias: jnp.sum((add(jnp.zeros_like(terms), bias) * terms).astype(jnp.float32))
    return jax.jit(jax.grad(loss))(jnp.zeros(8))

  exact = np.asarray(terms, np.float64).sum(axis=0)
  with jax.set_mesh(tiny.mesh()):
    assert relative_error(gradient(lambda x, bias: x + broadcast(bias, x)), exact) < 1e-4
    assert relative_error(gradient(lambda x, bias: x + bias.astype(x.dtype)[None]), exact) > 0.05


def test_an_ids_gradient_is_exact_to_its_terms():
  """One id in three is the same, as in text."""
  rng = np.random.default_rng(0)
  ids = np.where(rng.random((4, 4096)) < 0.3, 1, rng.integers(0, 8, (4, 4096)))
  terms = jnp.asarray(0.1 + rng.standard_normal((4, 4096, 8)), jnp.bfloat16)
  exact = np.zeros((8, 8))
  np.add.at(exact, ids, np.asarray(terms, np.float64))

  def loss(table):
    rows = rows_of(table.astype(jnp.bfloat16), tiny.put(ids, tiny.mesh()))
    return jnp.sum((rows * terms).astype(jnp.float32))

  with jax.set_mesh(tiny.mesh()):
    gradient = jax.jit(jax.grad(loss))(jnp.ones((8, 8)))
  assert relative_error(gradient, exact) < 3e-3  # rounded once, at the end


def sums_over_data(equation) -> bool:
  """Returns whether an equation sums a matrix or more over `data`; numbers to report may."""
  if equation.primitive.name == "reshard":
    specs = [v.aval.sharding.spec for v in (equation.invars[0], equation.outvars[0])]
    return "data" in specs[0].unreduced - specs[1].unreduced
  if equation.primitive.name == "psum":
    return "data" in equation.params["axes"] and equation.invars[0].aval.ndim > 1
  return False


@pytest.mark.parametrize("kind", ["dense", "attention_pool", "dropless", "capacity", "lora"])
def test_gradients_cross_slices_once_a_step_in_float32(kind):
  """`data` runs between slices, over the slowest network."""
  run = RUNS[kind]
  run = dataclasses.replace(run, train=dataclasses.replace(run.train, accumulation_steps=2))
  crossing = [
    (scans, equation.invars[0].aval.dtype.name)
    for equation, scans in equations(traced(run, 2, 2, 1, 2))
    if sums_over_data(equation)
  ]
  model = abstract_state(lambda: MM1(jax.random.key(0), run.model), tiny.mesh(2))
  trainable, _ = split_frozen(model, ())
  assert crossing == [(0, "float32")] * len(jax.tree.leaves(trainable))
