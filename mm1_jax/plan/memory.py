# SPDX-License-Identifier: Apache-2.0
"""When a program does not fit: by how much, what takes the room, and what to change.

The compiler says how much is missing, and sometimes which buffers are largest. It gives up early
where far too much is asked for; then the largest arrays that the traced program keeps for its
backward pass are named, which are what a user can change.
"""

import dataclasses
import re
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn

from mm1_jax.config import RunConfig
from mm1_jax.plan.topology import Topology, slice_names

GIB = 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
_PACKAGE = "/mm1_jax/"


@dataclasses.dataclass(frozen=True)
class Buffer:
  """An array on one device."""

  bytes: float
  shape: str
  operation: str
  source: str  # file:line, "" where unknown


@dataclasses.dataclass(frozen=True)
class Shortage:
  """What a program needs of one device, and what there is."""

  needed: float  # bytes
  available: float  # bytes
  buffers: list[Buffer]

  @property
  def excess(self) -> float:
    return self.needed - self.available


def read_shortage(message: str, *, arguments: float) -> Shortage:
  """Reads the compiler's message, which is either of

    Ran out of memory on HBM, the total memory required for HLO temporaries (54.66G) exceeds ...
    Ran out of memory in memory space hbm. Used 20.51G of 15.75G hbm. ...

  Args:
    message: of the exception.
    arguments: their bytes, which the first form leaves out.

  Raises:
    ValueError: it is neither.
  """
  size = r"([\d.]+)([KMGT]?)"
  early = re.search(rf"temporaries \({size}\) exceeds available HBM \({size}\)", message)
  late = re.search(rf"Used {size} of {size} hbm", message)
  match = early or late
  if not match:
    raise ValueError(f"not an out-of-memory message: {message[:200]}")
  needed = float(match[1]) * _UNITS[match[2]] + (arguments if early else 0)
  return Shortage(needed, float(match[3]) * _UNITS[match[4]], _allocations(message))


def _allocations(message: str) -> list[Buffer]:
  """Returns the buffers that a message lists, the largest first."""
  buffers = []
  for text in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
    size = re.match(r"([\d.]+)([KMGT]?)", text)
    shape = re.search(r"Shape: (\S+)", text)
    operation = re.search(r'op_name="([^"]*)"', text)
    source = re.search(r'source_file="([^"]*)" source_line=(\d+)', text)
    if size and shape:
      buffers.append(
        Buffer(
          float(size[1]) * _UNITS[size[2]],
          shape[1].partition("{")[0],
          operation[1] if operation else "",
          f"{_inside_package(source[1])}:{source[2]}" if source else "",
        )
      )
  return buffers


def kept_arrays(jaxpr: Jaxpr) -> list[Buffer]:
  """Returns what the loops of a traced program stack up for later, the largest first."""
  buffers: list[Buffer] = []
  for eqn in jaxpr.eqns:
    for value in eqn.params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if isinstance(inner, Jaxpr):
          buffers += kept_arrays(inner)
    if eqn.primitive.name == "scan":
      buffers += _stacked(eqn)
  return sorted(buffers, key=lambda buffer: -buffer.bytes)


def _stacked(scan: JaxprEqn) -> list[Buffer]:
  """Returns the stacked outputs of a loop, each with the line that makes it."""
  body, num_carry = scan.params["jaxpr"].jaxpr, scan.params["num_carry"]
  makers = {id(var): eqn for eqn in body.eqns for var in eqn.outvars}
  buffers = []
  for out, inner in zip(scan.outvars[num_carry:], body.outvars[num_carry:], strict=True):
    maker = makers.get(id(inner))
    while maker is not None and maker.primitive.name == "reduce_precision":  # a barrier of remat
      maker = makers.get(id(maker.invars[0]))
    what = "a block's input" if maker is None else maker.params.get("name", maker.primitive.name)
    source = _source(maker or scan)
    buffers.append(Buffer(_bytes_per_device(out.aval), str(out.aval), str(what), source))
  return buffers


def _bytes_per_device(aval: Any) -> int:
  num_bytes = aval.size * aval.dtype.itemsize
  for entry in aval.sharding.spec.partitions:  # plain iteration refuses a gradient not yet summed
    for axis in (entry,) if isinstance(entry, str) else entry or ():
      num_bytes //= aval.sharding.mesh.shape[axis]
  return num_bytes


def _source(eqn: JaxprEqn) -> str:
  """Returns the innermost line of ours that an equation comes from, but for the loop itself."""
  traceback = eqn.source_info.traceback
  for frame in traceback.frames if traceback else ():
    if _PACKAGE in frame.file_name and not frame.file_name.endswith("models/layers.py"):
      return f"{_inside_package(frame.file_name)}:{frame.line_num}"
  return ""


def _inside_package(path: str) -> str:
  return "mm1_jax/" + path.rpartition(_PACKAGE)[2] if _PACKAGE in path else path


def advice(run: RunConfig, topology: Topology) -> list[str]:
  """Returns what would need less memory, what costs least first."""
  model, train, batch = run.model, run.train, run.data.batch_size
  sizes = run.check_mesh(topology.num_devices)
  rows = batch // train.accumulation_steps // (sizes[0] * sizes[1] * sizes[2])
  found = []
  if model.remat != "full":
    found.append(
      f"--config.model.remat=full recomputes more: '{model.remat}' keeps more than each block's "
      "input."
    )
  if rows > 1:
    found.append(
      f"--config.train.accumulation_steps={2 * train.accumulation_steps} halves the {rows} rows "
      "that a device holds at a time; the gradient is the same."
    )
  if sizes[0] > 1:
    found.append(
      f"--config.mesh.data=1 splits the params over all devices, not over a {sizes[0]}th."
    )
  if rows <= 1 and sizes[4] == 1:
    found.append("--config.mesh.sequence=2 splits each row's positions over two devices.")
  larger = _larger(topology)
  if larger:
    found.append(
      f"--topology={larger} has twice the devices: half the rows, params and optimizer state each."
    )
  if not found:
    found.append("fewer or shorter rows: --config.data.batch_size, --config.data.seq_len.")
  return found


def _larger(topology: Topology) -> str | None:
  """Returns the slice of twice the chips, if there is one."""
  kind, _, count = topology.name.partition("-")
  name = f"{kind}-{2 * int(count)}"
  return name if name in slice_names() else None
