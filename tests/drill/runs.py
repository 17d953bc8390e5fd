# SPDX-License-Identifier: Apache-2.0
"""Tiny training runs by the command, and what an uninterrupted one leaves, to compare with."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import threading
from collections.abc import Mapping
from typing import Any

from tests.drill.core import Expected, Lab, Scene
from tests.drill.process import Ended, Process

NUM_STEPS, SAVE_EVERY, STOPPED = 24, 3, 75
ADDRESS_SPACE_KB = 20_000_000  # of a program that must not take the machine
CONFIG = "configs/mm1_debug.py:moe"
TINY: dict[str, Any] = {
  "model.vision.image_size": "(16, 16)",
  "model.vision.width": 16,
  "model.vision.depth": 1,
  "model.vision.num_heads": 2,
  "model.vision.mlp_dim": 16,
  "model.connector.kind": "average_pool",
  "model.connector.token_grid": "(2, 2)",
  "model.decoder.width": 16,
  "model.decoder.depth": 2,
  "model.decoder.head_dim": 4,
  "model.decoder.mlp_dim": 32,
  "data.batch_size": 4,
  "data.seq_len": 64,
  "data.images_per_row": 2,
  "data.window_rows": 32,
  "train.num_steps": NUM_STEPS,
  "train.log_every": 1,
  "train.eval_every": 12,
  "train.eval_batches": 1,
  "optimizer.warmup_steps": 2,
  "checkpoint.every": SAVE_EVERY,
}
SHOWN = 3  # of the names that differ
# Figures of the machine are not compared.
OF_THE_MACHINE = ("speed/", "memory/")
# Orbax reads with an event loop of its own.
_reading = threading.Lock()

Overrides = Mapping[str, Any]


def command(workdir: pathlib.Path, overrides: Overrides | None = None, *flags: str) -> list[str]:
  """Returns the arguments of `python -m` that train the tiny run."""
  values = TINY | dict(overrides or {})
  settings = [f"--config.{name}={value}" for name, value in values.items()]
  base = ["mm1_jax.main", f"--config={CONFIG}", f"--workdir={workdir}"]
  return [*base, f"--stopped-code={STOPPED}", *settings, *flags]


def start(
  scene: Scene,
  overrides: Overrides | None = None,
  *flags: str,
  workdir: pathlib.Path | None = None,
  **how: Any,
) -> Process:
  """Starts the tiny run in the scene's workdir; `how` is of `Scene.start`."""
  return scene.start(*command(workdir or scene.folder / "run", overrides, *flags), **how)


def reference(lab: Lab) -> pathlib.Path:
  """Returns the workdir of an uninterrupted run."""
  return lab.once("reference", lambda folder: _train(lab, folder))


def base(lab: Lab) -> pathlib.Path:
  """Returns the workdir of a run that kill -9 ended in its second half, with three checkpoints."""
  reference(lab)  # compiles, so that the moment is met

  def make(folder: pathlib.Path) -> pathlib.Path:
    process = lab.start(_python(folder / "run"), _log(folder))
    try:
      process.wait_for(lambda: newest(folder / "run") >= NUM_STEPS // 2)
    finally:
      process.kill()
    return folder / "run"

  return lab.once("base", make)


def copy_of_base(scene: Scene) -> tuple[pathlib.Path, int]:
  """Puts a copy of the base in the scene; returns its workdir and its newest step."""
  workdir = scene.folder / "run"
  shutil.copytree(base(scene.lab), workdir)
  return workdir, newest(workdir)


def restart(
  scene: Scene,
  overrides: Overrides | None = None,
  *,
  workdir: pathlib.Path | None = None,
  besides: str | None = None,
) -> Ended:
  """Starts the run in the scene's workdir again; it must end as the reference did, bit for bit.

  But for what begins with `besides`.
  """
  process = start(scene, overrides, workdir=workdir)
  ended = scene.finish(process, Expected(within=180), shown=False)
  if ended.code == 0:
    found = differences(scene, workdir or scene.folder / "run", besides)
  else:
    found = [f"the restart ended with {ended.code}"]
  scene.keeps(found)
  return ended


def differences(scene: Scene, workdir: pathlib.Path, besides: str | None = None) -> list[str]:
  """Returns in what a run that has ended differs from the reference, by name; [] in nothing."""
  return names_that_differ(final_state(reference(scene.lab)), final_state(workdir), besides)


def names_that_differ(
  wanted: Mapping[str, str], found: Mapping[str, str], besides: str | None = None
) -> list[str]:
  """Returns the first names whose values differ, and how many do; none that begins `besides`."""
  wrong = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
  wrong = [name for name in wrong if besides is None or not name.startswith(besides)]
  more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
  return [f"{name} is not the reference's" for name in wrong[:SHOWN]] + more


def final_state(workdir: pathlib.Path) -> dict[str, str]:
  """Returns hashes of the last step's params, optimizer and data, and the metrics of all steps."""
  from etils import epath

  from mm1_jax import checkpoint
  from mm1_jax.metrics import read_metrics

  step = workdir / "checkpoints" / str(NUM_STEPS)
  if not step.exists():
    return {"step": f"{newest(workdir)} of {NUM_STEPS}"}
  state = {}
  for item in ("params", "train"):
    folder = epath.Path(step / item)
    with _reading:
      for name in checkpoint.saved_shapes(folder):  # of any number of processes
        array = checkpoint.open_array(folder, name).read().result()
        state[f"{item} {name}"] = hashlib.sha256(array.tobytes()).hexdigest()
  state["data"] = (step / "data" / "metadata").read_text()
  for name, values in read_metrics(workdir).items():
    if not name.startswith(OF_THE_MACHINE):
      state[f"metric {name}"] = json.dumps(values)
  return state


def newest(workdir: pathlib.Path) -> int:
  """Returns the newest step that is wholly on disk, 0 without any."""
  return max(steps(workdir), default=0)


def steps(workdir: pathlib.Path) -> list[int]:
  folder = workdir / "checkpoints"
  names = os.listdir(folder) if folder.exists() else []
  return sorted(int(name) for name in names if name.isdigit())


def steps_taken(text: str) -> int:
  """Returns the last step that a run has told of."""
  return max((int(n) for n in re.findall(r"^step +(\d+)/", text, re.MULTILINE)), default=0)


def saves_in_work(workdir: pathlib.Path) -> list[str]:
  """Returns the names of the checkpoints that are being written, or were when it was killed."""
  folder = workdir / "checkpoints"
  return sorted(n for n in os.listdir(folder) if "tmp" in n) if folder.exists() else []


def _train(lab: Lab, folder: pathlib.Path) -> pathlib.Path:
  process = lab.start(_python(folder / "run"), _log(folder))
  ended = process.end(600)
  if ended.code != 0:
    raise RuntimeError(f"the reference run ended with {ended.code}: {ended.text[-2000:]}")
  return folder / "run"


def _python(workdir: pathlib.Path) -> list[str]:
  return [sys.executable, "-m", *command(workdir)]


def _log(folder: pathlib.Path) -> pathlib.Path:
  folder.mkdir(parents=True)
  return folder / "log"
