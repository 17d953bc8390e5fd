# SPDX-License-Identifier: Apache-2.0
"""Compiles a run's program for a slice that is not there, and caches the result.

The compiler is the real one, `libtpu`, which works on any Linux machine with an x86 CPU. A result
is kept under the hash of its content: the traced program, the slice, options and versions.

Nearly all of its time goes into the code of each operation. By then memory is assigned and the
schedule made, so a compile that stops there takes seconds, and tells all but the step's time.
"""

import dataclasses
import gzip
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Literal, NamedTuple

from absl import logging

from mm1_jax.config import ConfigError, RunConfig, UserError
from mm1_jax.plan.memory import Buffer
from mm1_jax.plan.topology import Topology

What = Literal["train", "prefill", "decode"]

_HLO, _RESULT = "hlo.txt.gz", "result.json"
DUMP = "dump"  # folder of what a compile that stops early has written
_COMMAND = ("-m", "mm1_jax.plan.worker")
_POLL_SECONDS = 0.5
_ASSIGNED = ".after_optimizations_after_buffer_assignment.txt"
_ALLOCATIONS = ".after_optimizations-buffer-assignment.txt"
# What a process that compiles for a TPU but has none needs; set before JAX is imported.
_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",  # no question to Google Cloud's metadata server
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no lock on a TPU that is not used
  "TF_CPP_MIN_LOG_LEVEL": "1",
}


class PlanError(UserError):
  """A plan cannot be made; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class CompileRequest:
  """What the worker process is asked for."""

  run: dict  # RunConfig.to_dict()
  topology: str
  num_slices: int
  what: What
  options: dict[str, str | bool]  # of the compiler
  libtpu: str  # its version
  cache: str
  quick: bool = False  # stop before code is generated


@dataclasses.dataclass
class Result:
  """What the worker process answers."""

  key: str
  arguments: dict[str, int]  # bytes on a device, by what they are
  kept: list[Buffer]  # the largest arrays that loops keep for the backward pass
  versions: dict[str, str]
  memory: dict[str, int] | None = None  # bytes on a device, by kind; None if it was refused
  refusal: str = ""  # the compiler's message where it is out of memory
  seconds: float = 0.0  # of compiling
  cpu_seconds: float = 0.0  # of these, on all cores; what else the machine does is not in them
  process_gib: float = 0.0  # peak memory of the worker
  rematerializations: int = 0  # of whole arrays, that the partitioner could not avoid
  quick: bool = False  # stopped before code was generated: no estimates of time

  @classmethod
  def read(cls, folder: pathlib.Path) -> "Result":
    values = json.loads((folder / _RESULT).read_text())
    return cls(**values | {"kept": [Buffer(**buffer) for buffer in values["kept"]]})

  def write(self, folder: pathlib.Path) -> None:
    (folder / _RESULT).write_text(json.dumps(dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A result and the program's text, "" where it was refused."""

  result: Result
  hlo: str


def parse_option(text: str) -> tuple[str, str | bool]:
  """Returns the name and value of a compiler option, `name=value`; raises ConfigError."""
  name, equals, value = text.strip().removeprefix("--").partition("=")
  if not equals:
    raise ConfigError(f"--compiler-options has '{text}'; options look like xla_tpu_x=true.")
  return name, {"true": True, "false": False}.get(value, value)


def default_cache() -> pathlib.Path:
  """Returns the folder that compiled programs are kept in."""
  root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(root, "mm1_jax", "plans")


def compile_program(
  run: RunConfig,
  topology: Topology,
  what: What,
  *,
  options: dict[str, str | bool] | None = None,
  cache: pathlib.Path | None = None,
  quick: bool = False,
) -> Compiled:
  """Compiles `what` ("train", "prefill", "decode") of a run for a slice, or finds it in the cache.

  With `quick` the compiler is stopped before it generates code: there is no estimate of the time.

  Raises:
    ConfigError: the run does not divide over the slice.
    PlanError: libtpu is missing or of the wrong version, or the compiler failed for another reason
      than memory.
  """
  run.check_mesh(topology.num_devices)
  libtpu = find_libtpu()
  cache = cache or default_cache()
  cache.mkdir(parents=True, exist_ok=True)
  request = CompileRequest(
    run=run.to_dict(),
    topology=topology.name,
    num_slices=topology.num_slices,
    what=what,
    options=options or {},
    libtpu=libtpu.version,
    cache=str(cache),
    quick=quick,
  )
  with tempfile.TemporaryDirectory(dir=cache) as name:
    folder = pathlib.Path(name)
    (folder / "request.json").write_text(json.dumps(dataclasses.asdict(request)))
    begin = time.perf_counter()
    log = _run_worker(folder, libtpu, quick)
    result = Result.read(folder)
    entry = cache / result.key
    if not entry.exists():
      if quick and not result.refusal:
        _read_dump(folder, result)
        result.seconds = time.perf_counter() - begin
      result.rematerializations = count_rematerializations(log)
      result.write(folder)
      # All or nothing: another process may be looking for the same.
      kept = pathlib.Path(tempfile.mkdtemp(dir=cache))
      for name in (_RESULT, _HLO):
        if (folder / name).exists():
          shutil.copy(folder / name, kept)
      kept.rename(entry)
  result = Result.read(entry)
  logging.info("%s of %s for %s: %s", what, run.name, topology, entry)
  hlo = entry / _HLO
  return Compiled(result, gzip.open(hlo, "rt").read() if hlo.exists() else "")


class Libtpu(NamedTuple):
  version: str
  library: str  # the file


def find_libtpu() -> Libtpu:
  """Returns the TPU compiler, installed with the others or by `make libtpu` beside them.

  Beside them it affects no other program: where it can be imported, every JAX program on a machine
  without a TPU looks for one, and logs errors.

  Raises:
    PlanError: it is missing, or not the one that the installed JAX was built for.
  """
  wanted = _wanted_libtpu()
  install = f"`make libtpu` (or pip install 'libtpu{wanted}')"
  found = [
    distribution
    for path in (sys.path, [str(pathlib.Path(sys.prefix, "libtpu"))])
    for distribution in importlib.metadata.distributions(name="libtpu", path=path)
  ]
  if not found:
    raise PlanError(
      f"the TPU compiler, libtpu, is not installed; {install} brings it, 200 MB for Linux on x86."
    )
  version = found[0].version
  if not version.startswith(wanted.removeprefix("==").rstrip("*")):
    jax = importlib.metadata.version("jax")
    raise PlanError(f"libtpu {version} does not fit jax {jax}; {install} brings the one that does.")
  return Libtpu(version, str(found[0].locate_file("libtpu/libtpu.so")))


def _wanted_libtpu() -> str:
  """Returns the version that the installed JAX pins for TPUs, such as `==0.0.42.*`."""
  requirements = importlib.metadata.requires("jax") or []
  pins = (re.match(r"libtpu\s*(==[\w.*]+)", r) for r in requirements)
  return next((pin[1] for pin in pins if pin), "")


def _run_worker(folder: pathlib.Path, libtpu: Libtpu, quick: bool) -> str:
  """Runs the worker, with `quick` until memory is assigned; returns what was said meanwhile."""
  log = folder / "log.txt"
  environment = _ENVIRONMENT | {"TPU_LIBRARY_PATH": libtpu.library, "TPU_LOG_DIR": str(folder)}
  with log.open("wb") as file:
    worker = subprocess.Popen(
      [sys.executable, *_COMMAND, str(folder)],
      env=os.environ | environment,
      stdout=file,
      stderr=subprocess.STDOUT,
    )
    try:
      while worker.poll() is None and not (quick and _is_assigned(folder)):
        time.sleep(_POLL_SECONDS)
      stopped = worker.poll() is None
    finally:
      worker.kill()
      worker.wait()
  said = log.read_text(errors="replace")
  if worker.returncode and not stopped:
    lines = [line for line in said.splitlines() if line.strip()]
    raise PlanError(
      f"compiling failed with exit code {worker.returncode}; the last lines were:\n"
      + "\n".join(lines[-20:])
    )
  logs = folder.glob("tpu_driver*.log.WARNING.*")  # the compiler has a log of its own
  return said + "".join(path.read_text(errors="replace") for path in logs)


def count_rematerializations(log: str) -> int:
  """Returns how many arrays are put together whole to be split in another way."""
  return len(re.findall("Involuntary full rematerialization", log))


def _is_assigned(folder: pathlib.Path) -> bool:
  """Whether the compiler has written out the program with all memory assigned."""
  found = list((folder / DUMP).glob(f"*{_ASSIGNED}"))
  if not found:
    return False
  size = found[0].stat().st_size
  time.sleep(_POLL_SECONDS)
  return 0 < size == found[0].stat().st_size


def _read_dump(folder: pathlib.Path, result: Result) -> None:
  """Fills in what a stopped compile has written: the program and its memory."""
  (program,) = (folder / DUMP).glob(f"*{_ASSIGNED}")
  with gzip.open(folder / _HLO, "wt", compresslevel=5) as file:
    file.write(program.read_text())
  allocations = program.with_name(program.name.replace(_ASSIGNED, _ALLOCATIONS)).read_text()
  # Of HBM alone: allocations in other memories have another color.
  kinds = "parameter|preallocated-temp"
  sizes = re.findall(rf"^allocation \d+: size (\d+), ({kinds})", allocations, re.M)
  arguments = sum(int(size) for size, kind in sizes if kind == "parameter")
  peak = sum(int(size) for size, _ in sizes)
  result.memory = {"arguments": arguments, "peak": peak, "code": 0}
