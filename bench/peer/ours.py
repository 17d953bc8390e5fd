# SPDX-License-Identifier: Apache-2.0
"""Our side of a bench with a peer, a `workers.Worker`: `python -m bench.peer.ours FOLDER`."""

import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from bench.peer.workers import answer
from mm1_jax.batch import Batch
from mm1_jax.config import RunConfig
from mm1_jax.metrics import peak_memory_gib
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import device_batch, make_mesh
from mm1_jax.train.step import init_state, train_step_on


class Ours:
  """The train step that `main` runs, on one batch."""

  def __init__(self, folder: pathlib.Path):
    self._run = RunConfig.from_dict(json.loads((folder / "run.json").read_text()))
    self._mesh = make_mesh(self._run)
    with np.load(folder / "batch.npz") as arrays:
      batch = Batch(**arrays)
    with jax.set_mesh(self._mesh):
      self._batch = device_batch(batch, self._mesh)
      run = self._run
      self._state = jax.jit(lambda: init_state(MM1(jax.random.key(0), run.model), run))()

  def steps(self, num: int) -> dict[str, Any]:
    take_step, seconds, loss = train_step_on(self._mesh), [], 0.0
    with jax.set_mesh(self._mesh):
      for _ in range(num):
        begin = time.perf_counter()
        self._state, metrics = take_step(self._state, self._batch, run=self._run)
        loss = float(metrics["loss"].compute())  # waits for the step
        jax.block_until_ready(self._state)
        seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds, "loss": loss}

  def facts(self) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
      "params": sum(x.size for x in jax.tree.leaves(self._state.model)),
      "peak_gib": peak_memory_gib(),
      "version": f"jax {jax.__version__}",
      "device": device.device_kind,
    }


def save_work(folder: str, run: RunConfig, batch: Batch) -> None:
  """Writes what all workers are to do: the config, and one batch of rows."""
  path = pathlib.Path(folder)
  (path / "run.json").write_text(json.dumps(run.to_dict()))
  np.savez(path / "batch.npz", **batch._asdict())


def main() -> None:
  ours = Ours(pathlib.Path(sys.argv[1]))
  answer({"steps": ours.steps, "facts": ours.facts})


if __name__ == "__main__":
  main()
