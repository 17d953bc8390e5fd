# SPDX-License-Identifier: Apache-2.0
"""Compiles a run's program for a slice that is not there, and keeps what came out.

The compiler is the real one, `libtpu`, which works on any Linux machine with an x86 CPU. A result
is kept under the hash of its content: the traced program, the slice, options and versions.
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
from typing import Literal, NamedTuple

from absl import logging

from mm1_jax.config import RunConfig, UserError
from mm1_jax.plan.memory import Buffer
from mm1_jax.plan.topology import Topology

What = Literal["train", "prefill", "decode"]

_HLO, _RESULT = "hlo.txt.gz", "result.json"
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
class Request:
  """What the worker process is asked for."""

  run: dict  # RunConfig.to_dict()
  topology: str
  num_slices: int
  what: What
  options: dict[str, str | bool]  # of the compiler
  libtpu: str  # its version
  cache: str


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
  process_gib: float = 0.0  # peak memory of the worker
  rematerializations: int = 0  # of whole arrays, that the partitioner could not avoid

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
) -> Compiled:
  """Compiles `what` ("train", "prefill", "decode") of a run for a slice, or finds it in the cache.

  Raises:
    ConfigError: the run does not divide over the slice.
    PlanError: libtpu is missing or of the wrong version, or the compiler failed for another reason
      than memory.
  """
  run.check_mesh(topology.num_devices)
  libtpu = find_libtpu()
  cache = cache or default_cache()
  cache.mkdir(parents=True, exist_ok=True)
  request = Request(
    run=run.to_dict(),
    topology=topology.name,
    num_slices=topology.num_slices,
    what=what,
    options=options or {},
    libtpu=libtpu.version,
    cache=str(cache),
  )
  with tempfile.TemporaryDirectory(dir=cache) as name:
    folder = pathlib.Path(name)
    (folder / "request.json").write_text(json.dumps(dataclasses.asdict(request)))
    log = _run_worker(folder, libtpu)
    result = Result.read(folder)
    entry = cache / result.key
    if not entry.exists():
      result.rematerializations = len(re.findall("nvoluntary full rematerialization", log))
      result.write(folder)
      # All or nothing: another process may be looking for the same.
      kept = pathlib.Path(tempfile.mkdtemp(dir=cache))
      for path in folder.iterdir():
        shutil.copy(path, kept)
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

  Beside them it is in nobody's way: where it can be imported, every JAX program on a machine
  without a TPU looks for one, and complains.

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


def _run_worker(folder: pathlib.Path, libtpu: Libtpu) -> str:
  """Runs the worker; returns what it and the compiler said."""
  command = [sys.executable, "-m", "mm1_jax.plan.worker", str(folder)]
  done = subprocess.run(
    command,
    env=os.environ | _ENVIRONMENT | {"TPU_LIBRARY_PATH": libtpu.library},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    errors="replace",
  )
  if done.returncode:
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    raise PlanError(
      f"compiling failed with exit code {done.returncode}; the last lines were:\n"
      + "\n".join(lines[-20:])
    )
  return done.stdout
