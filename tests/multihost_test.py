# SPDX-License-Identifier: Apache-2.0
"""Several processes on this machine, each with a few of eight CPU devices, as one run.

However the devices are dealt out to processes, and however often these die or are stopped, losses
agree with those of one process to 1e-6 (sums over devices come in another order), and data order,
counters and saved steps exactly.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np
import pytest

from mm1_jax import distributed
from mm1_jax.config import ConfigError
from mm1_jax.metrics import read_metrics
from mm1_jax.sharding import arrange

ROOT = pathlib.Path(__file__).parents[1]
NUM_DEVICES, NUM_STEPS = 8, 6
TIMEOUT = 400  # seconds that any test's processes have, on a machine that is busy
PEER_TIMEOUT = 10
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
  "data.batch_size": 8,
  "data.seq_len": 64,
  "data.images_per_row": 2,
  "data.window_rows": 32,
  "train.num_steps": NUM_STEPS,
  "train.log_every": 1,
  "train.eval_every": NUM_STEPS,
  "train.eval_batches": 1,
  "optimizer.warmup_steps": 2,
  "checkpoint.every": 2,
  "mesh.data": 2,
  "mesh.fsdp": 4,
}


class Ended(NamedTuple):
  code: int
  out: str
  err: str
  seconds: float  # since the first of them ended, or was killed


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def start(
  workdir: pathlib.Path,
  num_processes: int = 1,
  *,
  hooks: dict[int, list] | None = None,
  **overrides,
) -> list[subprocess.Popen]:
  """Starts a run's processes; `hooks` are what multihost_worker.py does to one of them.

  An override is for all of them, or a list with one value for each.
  """
  port, processes, environment = free_port(), [], dict(os.environ)
  if num_processes > 1:
    # Only the first process writes compiled programs. Where it finds them and the others compile,
    # it waits for them at the first collective: 30 s, and then Gloo gives up.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  for i in range(num_processes):
    args = ["--config=configs/mm1_debug.py", f"--workdir={workdir}"]
    values = SMALL | {name.replace("__", "."): value for name, value in overrides.items()}
    for name, value in values.items():
      args.append(f"--config.{name}={value[i] if isinstance(value, list) else value}")
    if num_processes > 1:
      args += [f"--coordinator=localhost:{port}", f"--num-processes={num_processes}"]
      args += [f"--process-id={i}", f"--peer-timeout={PEER_TIMEOUT}", "--start-timeout=120"]
    flags = f"--xla_force_host_platform_device_count={NUM_DEVICES // num_processes}"
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
    hook = json.dumps((hooks or {}).get(i))
    process = subprocess.Popen(
      [sys.executable, "-m", "tests.helpers.multihost_worker", hook, *args],
      cwd=ROOT,
      env=environment | {"XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0"},
      stdout=out,
      stderr=err,
      start_new_session=True,
    )
    process.files = out, err  # pyright: ignore[reportAttributeAccessIssue]
    processes.append(process)
  return processes


def finish(processes: list[subprocess.Popen]) -> list[Ended]:
  """Waits for all processes; those that do not end are killed, and fail the test."""
  deadline, ended = time.monotonic() + TIMEOUT, {}
  try:
    while len(ended) < len(processes) and time.monotonic() < deadline:
      for i, process in enumerate(processes):
        if i not in ended and process.poll() is not None:
          ended[i] = time.monotonic()
      time.sleep(0.05)
  finally:
    hanging = [i for i, process in enumerate(processes) if process.poll() is None]
    for i in hanging:
      os.killpg(processes[i].pid, signal.SIGKILL)
      processes[i].wait()
  results, first = [], min(ended.values(), default=deadline)
  for i, process in enumerate(processes):
    texts = []
    for file in process.files:  # pyright: ignore[reportAttributeAccessIssue]
      file.seek(0)
      texts.append(file.read().decode(errors="replace"))
      file.close()
    results.append(Ended(process.returncode, *texts, ended.get(i, 0) - first))
  assert not hanging, f"processes {hanging} hang:\n" + "\n".join(r.err[-3000:] for r in results)
  return results


def run(workdir: pathlib.Path, num_processes: int = 1, **kwargs) -> list[Ended]:
  return finish(start(workdir, num_processes, **kwargs))


def check_ok(results: list[Ended]) -> None:
  for result in results:
    assert result.code == 0, result.err[-3000:]
    assert "Traceback" not in result.err


def errors(result: Ended) -> list[str]:
  return [line for line in result.err.splitlines() if line.startswith("error:")]


def saved_steps(workdir: pathlib.Path) -> list[int]:
  return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def data_state(workdir: pathlib.Path, step: int) -> str:
  return (workdir / "checkpoints" / str(step) / "data" / "metadata").read_text()


def params(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  import orbax.checkpoint as ocp

  with ocp.PyTreeCheckpointer() as checkpointer:
    path = workdir / "checkpoints" / str(step) / "params"
    names = checkpointer.metadata(path).item_metadata.keys()
    # As numpy: the devices it was saved from are not here.
    args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    return checkpointer.restore(path, ocp.args.PyTreeRestore(restore_args=args))


EXACT = ("data/", "lr", "skipped")
LOSSES = ("loss", "eval/loss")
UNEQUAL = ("speed/", "memory/")


def assert_same_run(actual: pathlib.Path, expected: pathlib.Path, *, step: int = NUM_STEPS) -> None:
  a, b = read_metrics(actual), read_metrics(expected)
  assert a.keys() == b.keys()
  for name, values in b.items():
    if name.startswith(UNEQUAL):
      continue
    assert list(a[name]) == list(values), name
    rel = 0 if name.startswith(EXACT) else 1e-6 if name.startswith(LOSSES) else 1e-5
    assert list(a[name].values()) == pytest.approx(list(values.values()), rel=rel, nan_ok=True), (
      name
    )
  assert list(b["loss"]) == list(range(1, NUM_STEPS + 1))
  assert data_state(actual, step) == data_state(expected, step)
  a, b = params(actual, step), params(expected, step)
  assert a.keys() == b.keys()
  for name, value in b.items():
    # Keys' bias has no gradient but rounding, which AdamW makes as large as any other.
    if "key_bias" not in name:
      np.testing.assert_allclose(a[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> pathlib.Path:
  """The run of one process with eight devices that was never interrupted."""
  workdir = tmp_path_factory.mktemp("straight") / "run"
  check_ok(run(workdir))
  return workdir


@pytest.mark.long
def test_two_processes_are_the_same_run_as_one(straight, tmp_path):
  workdir = tmp_path / "run"
  results = run(workdir, 2)
  check_ok(results)
  assert_same_run(workdir, straight)
  assert saved_steps(workdir) == [2, 4, 6]
  # Process 0 alone logs and writes; nothing is left beside the run.
  assert "step 6/6" in re.sub(" +", " ", results[0].out)
  assert results[1].out.count("step ") == 0
  assert "mesh" in results[0].err
  assert "mesh" not in results[1].err
  assert sum("resumed" in line for line in (workdir / "metrics.jsonl").open()) == 1
  assert {p.name for p in workdir.iterdir()} == {p.name for p in straight.iterdir()}


@pytest.mark.long
def test_benchmarks_inside_a_run_are_scored_by_all_processes(tmp_path):
  sample = ROOT / "mm1_jax" / "data" / "sample"
  tasks = {"nats": {"form": "nats"}, "said": {"form": "mm1"}}
  given = {
    f"eval_tasks__{name}__{key}": value
    for name, task in tasks.items()
    for key, value in {**task, "task": "records:captions", "data": sample, "limit": 3}.items()
  }
  scores = []
  for num in (1, 2):
    workdir = tmp_path / str(num)
    check_ok(run(workdir, num, data__seq_len=128, mesh__tensor=2, mesh__fsdp=2, **given))
    metrics = read_metrics(workdir)
    names = [name for name in metrics if name.startswith("eval_tasks/")]
    scores.append({name: metrics[name][NUM_STEPS] for name in names})
  assert any("nats_per_token" in name for name in scores[0])
  assert any("cider" in name for name in scores[0])
  assert scores[1] == pytest.approx(scores[0], rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_on_two_continues_on_one(straight, tmp_path, victim):
  """kill -9 of one process in step 4: the other ends by itself, and says why."""
  workdir = tmp_path / "run"
  results = run(workdir, 2, hooks={victim: ["SIGKILL", 4]})
  assert results[victim].code == -signal.SIGKILL
  survivor = results[1 - victim]
  assert survivor.code != 0
  assert survivor.seconds < PEER_TIMEOUT + 20
  # JAX's own words where process 0, with what all share, is gone before Python hears of it.
  ours = f"process {victim} of 2 died or cannot be reached"
  jaxs = "another task died"
  assert ours in survivor.err or jaxs in survivor.err, survivor.err[-3000:]
  assert saved_steps(workdir) == [2]
  results = run(workdir, 1)
  check_ok(results)
  assert "resuming at step 2" in results[0].err
  assert_same_run(workdir, straight)


@pytest.mark.long
def test_a_frozen_process_ends_the_others(tmp_path):
  """As a host does that swaps, or has lost the network: nothing closes its connections.

  When it moves again, the others are gone, and it ends too, whatever it was waiting for.
  """
  processes = start(tmp_path / "run", 2, hooks={1: ["SIGSTOP", 3]}, checkpoint__every=1)
  begin = time.monotonic()
  while processes[0].poll() is None and time.monotonic() < begin + TIMEOUT:
    time.sleep(0.1)
  os.killpg(processes[1].pid, signal.SIGCONT)
  moves = time.monotonic()
  processes[1].wait(TIMEOUT)
  assert time.monotonic() - moves < PEER_TIMEOUT + 30
  results = finish(processes)
  assert results[1].code != 0
  assert results[0].code not in (0, -signal.SIGKILL)
  assert "another task died" in results[0].err
  assert "stopped sending heartbeats" in results[0].err


@pytest.mark.long
def test_sigterm_to_one_stops_all_at_one_step(straight, tmp_path):
  """And two processes, then one continue from there, as the same run."""
  workdir = tmp_path / "run"
  results = run(workdir, 4, hooks={2: ["SIGTERM", 3]})
  check_ok(results)
  assert saved_steps(workdir) == [2, 3]
  assert "stopped by another process; saved at step 3, run again to continue" in results[0].err
  results = run(workdir, 2, hooks={1: ["SIGTERM", 5]})
  check_ok(results)
  assert "resuming at step 3" in results[0].err
  assert saved_steps(workdir)[-1] == 5
  check_ok(run(workdir, 1))
  assert_same_run(workdir, straight)


@pytest.mark.long
def test_all_go_back_from_a_damaged_checkpoint(straight, tmp_path):
  """A file is cut off that process 1 alone reads: its params are split over all devices."""
  workdir, mesh = tmp_path / "run", {"mesh__data": 1, "mesh__fsdp": NUM_DEVICES}
  check_ok(run(workdir, 2, hooks={0: ["SIGTERM", 4]}, **mesh))
  assert saved_steps(workdir) == [2, 4]
  folder = workdir / "checkpoints" / "4" / "params" / "ocdbt.process_1" / "d"
  path = max(folder.iterdir(), key=lambda p: p.stat().st_size)
  os.truncate(path, path.stat().st_size // 2)
  results = run(workdir, 2, **mesh)
  check_ok(results)
  assert "step 4 is left out and now" in results[0].err
  assert "process 1: '" in results[0].err
  assert "resuming at step 2" in results[0].err
  assert "left out" not in results[1].err
  assert saved_steps(workdir) == [2, 4, 6]
  assert (workdir / "checkpoints" / "4.damaged").exists()
  assert data_state(workdir, NUM_STEPS) == data_state(straight, NUM_STEPS)


@pytest.mark.long
def test_all_set_a_ruined_checkpoint_aside(tmp_path):
  """The first step has a rate of 0, the second ruins the params, which are saved."""
  settings = {"train__num_steps": 20, "checkpoint__every": 1, "checkpoint__keep": 1}
  results = run(tmp_path, 2, optimizer__learning_rate=1e30, **settings)
  for result in results:
    assert result.code == 1, result.err[-3000:]
    assert "The last good checkpoint is that of step 1; the next start resumes" in result.err
    assert f"is now {tmp_path}/checkpoints/2.refused" in result.err
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2.refused"]


@pytest.mark.long
def test_metrics_of_an_object_store_are_there_to_the_last_save(straight, tmp_path):
  """kill -9 in step 6, of which the steps saved (every second one) and evaluated are read back."""
  workdir = tmp_path / "run"
  (result,) = run(workdir, hooks={0: ["SIGKILL", 6, "bucket"]}, train__eval_every=5)
  assert result.code == -signal.SIGKILL
  assert not (workdir / "metrics.jsonl").exists()
  metrics = read_metrics(workdir)
  assert list(metrics["loss"]) == [1, 2, 3, 4, 5]
  assert list(metrics["eval/loss/captions"]) == [5]
  check_ok(run(workdir, hooks={0: [None, None, "bucket"]}))
  assert_same_run(workdir, straight)
  assert not (workdir / "metrics.jsonl").exists()


@pytest.mark.long
def test_metrics_of_an_object_store_are_written_before_a_process_ends_itself(tmp_path):
  """Process 0 waits in a step for process 1, which failed; nothing was saved before."""
  hooks = {0: [None, None, "bucket"], 1: ["DataError", 5]}
  results = run(tmp_path / "run", 2, hooks=hooks, checkpoint__every=NUM_STEPS)
  assert [result.code for result in results] == [1, 1]
  assert list(read_metrics(tmp_path / "run")["loss"])[:3] == [1, 2, 3]


@pytest.mark.long
def test_a_data_error_on_one_ends_all_with_it(tmp_path):
  results = run(tmp_path / "run", 2, hooks={1: ["DataError", 3]})
  for result in results:
    assert result.code == 1, result.err[-3000:]
    assert result.seconds < 15
  (mine,), (others,) = errors(results[1]), errors(results[0])
  assert mine == "error: source 'text', record 7: not a record at all"
  assert others == "error: process 1 of 2 failed: source 'text', record 7: not a record at all"


@pytest.mark.long
def test_drops_are_judged_over_all_processes(straight, tmp_path):
  """Alone, process 1 is over the limit; together they are under it. The log has the sum."""
  hooks = {1: ["drop", 30]}
  workdir = tmp_path / "run"
  check_ok(run(workdir, 2, hooks=hooks, data__max_drop_fraction=0.8))
  dropped = read_metrics(workdir)["data/dropped"]
  assert list(dropped.values()) == [30.0] * NUM_STEPS
  results = run(tmp_path / "other", 2, hooks=hooks, data__max_drop_fraction=0.7)
  for result in results:
    assert result.code == 1
    (line,) = errors(result)
    assert re.search(r"error: \d+ of \d+ examples were dropped .* more than data.max_drop_", line)


@pytest.mark.long
@pytest.mark.parametrize(
  ("overrides", "says"),
  [
    (
      {"optimizer__learning_rate": [1e-3, 2e-3]},
      "differ in code and config: optimizer.learning_rate is 0.002 on process 1 and 0.001 on",
    ),
    ({"mesh__tensor": 3}, "needs 24 devices; there are 8"),
  ],
)
def test_a_mistake_ends_all_with_its_message(tmp_path, overrides, says):
  results = run(tmp_path / "run", 2, **overrides)
  for result in results:
    assert result.code == 1, result.err[-3000:]
    (line,) = errors(result)
    assert says in line
    assert "Traceback" not in result.err
  assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.long
def test_workdirs_that_are_not_one(tmp_path):
  results = run(tmp_path / "run", 2, hooks={1: ["workdir", str(tmp_path / "local")]})
  (line,) = errors(results[1])
  assert "'" + str(tmp_path / "local") + "' is not one folder for all" in line
  assert "process 1 of 2 failed" in errors(results[0])[0]


def test_processes_that_do_not_come():
  """If its peers never start, a process says so in time, whichever it is."""
  program = (
    "import sys\nfrom mm1_jax import distributed as d\n"
    "with d.joined(d.Cluster(sys.argv[1], 2, int(sys.argv[2])), start_timeout=2): pass\n"
  )
  address = f"localhost:{free_port()}", f"localhost:{free_port()}"
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", program, address[i], str(i)],
      cwd=ROOT,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  said = [process.communicate(timeout=600)[1] for process in processes]
  for i, (process, err) in enumerate(zip(processes, said, strict=True)):
    assert process.returncode == 1
    assert f"error: process {i} of 2 waited 2 s for the others at {address[i]}" in err
  assert "it answers, but others have not come" in said[0]
  assert "cannot be reached" in said[1]
  assert "is process 0 running there" in said[1]


# --- where devices and rows go


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU's attributes in JAX: a host has 2 x 2 of them."""

  id: int
  coords: tuple[int, int, int]
  slice_index: int
  process_index: int
  platform: str = "tpu"
  device_kind: str = "TPU v5p"
  core_on_chip: int = 0


def chips(shape: tuple[int, int, int], num_slices: int = 1) -> list[Chip]:
  """Returns the chips of slices in the order that JAX lists them: host by host."""
  found = []
  for s in range(num_slices):
    for i, (x, y, z) in enumerate(np.ndindex(*shape)):
      host = (x // 2 * (shape[1] // 2) + y // 2) * shape[2] + z
      num_hosts = shape[0] * shape[1] * shape[2] // 4
      found.append(Chip(s * math.prod(shape) + i, (x, y, z), s, s * num_hosts + host))
  return sorted(found, key=lambda c: (c.process_index, c.id))


def test_slices_are_joined_by_the_data_axis_alone():
  grid = arrange((4, 16, 1, 1), chips((4, 4, 2), num_slices=2))
  slices = np.vectorize(lambda c: c.slice_index, otypes=[int])(grid)
  assert grid.shape == (4, 16, 1, 1)
  assert (slices == np.array([0, 0, 1, 1]).reshape(4, 1, 1, 1)).all()


def test_an_axis_of_the_mesh_runs_along_the_torus():
  """Neighbours in `tensor` are neighbours in the torus; JAX's own list would not have it so."""
  for sizes in ((1, 16, 1, 4), (1, 32, 1, 2)):  # the second only fits with a torus axis split
    grid = arrange(sizes, chips((4, 4, 4)))
    coords = np.array([c.coords for c in grid.reshape(-1)]).reshape(*sizes, 3)
    steps = np.abs(np.diff(coords, axis=3)).sum(-1)
    assert (steps == 1).all()


def test_slices_that_do_not_divide():
  with pytest.raises(ConfigError, match=r"mesh.data 1 .* 2 slices.*mesh.data=2 would fit"):
    arrange((1, 32, 1, 1), chips((4, 2, 2), num_slices=2))


# --- finding each other


@pytest.fixture
def environment(monkeypatch):
  for name in list(os.environ):
    if name.startswith(("SLURM_", "JAX_COORD", "JAX_NUM_P", "JAX_PROCESS", "TPU_", "MEGASCALE_")):
      monkeypatch.delenv(name)

  def setenv(**variables):
    for name, value in variables.items():
      monkeypatch.setenv(name, str(value))

  return setenv


def test_one_process_initialises_nothing(environment):
  assert distributed.find_cluster() is None
  assert distributed.find_cluster("localhost:1234", 1, 0) is None
  environment(**SLURM | {"SLURM_NTASKS": 1})
  assert distributed.find_cluster() is None


SLURM = {
  "SLURM_JOB_ID": 4096 * 3 + 5,
  "SLURM_STEP_NODELIST": "gpu[007-010],other1",
  "SLURM_NTASKS": 4,
  "SLURM_PROCID": 2,
  "SLURM_LOCALID": 0,
}


def test_slurm(environment):
  environment(**SLURM)
  assert distributed.find_cluster() == distributed.Cluster(f"gpu007:{65535 - 4095 + 5}", 4, 2)


def test_gke_slices(environment, monkeypatch):
  """Two slices of two hosts: this is host 1 of slice 1."""
  from jax._src.clusters import cloud_tpu_cluster

  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  environment(
    TPU_WORKER_HOSTNAMES="a,b",
    TPU_WORKER_ID=1,
    MEGASCALE_COORDINATOR_ADDRESS="localhost",
    MEGASCALE_NUM_SLICES=2,
    MEGASCALE_SLICE_ID=1,
  )
  assert distributed.find_cluster() == distributed.Cluster("localhost:8482", 4, 3)


def test_flags_win_over_the_environment(environment):
  environment(JAX_COORDINATOR_ADDRESS="h:1", JAX_NUM_PROCESSES=3, JAX_PROCESS_ID=2, **SLURM)
  assert distributed.find_cluster() == distributed.Cluster("h:1", 3, 2)
  assert distributed.find_cluster("g:2", None, 0) == distributed.Cluster("g:2", 3, 0)


@pytest.mark.parametrize(
  ("given", "says"),
  [
    (("h:1", None, None), "--num-processes, --process-id not given, but --coordinator"),
    ((None, 2, 0), "--coordinator not given"),
    (("h", 2, 0), "'h'; it must be HOST:PORT"),
    (("h:1", 2, 2), r"--process-id 2 must lie in \[0, --num-processes = 2\)"),
  ],
)
def test_half_given(environment, given, says):
  with pytest.raises(ConfigError, match=says):
    distributed.find_cluster(*given)


def test_a_variable_that_is_no_number(environment):
  environment(JAX_NUM_PROCESSES="two")
  with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES is 'two'"):
    distributed.find_cluster()
