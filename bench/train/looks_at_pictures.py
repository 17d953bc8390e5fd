# SPDX-License-Identifier: Apache-2.0
"""Does the model look at the picture? Held-out caption loss with the right and with a wrong image.

  python -m bench.train.looks_at_pictures --kind=dense --workdir=runs/looks_dense
  python -m bench.train.looks_at_pictures --kind=moe --workdir=runs/looks_moe

Pre-trains mm1_debug on the shipped sample (about 30 minutes on two cores), keeping a checkpoint
every `--every` steps; then scores each held-out caption with its own picture, and with another
picture of the same source (a figure for a figure, a drawing for a drawing: telling the sources
apart does not help). Prints a table, and leaves `looks.json` and `looks.png` in the workdir. A run
that was interrupted continues where it was.
"""

import argparse
import json
import pathlib

import matplotlib

from mm1_jax import cli
from mm1_jax.checkpoint import STEPS
from mm1_jax.config import RunConfig
from mm1_jax.configs import common, mm1_debug
from mm1_jax.eval.evaluate import Result, Settings, difference, evaluate
from mm1_jax.inference.model import Model
from mm1_jax.train.loop import train


def score(checkpoint: pathlib.Path, shards: pathlib.Path) -> dict[str, float]:
  """Returns mean loss and share of exact captions with right and wrong pictures.

  The loss's margin, wrong above right, has its standard error beside it.

  Args:
    checkpoint: a run, or one of its steps.
    shards: folder of `captions-heldout-*.arrayrecord`.
  """
  settings = Settings(("records:captions",), form="nats", controls=("own", "other"))
  right, wrong = evaluate(Model.load(checkpoint), settings, shards)
  margin = difference(wrong, right)
  return {
    "captions": margin.n,
    "right": _mean(right),
    "wrong": _mean(wrong),
    "margin": margin.mean,
    "standard_error": margin.standard_error,
    "exact_right": _exact(right),
    "exact_wrong": _exact(wrong),
  }


def _mean(result: Result) -> float:
  assert result.scores is not None
  return result.scores.values["nats_per_token"].mean


def _exact(result: Result) -> float:
  """Returns the share of captions whose every token is the likeliest: greedy decoding says them."""
  assert result.scores is not None
  assert result.scores.right is not None
  return float(result.scores.right.mean())


def draw(rows: list[dict], path: pathlib.Path, title: str) -> None:
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
  steps = [r["step"] for r in rows]
  left.plot(steps, [r["wrong"] for r in rows], "o-", label="another picture")
  left.plot(steps, [r["right"] for r in rows], "o-", label="its own picture")
  left.set(xlabel="step", ylabel="nats per token", title=f"{title}: held-out caption loss")
  left.legend()
  errors = [1.96 * r["standard_error"] for r in rows]
  right.errorbar(steps, [r["margin"] for r in rows], errors, fmt="o-", capsize=3)
  right.axhline(0, color="grey", linewidth=1)
  right.set(xlabel="step", ylabel="nats per token", title="margin, with 95% interval")
  figure.savefig(path, dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kind", choices=("dense", "moe"), default="dense")
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--num-steps", type=int, default=900)
  parser.add_argument("--every", type=int, default=150, help="steps between points of the curve")
  args = parser.parse_args()
  config = mm1_debug.get_config(args.kind)
  config.train.update(num_steps=args.num_steps, eval_every=args.every)
  config.checkpoint.update(every=args.every, keep_period=args.every)
  run = RunConfig.from_dict(config.to_dict())
  train(run, args.workdir)
  rows = []
  steps = sorted(int(p.name) for p in (args.workdir / STEPS).iterdir() if p.name.isdigit())
  for step in steps:
    rows.append({"step": step, **score(args.workdir / STEPS / str(step), common.SAMPLE)})
    print(json.dumps(rows[-1]), flush=True)
  (args.workdir / "looks.json").write_text(
    json.dumps({"kind": args.kind, "rows": rows}, indent=2) + "\n"
  )
  draw(rows, args.workdir / "looks.png", f"mm1_debug, {args.kind}")


if __name__ == "__main__":
  cli.run(main)
