# SPDX-License-Identifier: Apache-2.0
"""A param of which one device has another copy ends the run, by its name and the device's."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from mm1_jax.checkpoint import from_names, to_names
from mm1_jax.train import replicas
from tests.end_to_end_test import SMALL
from tests.helpers import tiny

ROOT = pathlib.Path(__file__).parents[2]
NAME = "decoder.units.layers.0.mlp.gate"


def corrupt(x: jax.Array, shard: int) -> jax.Array:
  """Returns an array of which one device's copy has one bit flipped."""
  parts = [np.array(s.data) for s in x.addressable_shards]
  parts[shard].reshape(-1).view(np.uint32)[3] ^= np.uint32(1 << 20)
  devices = [s.device for s in x.addressable_shards]
  placed = [jax.device_put(part, d) for part, d in zip(parts, devices, strict=True)]
  return jax.make_array_from_single_device_arrays(x.shape, x.sharding, placed)


@pytest.mark.compiles
def test_a_corrupted_replica_is_named():
  """Of four copies of each part of a matrix, one has one bit flipped."""
  model = tiny.make_model(tiny.model_config(), tiny.mesh(4, 2))
  replicas.check(7, model)
  names = to_names(model)
  wrong = from_names(model, {**names, NAME: corrupt(names[NAME], 5)})
  device = names[NAME].addressable_shards[5].device
  with pytest.raises(replicas.ReplicaError) as error:
    replicas.check(7, wrong)
  message = str(error.value)
  assert message.startswith(f"after step 7, copies of {NAME} differ between devices")
  assert f"the odd ones are {device} of process 0. " in message


# The command itself; after step 3 one device's copy of a param is another.
CORRUPTED = f"""
import runpy, sys
import mm1_jax.train.loop as loop
from mm1_jax.checkpoint import from_names, to_names
from tests.train.replicas_test import corrupt
take_step_on, name = loop.train_step_on, {NAME!r}

def corrupted(mesh):
  take_step = take_step_on(mesh)
  def step(state, batch, *, run):
    state, metrics = take_step(state, batch, run=run)
    if int(state.step) == 3:
      names = to_names(state.model)
      model = from_names(state.model, {{**names, name: corrupt(names[name], 1)}})
      state = state._replace(model=model)
    return state, metrics
  step.lower = take_step.lower
  return step

loop.train_step_on = corrupted
runpy.run_module("mm1_jax.main", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_run_with_a_corrupted_replica_ends(tmp_path):
  given = SMALL | {"train.replica_check_every": 2, "mesh.data": 2, "mesh.fsdp": 1}
  flags = [f"--config.{name}={value}" for name, value in given.items()]
  program = [sys.executable, "-c", CORRUPTED, "--config=configs/mm1_debug.py"]
  result = subprocess.run(
    [*program, f"--workdir={tmp_path}", *flags],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert result.returncode == 1, result.stderr[-3000:]
  (said,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
  assert said.startswith(f"error: after step 4, copies of {NAME}")
  assert "Traceback" not in result.stderr
  # Nothing was saved of it.
  assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
