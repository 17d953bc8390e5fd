# SPDX-License-Identifier: Apache-2.0
"""The tiny model's train step: one compiled program a config, and the old state is kept."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from mm1_jax.batch import Batch
from mm1_jax.checkpoint import to_names
from mm1_jax.config import MoEConfig, OptimizerConfig, RunConfig, TrainConfig
from mm1_jax.train.step import TrainState, init_state, train_step
from tests.helpers import tiny

ONE = (1, 1, 1, 1)
ADAMW = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, clip_norm=1e9)


def run_config(
  moe: MoEConfig | None = None,
  *,
  optimizer: OptimizerConfig = ADAMW,
  train: TrainConfig = TrainConfig(num_steps=10),  # noqa: B008
  c_abstractor: bool = False,
) -> RunConfig:
  """Returns a tiny run; its connector is the one that compiles fast unless `c_abstractor`."""
  changes = {} if c_abstractor else {"connector": tiny.POOLED}
  return dataclasses.replace(tiny.run_config(moe, **changes), optimizer=optimizer, train=train)


@functools.cache
def make_state(run: RunConfig) -> TrainState:
  """Returns the first state, on one device; it is shared, so do not donate it."""
  mesh = tiny.mesh(*ONE)
  with jax.set_mesh(mesh):
    return jax.tree.map(jax.numpy.asarray, init_state(tiny.make_model(run.model, mesh), run))


# Like `train_step`, but quick to compile, and it leaves its argument alone.
_step = tiny.jit(train_step, static_argnames="run")


def step(state: TrainState, batch: Batch, run: RunConfig) -> tuple[TrainState, dict[str, Any]]:
  """Returns the next state and the metrics as numbers, and as an array where one is a table."""
  mesh = tiny.mesh(*ONE)
  with jax.set_mesh(mesh):
    state, metrics = _step(state, tiny.put(batch, mesh), run=run)
  values = {name: np.asarray(metric.compute()) for name, metric in metrics.items()}
  return state, {name: x if x.ndim else float(x) for name, x in values.items()}


def change(tree: Any, **values: Any) -> Any:
  """Returns a tree in which the leaves named (with __ for a dot) go through functions."""
  wanted = {name.replace("__", "."): f for name, f in values.items()}
  assert wanted.keys() <= to_names(tree).keys(), wanted.keys() - to_names(tree).keys()

  def put(path, leaf):
    f = wanted.get(tiny.name(path))
    return leaf if f is None else jax.device_put(f(np.array(leaf)), leaf.sharding)

  return jax.tree_util.tree_map_with_path(put, tree)


def assert_same_bits(actual: Any, expected: Any) -> None:
  actual, expected = to_names(actual), to_names(expected)
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    assert np.asarray(actual[name]).tobytes() == np.asarray(value).tobytes(), name
