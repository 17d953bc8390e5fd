# SPDX-License-Identifier: Apache-2.0
"""What a collective moves, and how long the links between chips take for it.

A ring over n chips: all-gather, reduce-scatter and all-to-all put (n - 1) / n of the payload on the
wire of each chip, all-reduce twice that. Links of several torus dims work at once, in both
directions where a dim is a ring; an open line is taken at 3/4 of that. An all-to-all is bounded by
the links across the middle of the torus.
"""

import dataclasses
import math
import re

from mm1_jax.plan.hlo import Computation, Instruction
from mm1_jax.plan.topology import Topology

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_LATENCY = 1e-6  # seconds a torus dim


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of one device."""

  kind: str
  num_members: int  # devices that take part together
  payload: float  # bytes of the whole operand (or result, of an all-gather)
  wire: float  # bytes that the device sends
  seconds: float
  queue: str  # collectives of one queue run one after another

  def as_reduce_scatter(self) -> "Collective":
    """Returns an all-reduce of which every device keeps its own part: half the bytes."""
    return dataclasses.replace(
      self, kind="reduce-scatter", wire=self.wire / 2, seconds=self.seconds / 2
    )


def collective_kind(instruction: Instruction) -> str | None:
  """Returns the kind, the same for `all-gather` and `all-gather-start`; None of anything else."""
  kind = instruction.opcode.removesuffix("-start")
  return kind if kind in KINDS else None


def read_collective(
  instruction: Instruction, computation: Computation, topology: Topology
) -> Collective:
  """Returns what a collective instruction moves on `topology`."""
  kind = collective_kind(instruction)
  assert kind
  devices = topology.num_devices // topology.num_slices  # collectives stay inside a slice
  num = _num_members(instruction.attributes, devices)
  operands = computation.operands(instruction)
  payload = sum(x.bytes for x in operands)
  if kind == "all-gather":
    payload *= num
  elif kind == "ragged-all-to-all":
    # Data and output buffer come first; the larger has room for the worst case.
    payload = min(x.bytes for x in operands[:2])
  if num == 1:
    return Collective(kind, 1, payload, 0.0, 0.0, "ici:1")
  ring = payload * (num - 1) / num
  wire = {
    "all-reduce": 2 * ring,
    "collective-permute": payload,
    "collective-broadcast": payload,
  }.get(kind, ring)
  num_dims, wrapped = _torus_dims(instruction.attributes, num, devices, topology)
  seconds = wire / _bandwidth(kind, num, num_dims, wrapped, topology) + _LATENCY * num_dims
  return Collective(kind, num, payload, wire, seconds, _queue(kind, num, devices, instruction))


def _bandwidth(kind: str, num: int, num_dims: int, wrapped: bool, topology: Topology) -> float:
  """Returns the bytes/s that a device sends at."""
  link = topology.chip.link_bandwidth
  if kind == "collective-permute":  # to one neighbour
    return link
  if "all-to-all" in kind:
    length = num ** (1 / num_dims)
    hops = max(1.0, length / (4 if wrapped else 3))  # on average, along one dim
    return 2 * link / hops if num_dims == 1 else num_dims * 2 * link / max(1.0, hops * num_dims)
  return num_dims * link * (2 if wrapped else 1.5)


def _torus_dims(attributes: str, num: int, devices: int, topology: Topology) -> tuple[int, bool]:
  """Returns over how many dims of the torus a group lies, and whether they are rings."""
  by_length = sorted(zip(topology.shape, topology.wrap, strict=False), reverse=True)
  lengths = [length for length, _ in by_length if length > 1]
  used = re.search(r"active_dims:([01]+) dim_sizes:([0-9,]+)", attributes)
  num_dims = 0
  if used:
    sizes = used[2].split(",")
    num_dims = sum(a == "1" and int(n) > 1 for a, n in zip(used[1], sizes, strict=False))
  if not num_dims and num < devices:
    num_dims = next(
      (i + 1 for i in range(len(lengths)) if math.prod(lengths[: i + 1]) >= num), len(lengths)
    )
  num_dims = max(1, num_dims or len(lengths))
  return num_dims, all(wrap for _, wrap in by_length[:num_dims])


def _num_members(attributes: str, devices: int) -> int:
  """Returns the size of a replica group, in any of the ways that HLO writes them."""
  if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    # 'axis', or 'axis':(before)size where only a part of an axis is meant.
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part) if part else sizes[name] for name, part in axes)
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
    return int(iota[2])
  if group := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return group[1].count(",") + 1
  if pairs := _pairs(attributes):
    return _cycle_length(pairs)
  return devices


def _pairs(attributes: str) -> dict[int, int]:
  """Returns the (sender, receiver) pairs of a permute."""
  match = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
  return {int(a): int(b) for a, b in re.findall(r"\{(\d+),(\d+)", match[1])} if match else {}


def _cycle_length(pairs: dict[int, int]) -> int:
  first = next(iter(pairs))
  length, at = 1, pairs[first]
  while at in pairs and at != first and length <= len(pairs):
    length, at = length + 1, pairs[at]
  return max(2, length)


def _queue(kind: str, num: int, devices: int, instruction: Instruction) -> str:
  """Returns which links are taken: different groups are on different mesh axes and links."""
  if kind == "collective-permute":
    shifts = [b - a for a, b in list(_pairs(instruction.attributes).items())[:2]]
    forward = min(shifts, key=abs, default=1) > 0
    return f"ici:{num}{'+' if forward else '-'}"
  return "ici:all" if num >= devices else f"ici:{num}"
