# SPDX-License-Identifier: Apache-2.0
"""Two owners of one folder at once, and what a crashed one leaves."""

import signal
from collections.abc import Iterator

from tests.drill import runs
from tests.drill.core import REFUSED, Expected, Fault, Scene

SAYS_OWNED = r"(?i)another (run|process)|in use|owner|lock"


def faults() -> Iterator[Fault]:
  yield Fault("owners/second-run", second_run, quick=True)
  yield Fault("owners/both-at-once", both_at_once)
  yield Fault("owners/after-a-crash", after_a_crash)
  yield Fault("owners/frozen-owner", frozen_owner)
  yield Fault("owners/asked-while-training", asked_while_training)
  yield Fault("owners/two-builds", two_builds)


def second_run(scene: Scene) -> None:
  """The second is refused in one line that names the first; the first ends as if alone."""
  runs.reference(scene.lab)
  first = runs.start(scene, {"train.eval_batches": 1})
  first.wait_for(r"^step +2/")
  first.strike(signal.SIGSTOP)  # so that the second meets it
  second = runs.start(scene)
  scene.finish(second, Expected((REFUSED,), says=SAYS_OWNED))
  first.strike(signal.SIGCONT)
  scene.finish(first, Expected(within=180), shown=False)
  scene.keeps(runs.differences(scene, scene.folder / "run"))


def both_at_once(scene: Scene) -> None:
  """Started in the same moment: one of the two trains, the other is refused."""
  runs.reference(scene.lab)
  both = [runs.start(scene), runs.start(scene)]
  codes = sorted(
    ended.code if ended.code is not None else -1
    for ended in [
      scene.finish(process, Expected((0, REFUSED), within=180), shown=False) for process in both
    ]
  )
  scene.message = f"exit codes {codes}"
  if codes != [0, REFUSED]:
    scene.keeps([f"exit codes {codes}, not one of 0 and one of {REFUSED}"])
  else:
    scene.keeps(runs.differences(scene, scene.folder / "run"))


def after_a_crash(scene: Scene) -> None:
  """What kill -9 leaves does not keep the next launch out."""
  runs.copy_of_base(scene)
  process = runs.start(scene)
  process.wait_for(r"^step +1[3-9]/")
  process.strike(signal.SIGKILL)
  process.end(30)
  runs.restart(scene)
  scene.message = "continued"


def frozen_owner(scene: Scene) -> None:
  """An owner that is stopped, whose heartbeat may be old, is not taken for dead on its host."""
  runs.reference(scene.lab)
  first = runs.start(scene)
  first.wait_for(r"^step +2/")
  first.strike(signal.SIGSTOP)
  second = runs.start(scene)
  scene.finish(second, Expected((REFUSED,), says=SAYS_OWNED))
  first.strike(signal.SIGKILL)
  first.end(30)
  runs.restart(scene)


def asked_while_training(scene: Scene) -> None:
  """Readers need not own a run: a model is asked while its next steps are trained."""
  runs.copy_of_base(scene)
  process = runs.start(scene)
  process.wait_for(r"^step +1[3-9]/")
  process.strike(signal.SIGSTOP)
  args = (f"--checkpoint={scene.folder}/run", "--prompt=What is this?", "--max-new-tokens=2")
  asked = scene.start("mm1_jax.inference.generate", *args)
  scene.finish(asked, Expected())
  process.strike(signal.SIGCONT)
  scene.finish(process, Expected(within=180), shown=False)
  scene.keeps(runs.differences(scene, scene.folder / "run"))


def two_builds(scene: Scene) -> None:
  """One set of shards is made: both builds end well, or one is refused."""
  rows = "".join(f'{{"text": "document {i} has words, {i * i} of them"}}\n' for i in range(20_000))
  (scene.folder / "rows.jsonl").write_text(rows)

  def build(folder: str):
    args = (f"--input={scene.folder}/rows.jsonl", f"--output={scene.folder}/{folder}/rows")
    return scene.start("mm1_jax.data.build", "text", *args, "--rows-per-shard=2000")

  for process in [build("alone"), build("two"), build("two")]:
    scene.finish(process, Expected((0, REFUSED), within=180))
  alone, two = (
    {path.name: path.read_bytes() for path in (scene.folder / name).glob("*.arrayrecord")}
    for name in ("alone", "two")
  )
  scene.keeps([name for name in {**alone, **two} if alone.get(name) != two.get(name)])
