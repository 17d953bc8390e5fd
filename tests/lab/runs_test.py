# SPDX-License-Identifier: Apache-2.0
"""Runs of the lab: kept by what defines them, continued where they were stopped, bit for bit."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lab import measures, starts
from lab.documents import Named, Strings
from lab.runs import Lab, Run
from mm1_jax.inference.model import Model

pytestmark = pytest.mark.compiles
SMALL = {
  "model.vision.width": "16",
  "model.vision.depth": "1",
  "model.vision.num_heads": "2",
  "model.vision.mlp_dim": "32",
  "model.connector.hidden": "16",
  "model.decoder.width": "32",
  "model.decoder.head_dim": "8",
  "model.decoder.mlp_dim": "32",
  "data.batch_size": "2",
}
RUN = Run(((1.0, Named()),), 6, SMALL)


def test_a_run_is_known_by_all_that_defines_it():
  others = (
    dataclasses.replace(RUN, steps=7),
    dataclasses.replace(RUN, mixture=((1.0, Named(noise=0.1)),)),
    dataclasses.replace(RUN, config=SMALL | {"data.batch_size": "3"}),
    dataclasses.replace(RUN, start=starts.text()),
    dataclasses.replace(RUN, shuffled=True),
    dataclasses.replace(RUN, fresh=("vit",)),
  )
  assert len({RUN.key, *(run.key for run in others)}) == 1 + len(others)
  assert dataclasses.replace(RUN, config=dict(reversed(SMALL.items()))).key == RUN.key


def test_what_was_measured_is_kept_by_seed(tmp_path):
  lab, asked = Lab(tmp_path), []

  def measure(model: Model) -> np.ndarray:
    asked.append(model)
    return np.array([float(np.asarray(model.params.decoder.embedding[...]).sum()), 1.0])

  first = lab.values(RUN, 0, {"m": measure})["m"]
  np.testing.assert_array_equal(first, Lab(tmp_path).values(RUN, 0, {"m": measure})["m"])
  assert len(asked) == 1
  second = lab.values(RUN, 1, {"m": measure})["m"]
  assert len(asked) == 2
  assert first[0] != second[0]
  assert lab.record(RUN, 0)["steps"] == RUN.steps
  assert lab.cost(RUN, 0) > 0


def test_a_run_starts_from_another_with_some_parts_fresh(tmp_path):
  lab = Lab(tmp_path)
  after = Run(((1.0, Strings()),), 1, SMALL | {"optimizer.learning_rate": "0.0"}, RUN, ("vit",))
  before, started = lab.model(RUN, 0), lab.model(after, 0)
  same = jax.tree.map(
    lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), before.params, started.params
  )
  assert all(jax.tree.leaves(same.decoder))
  assert all(jax.tree.leaves(same.connector))
  assert not all(jax.tree.leaves(same.vit))


@pytest.mark.slow
def test_a_run_that_is_killed_continues_bit_for_bit(tmp_path):
  def start(name: str) -> subprocess.Popen:  # all alike: here programs are optimised less
    code = f"""
import dataclasses, pathlib
from lab import runs
from tests.lab.runs_test import RUN
runs.SAVE_SECONDS = 0.0
runs.train(dataclasses.replace(RUN, steps=60), 0, pathlib.Path({str(tmp_path / name)!r}), None)
"""
    return subprocess.Popen([sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[2])

  assert start("whole").wait() == 0
  process = start("killed")
  steps = tmp_path / "killed" / "checkpoints"
  for _ in range(1200):
    if steps.exists() and any(p.name.isdigit() and int(p.name) > 3 for p in steps.iterdir()):
      break
    time.sleep(0.05)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  assert not (tmp_path / "killed" / "trained.json").exists()
  assert start("killed").wait() == 0
  whole, killed = (Model.load(tmp_path / name).params for name in ("whole", "killed"))
  same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), whole, killed)
  assert all(jax.tree.leaves(same))


def test_measures_give_a_value_for_each_item(tmp_path):
  model = Lab(tmp_path).model(RUN, 0)
  for function in (measures.strings, measures.kind, measures.number, measures.zero_shot):
    values = function(model)
    assert values.shape == (measures.ITEMS,)
    assert (values >= 0).all()
    assert (values <= 1).all()
  few = [measures.few_shot(model, shots) for shots in (0, 4)]
  assert {values.shape for values in few} == {(measures.ITEMS,)}
  nats = measures.text(model, num=20)
  assert (nats > 0).all()
