# SPDX-License-Identifier: Apache-2.0
"""Configs that change between launches, or are wrong: refused by the key's name, or told.

No launch may continue a run with other settings without a word.
"""

import functools
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

from tests.drill import runs
from tests.drill.core import REFUSED, Expected, Fault, Scene

# Key, another value, and whether it is refused: else the launch says that it has changed.
CHANGES: dict[str, tuple[str, Any, bool]] = {
  "width": ("model.decoder.width", 32, True),
  "rope-theta": ("model.decoder.rope_theta", 1e6, True),
  "activation": ("model.vision.activation", "gelu", True),
  "experts": ("model.decoder.moe.top_k", 1, True),
  "row-length": ("data.seq_len", 128, True),
  "batch": ("data.batch_size", 8, True),
  "data-seed": ("data.seed", 1, True),
  "mixture": ("data.sources.captions.weight", 0.9, True),
  "optimizer": ("optimizer.name", "adafactor", True),
  "rate": ("optimizer.learning_rate", 1e-3, False),
  "train-seed": ("train.seed", 9, False),
  "fewer-kept": ("checkpoint.keep", 2, False),
}
QUICK = ("rope-theta", "data-seed", "rate")
MISTAKES = {
  "unknown-key": (["--config.train.num_stepz=3"], "num_steps"),
  "wrong-type": (["--config.train.num_steps=three"], r"train\.num_steps"),
  "no-such-flag": (["--wrkdir=x"], "--workdir"),
  "no-such-file": (["--config=no_such_file.py"], "no_such_file"),
  "nul-in-workdir": (["--workdir=/proc/self/mem/x"], "/proc/self/mem"),
}
FILES = {
  "syntax-error": "def get_config(:\n",
  "raises": "def get_config():\n  return {}['x']\n",
  "returns-nothing": "def get_config():\n  pass\n",
  "no-function": "config = 3\n",
  "binary": "\x00\x01\x02",
}


def faults() -> Iterator[Fault]:
  for name, (key, value, refused) in CHANGES.items():
    strike = functools.partial(changed, key=key, value=value, refused=refused)
    yield Fault(f"configs/changed-{name}", strike, quick=name in QUICK)
  for name, (flags, says) in MISTAKES.items():
    strike = functools.partial(mistaken, flags=flags, says=says)
    yield Fault(f"configs/{name}", strike, quick=name == "unknown-key")
  for name, text in FILES.items():
    yield Fault(f"configs/file-{name}", functools.partial(bad_file, text=text))


def changed(scene: Scene, *, key: str, value: Any, refused: bool) -> None:
  """Starts a run again with one setting changed."""
  workdir, _ = runs.copy_of_base(scene)
  before = _hashes(workdir)
  process = runs.start(scene, {key: value})
  # A setting may be told of by the part that has changed with it: the shape of an array, the data.
  says = rf"{key.rpartition('.')[2]}|{key}" if refused else rf"changed.*{key}"
  scene.finish(process, Expected((REFUSED,) if refused else (0,), says=says, within=180))
  if refused and _hashes(workdir) != before:
    scene.keeps(["checkpoints or config.json were changed"])


def mistaken(scene: Scene, *, flags: list[str], says: str) -> None:
  command = runs.command(scene.folder / "run")
  scene.finish(scene.start(*command, *flags), Expected((REFUSED,), says=says))


def bad_file(scene: Scene, *, text: str) -> None:
  path = scene.folder / "own_config.py"
  path.write_text(text)
  process = scene.start("mm1_jax.main", f"--config={path}", f"--workdir={scene.folder}/run")
  scene.finish(process, Expected((REFUSED,), says=r"own_config\.py"))


def _hashes(workdir: pathlib.Path) -> dict[str, str]:
  paths = [*(workdir / "checkpoints").rglob("*"), workdir / "config.json"]
  files = [path for path in paths if path.is_file()]
  return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
