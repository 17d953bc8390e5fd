# SPDX-License-Identifier: Apache-2.0
"""What Adafactor's settings do to a step and to a fine-tuned model.

  python -m bench.train.adafactor
  python -m bench.train.adafactor --init_from=runs/debug --workdir=runs/adafactor

First, the RMS of an update per unit of rate, for four stacked layers whose weights are of scale 1,
0.1, 0.01 and 0.001, and for four equal layers of which the first gets a gradient 100 times as large
in one step; `stacked` is optax's transformation over the whole stack, as it was here once.

Then, with `--init_from`, a pre-trained `mm1_debug` run, fine-tuning by `mm1_debug_sft` with and
without the scale, once for each rate: the mean loss of held-out answers in nats per token, and its
paired difference from the first row's, each with a standard error over answers. Finished runs are
kept.
"""

import argparse
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mm1_jax import cli
from mm1_jax.config import OptimizerConfig, RunConfig
from mm1_jax.configs import common, mm1_debug_sft
from mm1_jax.eval.evaluate import Result, Settings, difference, evaluate
from mm1_jax.inference.model import Model
from mm1_jax.train.loop import train
from mm1_jax.train.optimizer import adafactor

SHAPE = (4, 256, 512)  # layers, of matrices that are factored
SETTINGS = {
  "no scale": {},
  "parameter scale": {"multiply_by_parameter_scale": True},
  "no scale, clipped at 5": {"clipping_threshold": 5.0},
}
FINE_TUNED = ("no scale", "parameter scale")


def last_updates(transformation, weights, gradients) -> np.ndarray:
  """Returns the RMS of each layer's last update."""
  state = transformation.init(weights)
  for gradient in gradients:
    updates, state = transformation.update(gradient, state, weights)
  return np.sqrt(np.mean(np.square(np.asarray(updates)), axis=(1, 2)))


def steps_table() -> None:
  keys = jax.random.split(jax.random.key(0), 2)
  weights = SHAPE[1] ** -0.5 * jax.random.normal(keys[0], SHAPE)
  gradients = 1e-4 * jax.random.normal(keys[1], (60, *SHAPE))
  scales = weights * jnp.array([1, 0.1, 0.01, 0.001])[:, None, None]
  jump = jnp.ones((60, 4, 1, 1)).at[-1, 0].set(100)
  print("| setting | over | layers of scale 1, .1, .01, .001 | first layer's gradient x 100 |")
  print("|---|---|---|---|")
  for name, setting in SETTINGS.items():
    one = adafactor(OptimizerConfig(name="adafactor", **setting))
    by_layer = optax.GradientTransformation(jax.vmap(one.init), jax.vmap(one.update))
    for over, transformation in (("stacked", one), ("layers", by_layer)):
      cells = (
        last_updates(transformation, scales, gradients),
        last_updates(transformation, weights, gradients * jump),
      )
      shown = [", ".join(f"{x:.3g}" for x in cell) for cell in cells]
      print(f"| {name} | {over} | {' | '.join(shown)} |")


def fine_tuned(args: argparse.Namespace, setting: dict, rate: float) -> Result:
  """Returns the loss of held-out answers after fine-tuning, in nats per token."""
  config = mm1_debug_sft.get_config(args.kind)
  config.optimizer.update(learning_rate=rate, **setting)
  config.train.update(num_steps=args.num_steps, init_from=str(args.init_from))
  config.checkpoint.every = args.num_steps
  changed = "_".join(f"{key}_{value}" for key, value in setting.items()) or "no_scale"
  workdir = args.workdir / f"{changed}_{rate:g}"
  train(RunConfig.from_dict(config.to_dict()), workdir)
  settings = Settings(("records:sft",), form="sft_nats")
  (result,) = evaluate(Model.load(workdir), settings, common.SAMPLE)
  return result


def answers_table(args: argparse.Namespace) -> None:
  rows = {
    (name, rate): fine_tuned(args, SETTINGS[name], rate)
    for name, rate in itertools.product(FINE_TUNED, args.rates)
  }
  first = next(iter(rows.values()))
  print("\n| setting | rate | held-out answers | beside the first row |\n|---|---|---|---|")
  for (name, rate), result in rows.items():
    assert result.scores is not None
    cells = result.scores.values["nats_per_token"], difference(result, first)
    shown = [f"{cell.mean:.3f} ± {cell.standard_error:.3f}" for cell in cells]
    print(f"| {name} | {rate:g} | {' | '.join(shown)} |")
  print(f"n = {len(first.scored)} answers; {len(first.dropped)} are too long")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--init_from", type=pathlib.Path, help="a pre-trained run of mm1_debug")
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/adafactor"))
  parser.add_argument("--kind", choices=("dense", "moe"), default="dense")
  parser.add_argument("--rates", type=float, nargs="*", default=[1e-4, 1e-3, 1e-2])
  parser.add_argument("--num_steps", type=int, default=100)
  args = parser.parse_args()
  steps_table()
  if args.init_from:
    answers_table(args)


if __name__ == "__main__":
  cli.run(main)
