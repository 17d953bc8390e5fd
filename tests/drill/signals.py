# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, Ctrl-C and SIGHUP in every phase: the stopped exit code, all saved, no traceback."""

import functools
import pathlib
import signal
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from tests.drill import runs
from tests.drill.core import Expected, Fault, Outcome, Scene
from tests.drill.process import Process
from tests.drill.runs import STOPPED

TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
WITHIN = 25  # seconds that GKE leaves after SIGTERM
# A run that is told to stop before its first step has saved nothing; Ctrl-C then ends it as any
# program, with 130.
BY_INTERRUPT = (STOPPED, 130)


class Phase(NamedTuple):
  """When a signal comes, and what makes that moment long enough to meet."""

  moment: str | Callable[[pathlib.Path], Any]  # a pattern, or a call with the workdir
  overrides: Mapping[str, Any] = types.MappingProxyType({})
  resumed: bool = False  # from the base
  cold: bool = False  # compiles
  width: float = 0.0  # seconds after the moment, at most


PHASES = {
  "importing": Phase(lambda workdir: True, width=1.5),
  "data": Phase(r"^training "),
  "compiling": Phase(r"^mesh \{", cold=True, width=2),
  "restoring": Phase(r"images come", resumed=True),
  "stepping": Phase(r"step +7/"),
  "evaluating": Phase(r"step +12/", {"train.eval_batches": 40}),
  "saving": Phase(runs.saves_in_work),
  "feeding": Phase(r"step +7/", {"data.num_workers": 2}),
}
QUICK = ("term-importing", "term-evaluating", "term-saving", "hup-stepping")


def faults() -> Iterator[Fault]:
  for name, phase in PHASES.items():
    yield _fault(f"term-{name}", phase, (TERM,))
  for name in ("importing", "compiling", "stepping", "feeding"):
    yield _fault(f"int-{name}", PHASES[name], (INT,))
  for name in ("importing", "stepping", "saving"):
    yield _fault(f"hup-{name}", PHASES[name], (HUP,))
  yield _fault("int-twice", PHASES["stepping"], (INT, INT))
  yield _fault("term-then-int", PHASES["stepping"], (TERM, INT))
  yield Fault("signals/of-a-build", of_a_build)


def _fault(name: str, phase: Phase, sent: tuple[signal.Signals, ...]) -> Fault:
  strike = functools.partial(stop, phase=phase, sent=sent)
  return Fault(f"signals/{name}", strike, quick=name in QUICK)


def stop(scene: Scene, *, phase: Phase, sent: tuple[signal.Signals, ...]) -> None:
  """Sends the signals in a phase; what was done until then is saved, and the run can continue."""
  workdir = scene.folder / "run"
  runs.reference(scene.lab)
  if phase.resumed:
    runs.copy_of_base(scene)
  env = {"JAX_COMPILATION_CACHE_DIR": str(scene.folder / "programs")} if phase.cold else {}
  process = runs.start(scene, phase.overrides, env=env)
  moment = phase.moment
  process.wait_for(moment if isinstance(moment, str) else lambda: moment(workdir))
  time.sleep(scene.dice.uniform(0, phase.width))
  process.strike(sent[0], _reached(process, sent[0]))
  for number in sent[1:]:
    time.sleep(scene.dice.uniform(0.05, 0.3))
    if not process.ended():
      process.strike(number)
  # A second signal may end it at once: it then dies of it, with nothing else lost.
  died = tuple(-number for number in sent[1:])
  codes = (STOPPED, *died) if INT not in sent else (*BY_INTERRUPT, *died)
  before = runs.steps_taken(process.text)
  ended = scene.finish(process, Expected(codes, within=WITHIN))
  if len(sent) == 1 and ended.code == STOPPED and runs.newest(workdir) < before:
    scene.add(Outcome.LOST, f"step {before} was taken, {runs.newest(workdir)} is saved")
  workers = {k: v for k, v in phase.overrides.items() if k.startswith("data.")}
  # Of an evaluation that was cut off, the figures may be missing.
  runs.restart(scene, workers, besides="metric eval/" if phase == PHASES["evaluating"] else None)


def of_a_build(scene: Scene) -> None:
  """Ctrl-C in `data.build`: one line or none, code 130."""
  rows = '{"text": "words of a document, again and again"}\n' * 200_000
  (scene.folder / "rows.jsonl").write_text(rows)
  args = ("text", f"--input={scene.folder}/rows.jsonl", f"--output={scene.folder}/out/rows")
  process = scene.start("mm1_jax.data.build", *args)
  process.wait_for(lambda: (scene.folder / "out").exists())
  process.strike(INT)
  scene.finish(process, Expected((130,), within=WITHIN))


def _reached(process: Process, number: signal.Signals) -> list[int]:
  """Returns whom a signal reaches: a terminal's Ctrl-C goes to workers, too."""
  return [process.pid, *process.children()] if number == INT else []
