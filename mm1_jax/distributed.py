# SPDX-License-Identifier: Apache-2.0
"""Several processes, one on each host, as one run: they meet, agree, and end together.

JAX's coordination service, which runs in process 0, connects the processes, and ends all of them
when one is silent for too long. Besides, each process has a watcher, a thread that reads from the
service whether another one has failed: else a process would wait in a collective for ever for one
that raised. With one process, all of this does nothing.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from etils import epath
from jax._src import clusters  # no public function finds a cluster
from jax._src import distributed as service  # nor gives the store that processes share
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mm1_jax.config import ConfigError, UserError
from mm1_jax.sharding import LAYOUT

FAILED, SAME, SAID = "mm1_jax/failed", "mm1_jax/same", "mm1_jax/said"  # keys in the store
POLL_SECONDS = 1.0
GRACE_SECONDS = 3.0  # for the others to report why they failed
SAY_SECONDS = 2.0
LAST_SECONDS = 10.0  # for what is to be written before the end
SHARED_SECONDS = 60.0  # network file systems keep listings for up to a minute
WAIT_MS = 30 * 60_000  # for each other, where one may have more work


@dataclasses.dataclass(frozen=True)
class Cluster:
  """A process's number among those of its run, and where they meet."""

  coordinator: str  # HOST:PORT of process 0
  num_processes: int
  process_id: int


def find_cluster(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Cluster | None:
  """Returns the cluster that is given, or else found in the environment; None for one process.

  Looked for are, in this order: the arguments; the variables JAX_COORDINATOR_ADDRESS,
  JAX_NUM_PROCESSES and JAX_PROCESS_ID; a TPU slice (or several) on GKE or of TPU VMs; Slurm.

  Raises:
    ConfigError: only a part is given, or the numbers do not fit.
  """
  given = {
    "--coordinator": coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
    "--num-processes": _number("JAX_NUM_PROCESSES", num_processes),
    "--process-id": _number("JAX_PROCESS_ID", process_id),
  }
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given):
    return _detect()
  if missing:
    raise ConfigError(
      f"{', '.join(missing)} not given, but {', '.join(n for n in given if n not in missing)}: all "
      "three are needed (or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID)."
    )
  cluster = Cluster(*given.values())  # pyright: ignore[reportArgumentType]
  host, _, port = cluster.coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise ConfigError(f"--coordinator is '{cluster.coordinator}'; it must be HOST:PORT.")
  if not 0 <= cluster.process_id < cluster.num_processes:
    raise ConfigError(
      f"--process-id {cluster.process_id} must lie in [0, --num-processes = "
      f"{cluster.num_processes})."
    )
  return cluster if cluster.num_processes > 1 else None


def _number(variable: str, value: int | None) -> int | None:
  text = os.environ.get(variable)
  if value is not None or text is None:
    return value
  if not text.isdigit():
    raise ConfigError(f"the environment's {variable} is '{text}'; it must be a number.")
  return int(text)


def _detect() -> Cluster | None:
  # JAX's own choice would also take one device of a Slurm task that has all of a host's.
  for kind in (clusters.GkeTpuCluster, clusters.GceTpuCluster, clusters.SlurmCluster):
    if kind.is_env_present():
      if kind.get_process_count() == 1:
        return None
      address = kind.get_coordinator_address(300, os.environ.get("JAX_COORDINATOR_PORT"))
      return Cluster(address, kind.get_process_count(), kind.get_process_id())
  return None


@contextlib.contextmanager
def joined(
  cluster: Cluster | None, *, start_timeout: int = 300, peer_timeout: int = 60
) -> Iterator[None]:
  """Joins the other processes for the block. An exception that leaves it ends all of them.

  In a cluster such an exception is not raised further: the process says what happened, as do the
  others, and exits with code 1 at once, for cleaning up would wait for processes that may be gone.

  Args:
    cluster: what `find_cluster` returned; None leaves everything as it is.
    start_timeout: seconds in which all processes must come.
    peer_timeout: seconds after which a silent process counts as dead.
  """
  if cluster is None:
    yield
    return
  _meet(cluster, start_timeout, peer_timeout)
  if cluster.process_id:
    logging.set_verbosity(logging.WARNING)  # process 0 logs for all
  ending = _Ending(cluster)
  _JOINED.append(ending)
  watcher = _Watcher(ending, peer_timeout)
  watcher.start()
  try:
    yield
  except BaseException as e:
    if not isinstance(e, UserError):
      traceback.print_exc()
    # The runtime raises where another process is gone; all else is this process's own failure.
    ending.now(f"error: {_describe(e)}", cause=not isinstance(e, jax.errors.JaxRuntimeError))
  watcher.stop()
  jax.distributed.shutdown()
  _JOINED.remove(ending)


_JOINED: list["_Ending"] = []  # of the processes that this one is one of, if any


def leave(reason: str, code: int) -> NoReturn:
  """Says why and ends this process with a code, with those that it has joined; from any thread."""
  for ending in _JOINED:
    ending.now(reason, cause=True, code=code)
  _say(reason)
  _make_last_calls()
  _end(code)


def _end(code: int) -> NoReturn:
  for child in multiprocessing.active_children():
    child.kill()
  os._exit(code)


def _meet(cluster: Cluster, start_timeout: int, peer_timeout: int) -> None:
  def give_up() -> None:
    host, _, port = cluster.coordinator.rpartition(":")
    try:
      socket.create_connection((host, int(port)), timeout=5).close()
      found = "it answers, but others have not come: start all of them, with the same numbers"
    except OSError as e:
      found = f"it cannot be reached ({e}): is process 0 running there, and the port open?"
    _say(
      f"error: process {cluster.process_id} of {cluster.num_processes} waited {start_timeout} s "
      f"for the others at {cluster.coordinator}; {found}."
    )
    os._exit(1)

  # SIGTERM is `train.loop`'s to handle.
  jax.config.update("jax_enable_preemption_service", False)
  timer = threading.Timer(start_timeout, give_up)  # JAX's own time-out is an abort
  timer.daemon = True
  timer.start()
  jax.distributed.initialize(
    cluster.coordinator,
    cluster.num_processes,
    cluster.process_id,
    cluster_detection_method="deactivate",
    initialization_timeout=start_timeout + 60,
    heartbeat_timeout_seconds=peer_timeout,
    shutdown_timeout_seconds=peer_timeout,
  )
  timer.cancel()


_LAST: list[Callable[[], None]] = []


@contextlib.contextmanager
def before_exit(call: Callable[[], None]) -> Iterator[None]:
  """Calls `call`, from another thread, if this process ends itself while in the block.

  Then no `finally` runs: the block may be waiting for a process that is gone.
  """
  _LAST.append(call)
  try:
    yield
  finally:
    _LAST.remove(call)


def _make_last_calls() -> None:
  """Makes the calls of all `before_exit`; waits `LAST_SECONDS` for them, as the exit must come."""
  threads = [threading.Thread(target=call, daemon=True) for call in _LAST]
  deadline = time.monotonic() + LAST_SECONDS
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(max(0.0, deadline - time.monotonic()))


class _Ending:
  """Ends this process when its run cannot continue, with the reason that all processes give."""

  def __init__(self, cluster: Cluster):
    self._cluster = cluster
    self._once = threading.Lock()

  def said(self) -> dict[int, tuple[bool, str, int]]:
    """Returns, by process, whether it is the cause, its reason and its exit code."""
    found = _store().key_value_dir_get(FAILED)
    return {int(key.rsplit("/", 1)[1]): tuple(json.loads(value)) for key, value in found}

  def now(self, reason: str, *, cause: bool, code: int = 1) -> NoReturn:
    """Tells the others, says what happened, and exits; does not return.

    Args:
      reason: a line, that begins with "error: " if it is one.
      cause: whether this process is; else the reason and the code are another's, if that told.
      code: of the exit.
    """
    self._once.acquire()  # never released: a second thread waits here for the exit
    me = self._cluster.process_id
    try:
      key, value = f"{FAILED}/{me}", json.dumps([cause, reason, code])
      _store().key_value_set(key, value, allow_overwrite=True)
      if not cause:
        reason, code = self._reason(reason, code)
    except jax.errors.JaxRuntimeError:
      text = reason.removeprefix("error: ")
      reason = f"error: process 0 of {self._cluster.num_processes} no longer answers. {text}"
    _say(reason)
    _make_last_calls()
    if me == 0:
      time.sleep(2 * GRACE_SECONDS)  # the others read what was said from here
    _end(code)

  def _reason(self, seen: str, code: int) -> tuple[str, int]:
    num = self._cluster.num_processes
    deadline = time.monotonic() + GRACE_SECONDS
    while True:
      said = self.said()
      causes = [(i, text, code) for i, (cause, text, code) in sorted(said.items()) if cause]
      if causes:
        first, text, code = causes[0]
        failed = text.removeprefix("error: ")
        if failed == text:  # it was stopped
          return f"process {first} of {num} has ended: {text}", code
        return f"error: process {first} of {num} failed: {failed}", code
      if time.monotonic() > deadline:
        break
      time.sleep(POLL_SECONDS / 4)
    gone = sorted(set(range(num)) - said.keys())
    if not gone:
      return seen or next(text for _, text, _ in said.values() if text), code
    names = f"process {gone[0]}" if len(gone) == 1 else f"processes {gone}"
    return (
      f"error: {names} of {num} died or cannot be reached; the log there may tell why. Start all "
      "of them again to continue from the newest checkpoint.",
      code,
    )


class _Watcher(threading.Thread):
  """Ends this process when another says that it failed, or process 0 no longer answers."""

  def __init__(self, ending: _Ending, peer_timeout: int):
    super().__init__(name="mm1_jax.distributed", daemon=True)
    self._ending, self._peer_timeout = ending, peer_timeout
    self._done = threading.Event()

  def run(self) -> None:
    answered = time.monotonic()
    while not self._done.wait(POLL_SECONDS):
      try:
        failed = self._ending.said()
        answered = time.monotonic()
      except jax.errors.JaxRuntimeError as e:
        # JAX's service notices too, and aborts; but not in a process that stood still meanwhile.
        if time.monotonic() - answered > self._peer_timeout:
          self._ending.now(f"error: {_describe(e)}", cause=False)
        continue
      if failed:
        self._ending.now("", cause=False)

  def stop(self) -> None:
    self._done.set()
    self.join()


def _store() -> Any:
  """Returns the coordination service's client, with the store that all processes share."""
  return service.global_state.client


def _describe(error: BaseException) -> str:
  if isinstance(error, UserError):
    return str(error)
  lines = str(error).splitlines() or [""]
  return f"{type(error).__name__}: {lines[0]}"


def _say(reason: str) -> None:
  """Prints it; returns after a while where nothing reads what is written."""

  def say() -> None:
    print(reason, file=sys.stderr, flush=True)
    sys.stdout.flush()

  thread = threading.Thread(target=say, daemon=True)
  thread.start()
  thread.join(SAY_SECONDS)


def from_first(name: str, value: Any) -> Any:
  """Returns process 0's value, plain JSON, on all; each name can be used once."""
  if jax.process_count() == 1:
    return value
  key = f"mm1_jax/first/{name}"
  if jax.process_index() == 0:
    _store().key_value_set(key, json.dumps(value))
  return json.loads(_store().blocking_key_value_get(key, WAIT_MS))


def check_same(what: str, values: Mapping[str, Any]) -> None:
  """Compares plain nested values over the processes; returns once all have found them equal.

  Each `what` can be compared once.

  Raises:
    ConfigError: they differ from process 0's; the message names the first key that does.
  """
  if jax.process_count() == 1:
    return
  key = f"{SAME}/{what}"
  mine = dict(_flatten(json.loads(json.dumps(values))))
  if jax.process_index() == 0:
    _store().key_value_set(key, json.dumps(mine))
  theirs = json.loads(_store().blocking_key_value_get(key, WAIT_MS))
  for name in {**theirs, **mine}:
    if mine.get(name) != theirs.get(name):
      raise ConfigError(
        f"the processes differ in {what}: {name} is {mine.get(name)!r} on process "
        f"{jax.process_index()} and {theirs.get(name)!r} on process 0. Start all of them with the "
        "same command, code and files."
      )
  barrier(key)


def everyone(what: str, value: Any) -> list[Any]:
  """Returns what each process gives, in their order, once all have; plain JSON values.

  Each `what` can be used once.
  """
  if jax.process_count() == 1:
    return [value]
  key = f"{SAID}/{what}"
  _store().key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
  barrier(key)
  said = {int(k.rsplit("/", 1)[1]): json.loads(v) for k, v in _store().key_value_dir_get(key)}
  return [said[i] for i in range(jax.process_count())]


def code_version() -> dict[str, str]:
  """Returns what must be equal on all processes of a run besides its config."""
  package = pathlib.Path(__file__).parent
  digest = hashlib.sha256()
  for path in sorted(package.rglob("*.py")):
    digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
  return {"mm1_jax": digest.hexdigest()[:12], "jax": jax.__version__}


def _flatten(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  pairs = values.items() if isinstance(values, dict) else enumerate(values)
  for key, value in pairs:
    if isinstance(value, dict | list) and value:
      yield from _flatten(value, f"{path}{key}.")
    else:
      yield f"{path}{key}", value


def barrier(name: str) -> None:
  """Returns when every process has called it; each name can be used once."""
  if jax.process_count() > 1:
    _store().wait_at_barrier(name, WAIT_MS)


def check_shared(folder: epath.PathLike) -> None:
  """Checks that a path is the same folder for all processes; it is made if missing.

  Raises:
    ConfigError: this process does not see what process 0 wrote there.
  """
  if jax.process_count() == 1:
    return
  folder = epath.Path(folder)
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"shared-{uuid.uuid4().hex}.tmp"
    (folder / name).write_text("Written by process 0, looked for by the others.\n")
    _store().key_value_set("mm1_jax/shared", name)
  path = folder / _store().blocking_key_value_get("mm1_jax/shared", WAIT_MS)
  deadline = time.monotonic() + SHARED_SECONDS
  while not path.exists():
    if time.monotonic() > deadline:
      raise ConfigError(
        f"--workdir '{folder}' is not one folder for all: process {jax.process_index()} does not "
        "see what process 0 writes there. Use gs:// or a network file system."
      )
    time.sleep(POLL_SECONDS)
  barrier("mm1_jax/shared")
  if jax.process_index() == 0:
    path.unlink()


@functools.lru_cache
def process_rows(mesh: Mesh) -> tuple[int, int]:
  """Returns (i, n): of n equal shares of a batch's rows, this process's devices hold share i.

  There are fewer shares than processes where `tensor` spans several hosts: those hold the same
  rows, and each makes them.

  Raises:
    ConfigError: the mesh gives the processes shares that overlap.
  """
  num_devices = mesh.devices.size
  blocks: dict[int, set[int]] = {}
  rows = NamedSharding(mesh, LAYOUT.act_b).devices_indices_map((num_devices,))
  for device, (index,) in rows.items():
    blocks.setdefault(device.process_index, set()).add(index.start or 0)
  shares = sorted({tuple(sorted(block)) for block in blocks.values()})
  if sum(map(len, shares)) != len(set().union(*shares)) or len({*map(len, shares)}) > 1:
    raise ConfigError(
      f"mesh {dict(mesh.shape)}: hosts hold rows of a batch that overlap in part; let the devices "
      "of a host, or whole hosts, make up each length of `tensor` and `sequence`."
    )
  return shares.index(tuple(sorted(blocks[jax.process_index()]))), len(shares)


def sum_over_processes(values: np.ndarray, mesh: Mesh) -> jax.Array | np.ndarray:
  """Returns the sums of `float32[K]` over the processes, the same everywhere; does not wait.

  Processes that hold the same rows of a batch (see `process_rows`) count as one.
  All processes must call it in the same order with their other computations.
  """
  if jax.process_count() == 1:
    return values
  _, num_shares = process_rows(mesh)
  rows = np.zeros((jax.local_device_count(), *values.shape), np.float32)
  rows[0] = values * (num_shares / jax.process_count())
  sharding = NamedSharding(mesh, P(mesh.axis_names))
  return _sum(jax.make_array_from_process_local_data(sharding, rows))


@jax.jit
def _sum(rows: jax.Array) -> jax.Array:
  return rows.sum(axis=0)
