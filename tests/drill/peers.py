# SPDX-License-Identifier: Apache-2.0
"""A run of two processes on this machine (gloo): one is killed, frozen, stopped, or differs."""

import functools
import pathlib
import re
import signal
import socket
from collections.abc import Iterator
from typing import Any

from tests.drill import runs
from tests.drill.core import REFUSED, Expected, Fault, Outcome, Scene
from tests.drill.process import Ended, Process
from tests.drill.runs import STOPPED

PEER_TIMEOUT = 10  # seconds
WITHIN = PEER_TIMEOUT + 50  # on a machine that is busy
# JAX's own end of a process whose peers are gone is an abort.
ENDS_WITH_ITS_PEER = (REFUSED, -signal.SIGABRT)
SAYS_DIED = r"process \d of 2 died or cannot|another task died|stopped sending heartbeats"


def faults() -> Iterator[Fault]:
  for victim in (0, 1):
    strike = functools.partial(killed, victim=victim)
    yield Fault(f"peers/killed-{victim}", strike, quick=victim == 1)
  yield Fault("peers/frozen", frozen)
  yield Fault("peers/terminated", terminated)
  yield Fault("peers/other-config", other_config)
  yield Fault("peers/never-comes", never_comes)


def start(scene: Scene, workdir: pathlib.Path, *different: dict[str, Any]) -> list[Process]:
  """Starts the two processes; `different` are overrides of each."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  flags = (f"--coordinator={address}", "--num-processes=2", f"--peer-timeout={PEER_TIMEOUT}")
  # Where only one finds its compiled program in a cache, gloo does not wait for the other.
  env = {"JAX_COMPILATION_CACHE_DIR": None}
  each = different or ({}, {})
  return [
    runs.start(scene, each[i], *flags, f"--process-id={i}", workdir=workdir, env=env)
    for i in (0, 1)
  ]


def killed(scene: Scene, *, victim: int) -> None:
  """The other ends by itself, in one line; both continue as if nothing was."""
  processes = start(scene, scene.folder / "run")
  _reach(processes)
  processes[victim].strike(signal.SIGKILL)
  _survivor(scene, processes, victim)
  _restart(scene)


def frozen(scene: Scene) -> None:
  """As a host that swaps, or has lost the network: nothing closes its connections."""
  processes = start(scene, scene.folder / "run")
  _reach(processes)
  processes[1].strike(signal.SIGSTOP)
  _survivor(scene, processes, 1)
  _restart(scene)


def terminated(scene: Scene) -> None:
  """SIGTERM to one: both stop at one step, with all saved."""
  processes = start(scene, scene.folder / "run")
  _reach(processes)
  processes[1].strike(signal.SIGTERM)
  processes[0].struck = processes[1].struck
  scene.finish(processes[1], Expected((STOPPED,), within=WITHIN), shown=False)
  scene.finish(processes[0], Expected((STOPPED,), says="stopped by another process", within=WITHIN))
  _restart(scene)


def other_config(scene: Scene) -> None:
  rates = [{"optimizer.learning_rate": rate} for rate in (1e-3, 2e-3)]
  for process in start(scene, scene.folder / "run", *rates):
    scene.finish(process, Expected((REFUSED,), says="optimizer.learning_rate", within=120))


def never_comes(scene: Scene) -> None:
  flags = ("--coordinator=localhost:1", "--num-processes=2", "--process-id=1", "--start-timeout=3")
  scene.finish(runs.start(scene, {}, *flags), Expected((REFUSED,), says="waited 3 s", within=90))


def _reach(processes: list[Process]) -> None:
  processes[0].wait_for(r"^step +7/")


def _survivor(scene: Scene, processes: list[Process], victim: int) -> None:
  survivor = processes[1 - victim]
  survivor.struck = processes[victim].struck
  ended = survivor.end(scene.patient(WITHIN))
  processes[victim].kill()
  scene.seconds, scene.message = ended.seconds, _said(ended)
  if ended.code is None:
    scene.add(Outcome.HUNG, f"still there after {WITHIN} s")
  elif ended.code not in ENDS_WITH_ITS_PEER:
    scene.add(Outcome.WRONG, f"exit code {ended.code}: {scene.message}")
  elif not scene.message:
    scene.add(Outcome.WRONG, f"no line says that the other one died: {ended.text[-300:]}")


def _said(ended: Ended) -> str:
  return next((line for line in ended.text.splitlines() if re.search(SAYS_DIED, line)), "")


def _restart(scene: Scene) -> None:
  for process in start(scene, scene.folder / "run"):
    scene.finish(process, Expected(within=240), shown=False)
  wanted = scene.lab.once("peers", functools.partial(_whole, scene))
  scene.keeps(runs.names_that_differ(wanted, runs.final_state(scene.folder / "run")))


def _whole(scene: Scene, folder: pathlib.Path) -> dict[str, str]:
  """Returns what two processes make that nothing befell."""
  folder.mkdir()
  processes = start(scene, folder / "run")
  codes = [process.end(400).code for process in processes]
  if codes != [0, 0]:
    raise RuntimeError(f"the run of two processes ended with {codes}: {processes[0].text[-2000:]}")
  return runs.final_state(folder / "run")
