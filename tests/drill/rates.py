# SPDX-License-Identifier: Apache-2.0
"""Absurd rates and sizes: refused by the setting's name before anything is taken or harmed."""

import functools
import json
from collections.abc import Iterator

from tests.drill import runs
from tests.drill.core import REFUSED, Expected, Fault, Outcome, Scene, shell

VALUES = {
  "rate-nan": ("optimizer.learning_rate", "nan"),
  "rate-inf": ("optimizer.learning_rate", "inf"),
  "rate-negative": ("optimizer.learning_rate", "-1"),
  "decay-nan": ("optimizer.weight_decay", "nan"),
  "weight-1e400": ("data.sources.captions.weight", "1e400"),
  "weight-nan": ("data.sources.captions.weight", "nan"),
  "batch-1e12": ("data.batch_size", "1000000000000"),
  # Within the range of the setting: nothing has room for it.
  "batch-2e9": ("data.batch_size", "2000000000"),
  "row-2e9": ("data.seq_len", "2000000000"),
  "width-2e9": ("model.decoder.width", "2000000000"),
  "depth-1e9": ("model.decoder.depth", "1000000000"),
  "steps-1e30": ("train.num_steps", "1" + "0" * 30),
  "eval-every-0": ("train.eval_every", "0"),
  "save-every-0": ("checkpoint.every", "0"),
  "workers-1e6": ("data.num_workers", "1000000"),
}
QUICK = ("rate-nan", "batch-2e9")
ABSURD = (1e9, 1e30)
MOST_GB = 4  # for a refusal


def faults() -> Iterator[Fault]:
  for name, (key, value) in VALUES.items():
    strike = functools.partial(refused, key=key, value=value)
    yield Fault(f"rates/{name}", strike, quick=name in QUICK)
  for rate in ABSURD:
    yield Fault(f"rates/rate-{rate:.0e}".replace("+", ""), functools.partial(ruinous, rate=rate))


def refused(scene: Scene, *, key: str, value: str) -> None:
  process = runs.start(scene, {key: value}, wrapped=shell(f"ulimit -v {runs.ADDRESS_SPACE_KB}"))
  setting = key.rpartition(".")[2]
  expected = Expected((REFUSED,), says=setting, within=60, most_gb=MOST_GB)
  scene.finish(process, expected)
  if (scene.folder / "run" / "checkpoints").exists():
    scene.add(Outcome.WRONG, "it had begun")


def ruinous(scene: Scene, *, rate: float) -> None:
  """A rate that ruins the params ends the run in one line, which names a step to continue from.

  What it says is done: with a sound rate the run is started again, and comes to its end.
  """
  settings = {"optimizer.learning_rate": rate, "train.max_skipped": 3, "train.num_steps": 200}
  process = runs.start(scene, settings)
  ended = scene.finish(process, Expected((REFUSED,), says=r"(?i)steps in a row|good", within=120))
  if ended.code != REFUSED:
    return
  sound = settings | {"optimizer.learning_rate": 1e-3, "train.num_steps": runs.NUM_STEPS}
  again = scene.finish(runs.start(scene, sound), Expected(within=180), shown=False)
  losses = [
    line["values"].get("loss")
    for line in map(json.loads, (scene.folder / "run" / "metrics.jsonl").open())
    if "values" in line and line["step"] == runs.NUM_STEPS
  ]
  numbers = [loss for loss in losses if loss is not None]
  if again.code == 0 and not (numbers and isinstance(numbers[-1], float) and numbers[-1] < 20):
    scene.keeps([f"the loss of the last step is {numbers[-1:]}"])
  else:
    scene.keeps([] if again.code == 0 else [f"started again, it ended with {again.code}"])
