# SPDX-License-Identifier: Apache-2.0
"""Damaged files of a run: each is told by its name, or mended; none changes what is trained.

A run that is started again on a damaged checkpoint must say so and continue from the one before, to
the same end as the reference.
"""

import functools
import pathlib
import shutil
from collections.abc import Callable, Iterator

from tests.drill import runs
from tests.drill.core import REFUSED, Expected, Fault, Outcome, Scene, told

# What a line about a damaged checkpoint has: its step or file, and that it is damaged.
DAMAGED = r"(?i)damaged|cannot be read|checksum|not what was (written|saved)|corrupt"
Damage = Callable[[Scene, pathlib.Path], None]  # given a step's folder, or the workdir


def faults() -> Iterator[Fault]:
  damages: dict[str, Damage] = {
    "params-bit": functools.partial(flip, item="params", bits=1),
    "params-bit-again": functools.partial(flip, item="params", bits=1),
    "params-100-bits": functools.partial(flip, item="params", bits=100),
    "optimizer-bit": functools.partial(flip, item="train", bits=1),
    "optimizer-100-bits": functools.partial(flip, item="train", bits=100),
    "params-truncated": functools.partial(truncate, item="params"),
    "optimizer-truncated": functools.partial(truncate, item="train"),
    "params-metadata-bit": flip_metadata,
    "params-removed": lambda scene, step: shutil.rmtree(step / "params"),
    "data-state-truncated": lambda scene, step: _halve(step / "data" / "metadata"),
    "data-state-changed": change_data_state,
    "step-emptied": empty,
  }
  quick = ("params-100-bits", "params-truncated", "data-state-changed")
  for name, damage in damages.items():
    strike = functools.partial(damaged_step, damage=damage)
    yield Fault(f"files/{name}", strike, quick=name in quick)
  harmless: dict[str, Damage] = {
    "metrics-torn": lambda scene, workdir: _cut(workdir / "metrics.jsonl", 17),
    "good-json-torn": lambda scene, workdir: _cut(workdir / "good.json", 5),
    "unfinished-step": lambda scene, workdir: _unfinished(workdir),
    "foreign-files": _foreign,
  }
  for name, damage in harmless.items():
    yield Fault(f"files/{name}", functools.partial(harmless_damage, damage=damage))
  yield Fault("files/config-json-torn", config_torn)
  yield Fault("files/all-steps-truncated", all_steps)
  yield Fault("files/programs-torn", programs_torn)
  yield Fault("files/chat-of-damaged-params", ask_damaged, quick=True)


def damaged_step(scene: Scene, *, damage: Damage) -> None:
  """Damages the newest checkpoint, and starts the run again."""
  workdir, step = runs.copy_of_base(scene)
  damage(scene, workdir / "checkpoints" / str(step))
  ended = scene.finish(runs.start(scene), Expected((0, REFUSED), within=180))
  if ended.code == 0:
    if told(ended, DAMAGED) is None:
      if wrong := runs.differences(scene, workdir):
        scene.add(Outcome.WRONG, "restored without a word")
        scene.keeps(wrong)
      return  # the damage was to bytes that mean nothing
    scene.message = told(ended, DAMAGED) or ""
    scene.keeps(runs.differences(scene, workdir))
  elif ended.code == REFUSED:
    scene.add(Outcome.LOST, f"not resumed from the step before: {scene.message}")
    scene.kept = False
    if told(ended, DAMAGED) is None:
      scene.add(Outcome.WRONG, f"no word of the damage: {scene.message}")


def harmless_damage(scene: Scene, *, damage: Damage) -> None:
  """What a crash leaves, or a user, is no reason to refuse a run."""
  workdir, _ = runs.copy_of_base(scene)
  damage(scene, workdir)
  runs.restart(scene)


def config_torn(scene: Scene) -> None:
  """config.json is only compared: it is told of and written again, or refused in one line."""
  workdir, _ = runs.copy_of_base(scene)
  _cut(workdir / "config.json", 300)
  ended = scene.finish(runs.start(scene), Expected((0, REFUSED), says=r"config\.json", within=180))
  if ended.code == 0:
    scene.keeps(runs.differences(scene, workdir))


def all_steps(scene: Scene) -> None:
  """No checkpoint is whole: one line; nothing is deleted, and the run does not begin again."""
  workdir, _ = runs.copy_of_base(scene)
  folders = [workdir / "checkpoints" / str(step) for step in runs.steps(workdir)]
  for folder in folders:
    truncate(scene, folder, item="params")
  scene.finish(runs.start(scene), Expected((REFUSED,), says=DAMAGED, within=120))
  files = sum(path.is_file() for path in (workdir / "checkpoints").rglob("*"))
  if files < sum(path.is_file() for folder in folders for path in folder.rglob("*")):
    scene.keeps(["checkpoints were deleted"])


def programs_torn(scene: Scene) -> None:
  """Compiled programs, as a crash may leave them: compiled again."""
  runs.reference(scene.lab)
  cache = shutil.copytree(scene.lab.env["JAX_COMPILATION_CACHE_DIR"], scene.folder / "programs")
  for path in cache.rglob("*"):
    if path.is_file():
      _halve(path)
  process = runs.start(scene, env={"JAX_COMPILATION_CACHE_DIR": str(cache)})
  scene.finish(process, Expected(within=180))
  scene.keeps(runs.differences(scene, scene.folder / "run"))


def ask_damaged(scene: Scene) -> None:
  """A step that is named is refused by `ask`, in one line; it takes no other one."""
  workdir, step = runs.copy_of_base(scene)
  folder = workdir / "checkpoints" / str(step)
  truncate(scene, folder, item="params")
  args = (f"--checkpoint={folder}", "--prompt=What is this?", "--max-new-tokens=3")
  process = scene.start("mm1_jax.inference.generate", *args)
  scene.finish(process, Expected((REFUSED,), says=DAMAGED))


def flip(scene: Scene, step: pathlib.Path, *, item: str, bits: int) -> None:
  """Flips bits of the item's largest file, which has its arrays."""
  path = max((p for p in (step / item).rglob("*") if p.is_file()), key=_size)
  _flip(scene, path, bits)


def flip_metadata(scene: Scene, step: pathlib.Path) -> None:
  _flip(scene, step / "params" / "_METADATA", 1)


def truncate(scene: Scene, step: pathlib.Path, *, item: str) -> None:
  for path in (step / item).rglob("*"):
    if path.is_file() and "/d/" in str(path):
      _halve(path)


def change_data_state(scene: Scene, step: pathlib.Path) -> None:
  """The data's state is valid JSON, of another batch."""
  path = step / "data" / "metadata"
  batch = f'"batch": {step.name}'
  text = path.read_text()
  if batch not in text:
    raise RuntimeError(f"{path} has no {batch}")
  path.write_text(text.replace(batch, f'"batch": {int(step.name) - 1}', 1))


def empty(scene: Scene, step: pathlib.Path) -> None:
  for path in step.iterdir():
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _size(path: pathlib.Path) -> int:
  return path.stat().st_size


def _flip(scene: Scene, path: pathlib.Path, bits: int) -> None:
  data = bytearray(path.read_bytes())
  for _ in range(bits):
    data[scene.dice.randrange(len(data))] ^= 1 << scene.dice.randrange(8)
  path.write_bytes(data)


def _halve(path: pathlib.Path) -> None:
  _cut(path, path.stat().st_size - path.stat().st_size // 2)


def _cut(path: pathlib.Path, count: int) -> None:
  """Takes bytes off the end."""
  data = path.read_bytes()
  path.write_bytes(data[: len(data) - count])


def _unfinished(workdir: pathlib.Path) -> None:
  """A checkpoint that was being written, as it was killed."""
  step = runs.newest(workdir)
  name = f"{step + runs.SAVE_EVERY}.orbax-checkpoint-tmp"
  shutil.copytree(workdir / "checkpoints" / str(step) / "data", workdir / "checkpoints" / name)


def _foreign(scene: Scene, workdir: pathlib.Path) -> None:
  (workdir / "checkpoints" / ".DS_Store").write_bytes(scene.dice.randbytes(64))
  (workdir / "checkpoints" / "notes.txt").write_text("the run that looked good\n")
  (workdir / "notes").mkdir()
