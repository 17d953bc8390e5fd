# SPDX-License-Identifier: Apache-2.0
"""Disks that are full, read-only, or no folder at all."""

import contextlib
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

from tests.drill import runs
from tests.drill.core import REFUSED, Expected, Fault, NotRun, Outcome, Scene, shell

FULL = r"(?i)no space left|disk is full|ENOSPC|file too large"
READ_ONLY = r"(?i)read-only|cannot be written|permission"
NEEDS = "a tmpfs cannot be mounted here; `unshare --map-root-user --mount make drill` can"


def faults() -> Iterator[Fault]:
  yield Fault("disks/full-while-saving", full_while_saving, quick=True)
  yield Fault("disks/full-from-the-start", full_from_the_start)
  yield Fault("disks/full-while-logging", full_while_logging)
  yield Fault("disks/full-between-saves", full_between_saves)
  yield Fault("disks/files-of-200-kb", small_files)
  yield Fault("disks/read-only-new", read_only_new)
  yield Fault("disks/read-only-resumed", read_only_resumed)
  yield Fault("disks/workdir-is-a-file", workdir_is_a_file, quick=True)
  yield Fault("disks/workdir-below-a-file", workdir_below_a_file)
  yield Fault("disks/full-while-building", full_while_building)


@contextlib.contextmanager
def tmpfs(scene: Scene, size: str) -> Iterator[pathlib.Path]:
  """Mounts a file system of that size in the scene's folder."""
  folder = scene.folder / "disk"
  folder.mkdir()
  mount = ("mount", "-t", "tmpfs", f"-osize={size}", "tmpfs", folder)
  if not shutil.which("mount") or _run(*mount) != 0:
    raise NotRun(NEEDS)
  try:
    yield folder
  finally:
    scene.close()  # a program at work would keep it
    _run("umount", "--lazy", folder)


def full_while_saving(scene: Scene) -> None:
  """Room for few checkpoints; once there is more, the run continues from the last whole one."""
  runs.reference(scene.lab)
  with tmpfs(scene, "5m") as disk:
    workdir, many = disk / "run", {"checkpoint.keep": 50}
    process = runs.start(scene, many, workdir=workdir)
    scene.finish(process, Expected((REFUSED,), says=FULL, within=120))
    _run("mount", "-oremount,size=100m", disk)
    runs.restart(scene, many, workdir=workdir)


def full_from_the_start(scene: Scene) -> None:
  with tmpfs(scene, "16k") as disk:
    process = runs.start(scene, workdir=disk / "run")
    scene.finish(process, Expected((REFUSED,), says=FULL, within=120))


def full_while_logging(scene: Scene) -> None:
  """The disk fills up while metrics are written, and no save is due: TensorBoard's thread dies."""
  runs.reference(scene.lab)
  rare = {"checkpoint.every": 10_000, "train.eval_every": 10_000, "train.num_steps": 300}
  with tmpfs(scene, "5m") as disk:
    process = runs.start(scene, rare, workdir=disk / "run")
    process.wait_for(r"^step +10/")
    _fill(disk)
    # It may end with the error, or leave out what cannot be written, and save at its end or not.
    ended = scene.finish(process, Expected((0, REFUSED), says=FULL, within=120))
    if ended.code == 0 and runs.newest(disk / "run") != 300:
      scene.add(Outcome.LOST, "exit code 0, and the last step is not saved")


def full_between_saves(scene: Scene) -> None:
  """Full after a save; with room again, the run continues from there."""
  runs.reference(scene.lab)
  with tmpfs(scene, "8m") as disk:
    process = runs.start(scene, workdir=disk / "run")
    process.wait_for(r"^step +7/")
    _fill(disk)
    scene.finish(process, Expected((0, REFUSED), says=FULL, within=120))
    (disk / "fill").unlink()
    runs.restart(scene, workdir=disk / "run")


def small_files(scene: Scene) -> None:
  """No file may be larger than 200 kB (RLIMIT_FSIZE), as with a quota."""
  runs.reference(scene.lab)
  process = runs.start(scene, wrapped=shell("ulimit -f 200"))
  scene.finish(process, Expected((REFUSED,), says=FULL, within=120))
  runs.restart(scene)


def read_only_new(scene: Scene) -> None:
  with tmpfs(scene, "8m") as disk:
    _run("mount", "-oremount,ro", disk)
    process = runs.start(scene, workdir=disk / "run")
    scene.finish(process, Expected((REFUSED,), says=READ_ONLY))


def read_only_resumed(scene: Scene) -> None:
  workdir, _ = runs.copy_of_base(scene)
  with tmpfs(scene, "20m") as disk:
    shutil.copytree(workdir, disk / "run")
    _run("mount", "-oremount,ro", disk)
    process = runs.start(scene, workdir=disk / "run")
    scene.finish(process, Expected((REFUSED,), says=READ_ONLY))
    _run("mount", "-oremount,rw", disk)
    runs.restart(scene, workdir=disk / "run")


def workdir_is_a_file(scene: Scene) -> None:
  workdir = scene.folder / "run"
  workdir.write_text("not a folder\n")
  scene.finish(runs.start(scene), Expected((REFUSED,), says=r"run'?"))
  if workdir.read_text() != "not a folder\n":
    scene.keeps(["the file was written over"])


def workdir_below_a_file(scene: Scene) -> None:
  (scene.folder / "file").write_text("")
  process = runs.start(scene, workdir=scene.folder / "file" / "run")
  scene.finish(process, Expected((REFUSED,), says="file"))


def full_while_building(scene: Scene) -> None:
  """`data.build`: told in one line; with room again, it continues and makes the same shards."""
  rows = "".join(f'{{"text": "document {i} has words, {i * i} of them"}}\n' for i in range(40_000))
  source = scene.folder / "rows.jsonl"
  source.write_text(rows)

  def build(output: pathlib.Path):
    args = (f"--input={source}", f"--output={output}/rows", "--rows-per-shard=4000")
    return scene.start("mm1_jax.data.build", "text", *args)

  scene.finish(build(scene.folder / "whole"), Expected(within=180), shown=False)
  with tmpfs(scene, "1m") as disk:
    scene.finish(build(disk / "out"), Expected((REFUSED,), says=FULL, within=120))
    _run("mount", "-oremount,size=100m", disk)
    scene.finish(build(disk / "out"), Expected(within=180), shown=False)
    whole, again = (_shards(folder) for folder in (scene.folder / "whole", disk / "out"))
    scene.keeps([name for name in {**whole, **again} if whole.get(name) != again.get(name)])


def _shards(folder: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.glob("*.arrayrecord")}


def _fill(disk: pathlib.Path) -> None:
  subprocess.run(
    ["dd", "if=/dev/zero", f"of={disk}/fill", "bs=4k"], capture_output=True, check=False
  )


def _run(*command: str | pathlib.Path) -> int:
  return subprocess.run(command, capture_output=True, check=False).returncode
