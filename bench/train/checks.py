# SPDX-License-Identifier: Apache-2.0
"""What it costs to see that bits have changed: in saves, restores and steps, by turns without.

python -m bench.train.checks

save      seconds that training waits for a save of mm1_debug:moe, and until it is on disk, with
          checksums and without;
restore   the same, of reading it;
step      seconds of a step, with a comparison of replicas after it and without.
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mm1_jax.checkpoint import Checkpointer, to_names
from mm1_jax.config import CheckpointConfig, RunConfig
from mm1_jax.configs import mm1_debug
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import device_batch, make_mesh
from mm1_jax.train import replicas
from mm1_jax.train.feed import training_batches
from mm1_jax.train.step import TrainState, init_state, train_step_on

Row = dict[str, list[float]]


def timed(into: Row, name: str, call: Callable[[], Any]) -> Any:
  begin = time.perf_counter()
  result = jax.block_until_ready(call())
  into.setdefault(name, []).append(time.perf_counter() - begin)
  return result


def saves(state: TrainState, folder: pathlib.Path, repeats: int) -> dict[bool, Row]:
  """Returns the seconds of saves and restores, by whether they have checksums."""
  arrays = {"params": state.model, "train": state._replace(model=None)}
  like = {
    item: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    for item, tree in arrays.items()
  }
  rows: dict[bool, Row] = {True: {}, False: {}}
  savers = {v: Checkpointer(folder / str(v), CheckpointConfig(keep=2, verify=v)) for v in rows}
  for step in range(1, repeats + 1):
    for verify, saver in savers.items():
      row = rows[verify]
      timed(row, "waits for a save", lambda: saver.save(step, **arrays, data={"batch": step}))  # noqa: B023
      timed(row, "then until it is on disk", saver.wait)
      timed(row, "restore", lambda: saver.restore(step, **like))  # noqa: B023
  return rows


def steps(run: RunConfig, state: TrainState, repeats: int) -> dict[bool, Row]:
  """Returns the seconds of steps, by whether replicas are compared after them."""
  mesh = make_mesh(run)
  pipeline, take_step = training_batches(run, None, mesh), train_step_on(mesh)
  batch = device_batch(next(pipeline)[0], mesh)
  pipeline.close()
  rows: dict[bool, Row] = {True: {}, False: {}}

  def step(compare: bool) -> TrainState:
    new, _ = take_step(state, batch, run=run)
    if compare:
      replicas.check(1, new.model)
    return new

  for _ in range(repeats):
    for compare, row in rows.items():
      state = timed(row, "step", lambda: step(compare))  # noqa: B023
  return rows


def show(title: str, rows: dict[bool, Row]) -> None:
  for name in rows[True]:  # the first of each compiles
    on, off = (float(np.median(rows[key][name][1:])) for key in (True, False))
    print(f"{title:14} {name:26} with {on:8.3f} s, without {off:8.3f} s", flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
  parser.add_argument("--repeats", type=int, default=8, help="of each (8)")
  args = parser.parse_args()
  run = RunConfig.from_dict(mm1_debug.get_config("moe").to_dict())
  mesh = make_mesh(run)
  with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
    state = jax.jit(lambda: init_state(MM1(jax.random.key(0), run.model), run))()
    size = sum(x.nbytes for x in to_names(state).values())
    print(f"{size / 1e6:.0f} MB of params and optimizer on {mesh.devices.size} devices")
    show("checksums", saves(state, pathlib.Path(folder), args.repeats))
    show("replicas", steps(run, state, args.repeats))


if __name__ == "__main__":
  main()
