# SPDX-License-Identifier: Apache-2.0
"""The sparse layer's two paths side by side: dropless against bounded, however tokens fall.

  python -m bench.cpu.moe
  python -m bench.cpu.moe --experts=64

Times in one process, the paths by turns, the fastest of `--repeats` each (on a CPU, the time that
its cores worked):

  layer   one MoE layer, forward and backward, on random tokens that a made router sends evenly or
          by Zipf's law (the k-th expert gets 1/k of what the first gets);
  step    whole training steps of mm1_debug:moe on the shipped sample: real text and pictures, and a
          router that has trained for `--warm-steps` steps on the bounded path.

`rows` is what an expert product works on, in units of the choices there are: the bounded path pays
for its slots, full or not. `dropped` is the share of choices that found none. `expert` and `chip`
are the loads of the fullest expert, and of the fullest of 8 chips with an eighth of the experts
each, in any layer, relative to an even one: what `MoEConfig.exchange_factor` has to leave room for.
"""

import argparse
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mm1_jax.config import RunConfig
from mm1_jax.configs import mm1_debug
from mm1_jax.models.mm1 import MM1
from mm1_jax.models.moe import MoE
from mm1_jax.sharding import LAYOUT, device_batch, make_mesh
from mm1_jax.train.feed import training_batches
from mm1_jax.train.step import init_state, train_step

PATHS = {"bounded 1.25": 1.25, "bounded 2.0": 2.0, "dropless": None}
COLUMNS = "{:<10} {:<14} {:>9} {:>7} {:>7} {:>9} {:>7} {:>9}"
NUM_CHIPS = 8  # that experts are split over, for the load of the fullest


def fastest(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
  """Returns the least seconds that each call takes, running them by turns."""
  # A CPU's own time, of all its threads, is not longer on a machine that does other things too.
  clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
  best = dict.fromkeys(calls, float("inf"))
  for turn in range(repeats + 1):
    for name, call in calls.items():
      start = clock()
      jax.block_until_ready(call())
      if turn:  # the first compiles
        best[name] = min(best[name], clock() - start)
  return best


def fullest(load: jax.Array, num_parts: int) -> float:
  """Returns the load [..., experts] of the fullest of so many equal parts, relative to the mean."""
  parts = np.asarray(load).reshape(*load.shape[:-1], num_parts, -1).sum(axis=-1)
  return float(np.max(parts)) * num_parts


def show(routing: str, times: dict[str, float], stats: dict[str, Any], num_experts: int) -> None:
  for path, seconds in times.items():
    factor = PATHS[path]
    load = stats[path].load
    print(
      COLUMNS.format(
        routing,
        path,
        f"{1e3 * seconds:.1f}",
        f"{seconds / times['bounded 1.25']:.2f}",
        f"{factor or 1.0:.2f}",
        f"{fullest(load, num_experts):.2f}",
        f"{fullest(load, NUM_CHIPS):.2f}",
        f"{100 * float(jnp.mean(stats[path].dropped)):.1f}%",
      ),
      flush=True,
    )


def layers(run: RunConfig, mesh: Mesh, repeats: int) -> None:
  """Times one layer with a router that takes each expert's score from the token."""
  decoder = run.model.decoder
  moe = decoder.moe
  assert moe is not None
  rows, positions = run.data.batch_size, run.data.seq_len
  rng = np.random.default_rng(0)
  router = np.eye(decoder.width, moe.num_experts, dtype=np.float32)
  on_mesh = NamedSharding(mesh, LAYOUT.act_b)
  valid = jax.device_put(np.ones((rows, positions), bool), on_mesh)

  @jax.jit
  def step(layer, x):
    def loss(layer, x):
      y, stats = layer(x, valid)
      return jnp.sum(y * y) + stats.balance_loss, stats

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

  zipf = -np.log(np.arange(1, moe.num_experts + 1))
  for routing, popularity in (("even", 0 * zipf), ("zipf", zipf)):
    x = rng.standard_normal((rows, positions, decoder.width)).astype(np.float32)
    # The largest of log popularity + Gumbel noise: each expert is first by its popularity.
    x[..., : moe.num_experts] = popularity + rng.gumbel(size=(rows, positions, moe.num_experts))
    calls, stats = {}, {}
    for path, factor in PATHS.items():
      layer = MoE(
        jax.random.key(0), decoder, dataclasses.replace(moe, capacity_factor=factor), 0.02
      )
      layer.router[...] = jnp.asarray(router)
      calls[path] = functools.partial(step, layer, jax.device_put(x, on_mesh))
      stats[path] = calls[path]()[1]
    show(routing, fastest(calls, repeats), stats, moe.num_experts)


def steps(run: RunConfig, mesh: Mesh, warm_steps: int, repeats: int) -> None:
  """Times training steps on real rows, all paths from the same state and on the same batch."""
  assert run.model.decoder.moe is not None
  # Traced inside another jit, a step donates nothing: every call starts from the same state.
  step = jax.jit(lambda state, batch, run: train_step(state, batch, run=run), static_argnames="run")
  fast = {"xla_backend_optimization_level": 0}  # to compile: it runs once
  make = jax.jit(lambda: init_state(MM1(jax.random.key(0), run.model), run), compiler_options=fast)
  state = make()
  with contextlib.closing(training_batches(run, None, mesh)) as batches:
    for _ in range(warm_steps):
      state, _ = step(state, device_batch(next(batches)[0], mesh), run=run)
    batch = device_batch(next(batches)[0], mesh)
  calls, stats = {}, {}
  for path, factor in PATHS.items():
    moe = dataclasses.replace(run.model.decoder.moe, capacity_factor=factor)
    decoder = dataclasses.replace(run.model.decoder, moe=moe)
    changed = dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=decoder))
    # A layer's settings are part of its state's structure, not of its arrays.
    like = jax.eval_shape(lambda run=changed: init_state(MM1(jax.random.key(0), run.model), run))
    same = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(state))
    calls[path] = functools.partial(step, same, batch, run=changed)
    stats[path] = LayerStats(calls[path]()[1])
  show("real", fastest(calls, repeats), stats, run.model.decoder.moe.num_experts)


class LayerStats:
  """Load [units, experts] and dropped share of a step, from what it logs."""

  def __init__(self, metrics: dict[str, Any]):
    self.load = metrics["moe/load"].compute()
    self.dropped = metrics["moe/dropped"].compute()


def main() -> None:
  parser = argparse.ArgumentParser(description="Times the paths of the sparse layer.")
  parser.add_argument("--experts", type=int, default=8, help=f"a multiple of {NUM_CHIPS}")
  parser.add_argument("--warm-steps", type=int, default=40, help="steps before the timed one")
  parser.add_argument("--repeats", type=int, default=5, help="timings of each, the fastest counts")
  args = parser.parse_args()
  if args.experts < NUM_CHIPS or args.experts % NUM_CHIPS:
    parser.error(f"--experts {args.experts} must be a multiple of {NUM_CHIPS}.")
  config = mm1_debug.get_config("moe")
  config.model.decoder.moe.num_experts = args.experts
  run = RunConfig.from_dict(config.to_dict())
  print(COLUMNS.format("routing", "path", "ms", "ratio", "rows", "expert", "chip", "dropped"))
  mesh = make_mesh(run)
  with jax.set_mesh(mesh):
    layers(run, mesh, args.repeats)
    steps(run, mesh, args.warm_steps, args.repeats)


if __name__ == "__main__":
  main()
