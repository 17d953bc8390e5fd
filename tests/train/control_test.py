# SPDX-License-Identifier: Apache-2.0
"""Real runs that are signalled, frozen, orphaned and doubled; each says so, saves and ends."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from mm1_jax.goodput import read_goodput
from mm1_jax.metrics import read_metrics

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).parents[2]
SAMPLE = ROOT / "mm1_jax" / "data" / "sample"
STOPPED = 75
SECONDS = 300  # that anything may take on a busy machine, but for what a test bounds
SMALL = {
  "model.vision.image_size": "(16, 16)",
  "model.vision.width": 16,
  "model.vision.depth": 1,
  "model.vision.num_heads": 2,
  "model.vision.mlp_dim": 16,
  "model.connector.kind": "average_pool",
  "model.connector.token_grid": "(2, 2)",
  "model.decoder.width": 16,
  "model.decoder.depth": 1,
  "model.decoder.head_dim": 4,
  "model.decoder.mlp_dim": 32,
  "data.batch_size": 4,
  "data.seq_len": 64,
  "data.images_per_row": 2,
  "data.window_rows": 32,
  "train.num_steps": 5000,
  "train.log_every": 1,
  "train.eval_every": 10000,
  "train.eval_batches": 1,
  "optimizer.warmup_steps": 2,
  "checkpoint.every": 10000,
}


class Run:
  """A run of the command on one device, its output in a file."""

  def __init__(self, workdir: pathlib.Path, log: pathlib.Path, **overrides):
    values = SMALL | {name.replace("__", "."): value for name, value in overrides.items()}
    self.workdir, self.log = workdir, log
    with log.open("wb") as out:
      self.process = subprocess.Popen(
        [sys.executable, "-u", "-m", "mm1_jax.main", "--config=configs/mm1_debug.py:dense"]
        + [f"--workdir={workdir}", f"--stopped-code={STOPPED}"]
        + [f"--config.{name}={value}" for name, value in values.items()],
        cwd=ROOT,
        env={
          **os.environ,
          "XLA_FLAGS": "--xla_force_host_platform_device_count=1"
          " --xla_backend_optimization_level=0",
        },
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,
      )

  @property
  def said(self) -> str:
    return self.log.read_text(errors="replace")

  @property
  def saved(self) -> list[int]:
    folder = self.workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdigit())

  @property
  def workers(self) -> list[psutil.Process]:
    children = psutil.Process(self.process.pid).children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

  def until(self, holds: str | Callable[[], bool]) -> None:
    """Returns when the run has said something that fits a pattern, or something holds."""
    deadline = time.monotonic() + SECONDS
    while not (re.search(holds, self.said) if isinstance(holds, str) else holds()):
      assert self.process.poll() is None, self.said[-3000:]
      assert time.monotonic() < deadline, self.said[-3000:]
      time.sleep(0.01)

  def step(self, number: int) -> None:
    self.until(rf"step +{number}/")

  def kill(self, number: int) -> None:
    os.kill(self.process.pid, number)

  def end(self, within: float = SECONDS) -> tuple[int, float]:
    """Returns the exit code and the seconds until the end."""
    begin = time.monotonic()
    code = self.process.wait(within)
    assert "Traceback" not in self.said, self.said[-3000:]
    return code, time.monotonic() - begin


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Run]]:
  """Starts runs in `tmp_path`/run; kills what is left of them."""
  runs: list[Run] = []

  def begin(**overrides) -> Run:
    runs.append(Run(tmp_path / "run", tmp_path / f"{len(runs)}.log", **overrides))
    return runs[-1]

  yield begin
  for run in runs:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(run.process.pid, signal.SIGKILL)  # what it left, too
    run.process.wait()


# --- signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_while_importing_ends_with_the_stopped_code(start, name):
  run = start()
  run.until(lambda: _catches_sigterm(run.process.pid))
  run.kill(getattr(signal, name))
  code, seconds = run.end()
  assert code == STOPPED
  assert f"stopped by {name} while starting" in run.said
  assert "training configs" not in run.said
  assert seconds < 10
  assert not (run.workdir / "owner.json").exists()


def _catches_sigterm(pid: int) -> bool:
  """Returns whether a process has a handler of its own for SIGTERM, which Python has not."""
  status = pathlib.Path(f"/proc/{pid}/status").read_text()
  caught = re.search(r"SigCgt:\s*(\w+)", status)
  assert caught
  return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("phase", ["images come with a full row", "mesh {"])
def test_a_signal_between_the_first_line_and_the_first_step(start, phase, tmp_path, monkeypatch):
  """While the data is looked at, and while the step is compiled."""
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cold"))
  run = start()
  run.until(re.escape(phase))
  run.kill(signal.SIGTERM)
  code, seconds = run.end()
  assert code == STOPPED
  assert "stopped by SIGTERM" in run.said
  assert seconds < 10
  assert run.saved == []
  assert not (run.workdir / "owner.json").exists()


def test_a_hangup_saves(start):
  run = start()
  run.step(3)
  run.kill(signal.SIGHUP)
  code, _ = run.end()
  assert code == STOPPED
  assert len(run.saved) == 1
  assert f"stopped by SIGHUP; saved at step {run.saved[0]}" in run.said


def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_run(start):
  """As Slurm sends it: else the workers die, and the run ends with their error."""
  run = start(data__num_workers=2)
  run.step(3)
  os.killpg(run.process.pid, signal.SIGTERM)
  code, _ = run.end()
  assert code == STOPPED
  assert len(run.saved) == 1
  assert "stopped by SIGTERM; saved at step" in run.said


def test_an_evaluation_looks_at_signals_and_comes_after_the_save(start, tmp_path):
  """What a signal interrupts is measured by the command that resumes there, and counts once."""
  many = {"train__eval_batches": 100_000, "data__eval_sources__captions__path": _copies(tmp_path)}
  few = {"train__eval_every": 4, "checkpoint__every": 4, "train__num_steps": 5}
  run = start(**few, **many, train__stall_seconds=1)
  run.until("step 4, waiting for the evaluation 'held out'")  # planning it, and compiling
  begun, told = time.monotonic(), 0
  while time.monotonic() < begun + 4:
    if (num := run.said.count("waiting for the evaluation")) > told:
      begun, told = time.monotonic(), num
    time.sleep(0.1)
  run.kill(signal.SIGTERM)
  code, seconds = run.end()
  assert code == STOPPED
  assert seconds < 10
  assert run.saved == [4]
  assert not [name for name in read_metrics(run.workdir) if name.startswith("eval")]
  run = start(**few)
  assert run.end()[0] == 0
  assert list(read_metrics(run.workdir)["eval/loss/captions"]) == [4, 5]
  run = start(**few)
  assert run.end()[0] == 0
  assert "eval/loss" not in run.said


def _copies(folder: pathlib.Path) -> str:
  """Returns a glob of held-out shards that take a while: one of the sample's, many times."""
  sample = SAMPLE / "captions-train-00000-of-00002.arrayrecord"
  for i in range(6):
    shutil.copy(sample, folder / f"captions-{i:05d}-of-00006.arrayrecord")
  return f"{folder}/captions-*.arrayrecord"


# --- waiting


def test_a_worker_that_stands_still_is_told_and_the_run_can_be_stopped(start):
  run = start(data__num_workers=1, data__prefetch_batches=1, train__stall_seconds=5)
  run.step(3)
  (worker,) = run.workers
  worker.suspend()
  told = r"no progress for \d+ s since step ([3-9]|\d\d+), waiting for the next batch"
  run.until(told)
  newest = int(re.findall(told, run.said)[-1])
  run.kill(signal.SIGTERM)
  code, seconds = run.end()
  assert code == STOPPED
  assert seconds < 25
  assert run.saved == [newest]
  assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_a_killed_worker_ends_the_run_after_a_save(start):
  run = start(data__num_workers=1)
  run.step(3)
  (worker,) = run.workers
  worker.kill()
  code, _ = run.end()
  assert code == 1
  assert re.search(r"error: a data worker was killed while batch \d+ was made", run.said)
  (step,) = run.saved
  assert step == max(read_metrics(run.workdir)["loss"])
  assert f"saved at step {step} before the error that follows" in run.said


def test_workers_die_with_a_killed_run(start):
  run = start(data__num_workers=2)
  run.step(3)
  workers = run.workers
  assert len(workers) == 2
  run.kill(signal.SIGKILL)
  _, alive = psutil.wait_procs(workers, timeout=10)
  assert not [w for w in alive if w.status() != psutil.STATUS_ZOMBIE]


# --- the owner


def test_a_second_run_in_a_workdir_is_refused(start):
  first = start()
  first.step(2)
  owner = json.loads((first.workdir / "owner.json").read_text())
  second = start()
  code, _ = second.end()
  assert code == 1
  error = second.said.strip().splitlines()[-1]
  assert error.startswith(f"error: another run has the workdir '{first.workdir}': process ")
  assert f"process {first.process.pid} on {owner['host']}, since {owner['since']}" in error
  first.step(10)
  first.kill(signal.SIGTERM)
  assert first.end()[0] == STOPPED
  assert not (first.workdir / "owner.json").exists()


def test_a_killed_runs_workdir_is_free_and_its_goodput_counts_what_was_kept(start):
  """Steps 6 to 8 are taken twice; those of the killed command are lost."""
  run = start(checkpoint__every=5, train__num_steps=400)
  run.until(lambda: run.saved == [5])
  run.step(8)
  run.kill(signal.SIGKILL)
  run.process.wait()
  assert (run.workdir / "owner.json").exists()
  killed = read_goodput(run.workdir)
  assert killed
  time.sleep(3)
  run = start(checkpoint__every=100, train__num_steps=20)
  assert run.end()[0] == 0
  assert re.search(r"goodput \d+%: .* and 2 commands", run.said)
  spent = read_goodput(run.workdir)
  assert spent
  assert (spent.commands, killed.commands) == (2, 1)
  assert 1.5 <= spent.down < 60  # a process's start is known to a second
  assert spent.starting > killed.starting
  assert spent.retaken > killed.retaken == 0
  assert spent.training > 0
  lines = [json.loads(x) for x in (run.workdir / "metrics.jsonl").read_text().splitlines()]
  span = lines[-1]["time"] - lines[0]["launched"]
  assert spent.total == pytest.approx(span, abs=0.1)
