# SPDX-License-Identifier: Apache-2.0
"""What a sparse layer's results owe to the rows that tokens are packed into, and to micro-batches.

python -m bench.train.moe_rows

neighbours    one layer of 64 experts on rows of 512 random tokens: the second half of each row is
              drawn anew, and the share of positions in the first half that change is counted; the
              tokens have a common mean of so many deviations, which skews the load;
accumulation  mm1_debug:moe after 0 and `--steps` steps: how far the gradient of a batch in 4
              micro-batches is from that of the whole, relative to its norm;
held out      the same run after `--steps` steps: its held-out loss with and without drops.
"""

import argparse
import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mm1_jax.checkpoint import to_names
from mm1_jax.config import DecoderConfig, MoEConfig, RunConfig
from mm1_jax.configs import mm1_debug
from mm1_jax.models.mm1 import MM1
from mm1_jax.models.moe import MoE
from mm1_jax.sharding import LAYOUT, device_batch, make_mesh
from mm1_jax.train.feed import held_out_batches, training_batches
from mm1_jax.train.loss import loss_fn
from mm1_jax.train.optimizer import split_frozen
from mm1_jax.train.step import TrainState, _gradients, init_state, train_step_on

EXPERTS, WIDTH, ROWS, POSITIONS = 64, 64, 4, 512


def neighbours(mesh: Mesh) -> None:
  print("capacity  mean  dropped  largest load  positions that change")
  decoder = DecoderConfig(width=WIDTH, mlp_dim=WIDTH)
  rng = np.random.default_rng(0)
  place = NamedSharding(mesh, LAYOUT.act_b)
  run = jax.jit(lambda layer, x: layer(x, jnp.ones(x.shape[:2], bool, out_sharding=LAYOUT.act_b)))
  for capacity in (None, 2.0, 1.25):
    moe = MoEConfig(EXPERTS, capacity_factor=capacity)
    layer = MoE(jax.random.key(0), decoder, moe, 0.1)
    for mean in (0.0, 0.5, 1.0):
      common = rng.normal(size=WIDTH) * mean
      x = (rng.normal(size=(ROWS, POSITIONS, WIDTH)) + common).astype(np.float32)
      other, half = x.copy(), POSITIONS // 2
      other[:, half:] = rng.normal(size=(ROWS, half, WIDTH)) + common
      (a, stats), (b, _) = (run(layer, jax.device_put(v, place)) for v in (x, other))
      changed = np.any(np.asarray(a)[:, :half] != np.asarray(b)[:, :half], axis=-1)
      dropped, largest = float(stats.dropped), EXPERTS * float(jnp.max(stats.load))
      print(f"{capacity!s:>8} {mean:>5} {dropped:>8.1%} {largest:>13.1f} {changed.mean():>10.1%}")


def accumulation(run: RunConfig, mesh: Mesh, state: TrainState, batch, step: int) -> None:
  gradients = []
  for num in (1, 4):
    train = dataclasses.replace(run.train, accumulation_steps=num)
    split = dataclasses.replace(run, train=train)
    take = jax.jit(lambda model, b, run=split: _gradients(*split_frozen(model, ()), b, run)[1])
    found = to_names(take(state.model, device_batch(batch, mesh)))
    gradients.append({name: np.asarray(x, np.float64) for name, x in found.items()})
  whole, parts = gradients

  def away(names: list[str]) -> float:
    squares = [(np.sum((whole[n] - parts[n]) ** 2), np.sum(whole[n] ** 2)) for n in names]
    difference, size = np.sum(squares, axis=0)
    return float(np.sqrt(difference / size))

  routers = [name for name in whole if name.endswith("router")]
  print(f"step {step}: gradient {away(list(whole)):.1%} away, routers {away(routers):.1%}")


def held_out(run: RunConfig, mesh: Mesh, model: MM1) -> None:
  @jax.jit
  def evaluate(model, batch):
    both = [
      loss_fn(model, batch, run, num_targets=jnp.ones(()), dropless=dropless)
      for dropless in (True, False)
    ]
    sums = [jnp.sum(losses.tokens.nll) for losses in both]
    assert both[1].moe is not None
    return jnp.stack([*sums, jnp.sum(both[0].tokens.count), jnp.mean(both[1].moe.dropped), 1.0])

  for source in run.data.eval_sources:
    batches = held_out_batches(run, source, mesh)
    sums = [np.asarray(evaluate(model, device_batch(batch, mesh))) for batch in batches]
    whole, bounded, count, dropped, num = np.sum(sums, axis=0)
    print(
      f"{source.name}: {whole / count:.4f} nats without drops, {bounded / count:.4f} with "
      f"{dropped / num:.1%} of the choices dropped",
      flush=True,
    )


def main() -> None:
  parser = argparse.ArgumentParser(description="Measures what packing does to a sparse layer.")
  parser.add_argument("--steps", type=int, default=30, help="of training before the measurements")
  args = parser.parse_args()
  run = RunConfig.from_dict(mm1_debug.get_config("moe").to_dict())
  mesh = make_mesh(run)
  with jax.set_mesh(mesh), contextlib.closing(training_batches(run, None, mesh)) as batches:
    neighbours(mesh)
    state = jax.jit(lambda: init_state(MM1(jax.random.key(0), run.model), run))()
    accumulation(run, mesh, state, next(batches)[0], 0)
    for _ in range(args.steps):
      state, _ = train_step_on(mesh)(state, device_batch(next(batches)[0], mesh), run=run)
    accumulation(run, mesh, state, next(batches)[0], args.steps)
    held_out(run, mesh, state.model)


if __name__ == "__main__":
  main()
