# SPDX-License-Identifier: Apache-2.0
"""Prices every instruction of a compiled TPU program: what it occupies, and for how long.

An instruction becomes `Work`: time of the TensorCore, or a transfer that starts, is waited for, or
blocks. Time of the TensorCore has two prices:

  roofline   max(FLOPs / peak, HBM bytes / bandwidth): nothing is faster
  estimate   the compiler's own `estimated_cycles`, which price elementwise work at about 40% of the
             HBM bandwidth: hardly anything is slower

What the compiler does not estimate costs its bytes; Pallas kernels, see `kernels.py`.
"""

import collections
import dataclasses
from typing import Literal

from mm1_jax.plan.collectives import Collective, collective_kind, read_collective
from mm1_jax.plan.hlo import HOST, Computation, Instruction, Module
from mm1_jax.plan.kernels import kernel_cost
from mm1_jax.plan.topology import Topology
from mm1_jax.plan.traffic import hbm_bytes

Kind = Literal["matmul", "elementwise", "kernel", "collective", "copy"]

_FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "after-all",
  "partition-id",
  "replica-id",
  "opt-barrier",
  "add-dependency",
  "domain",
  "async-update",
}
_FREE_CALLS = {
  "AllocateBuffer",
  "AssumeGatherIndicesInBound",
  "Barrier",
  "LayoutConstraint",
  "MoveToDevice",
  "MoveToHost",
  "Sharding",
  "SPMDFullToShardShape",
  "SPMDShardToFullShape",
  "annotate_device_placement",
}
_COPY_STARTS = {"copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start"}


@dataclasses.dataclass(frozen=True)
class Work:
  """What one instruction occupies.

  `compute` runs on the TensorCore; `start` puts a transfer into a queue, which `wait` waits for by
  key; `block` is a transfer that the TensorCore waits for at once.
  """

  action: Literal["compute", "start", "wait", "block"]
  kind: Kind
  name: str  # of the instruction
  op_name: str = ""
  roofline: float = 0.0  # seconds
  estimate: float = 0.0  # seconds
  queue: str = ""
  key: str = ""  # of a transfer
  flops: float = 0.0
  kernel_flops: float = 0.0
  hbm_bytes: float = 0.0
  collective: Collective | None = None


class Pricer:
  """Prices the instructions of one module on one topology."""

  def __init__(self, module: Module, topology: Topology, grouped_rows: int | None = None):
    self.module = module
    self.topology = topology
    self.grouped_rows = grouped_rows  # see `kernel_cost`
    self.chip = topology.chip
    self.notes: collections.Counter[str] = collections.Counter()  # what was assumed, how often

  def price(self, instruction: Instruction, computation: Computation) -> list[Work]:
    """Returns the works of an instruction that is neither a loop nor a branch nor a call."""
    opcode = instruction.opcode
    if opcode in _FREE:
      return []
    if opcode in ("send", "recv", "send-done", "recv-done"):
      return self._between_slices(instruction, computation)
    if opcode in _COPY_STARTS:
      return [self._copy(instruction, instruction.shapes[0].bytes, instruction.shapes)]
    if opcode == "async-start":
      return self._async(instruction)
    if opcode.endswith("-done"):
      return [self._work("wait", "copy", instruction, key=instruction.operands[0])]
    if collective_kind(instruction):
      collective = read_collective(instruction, computation, self.topology)
      return [self._transfer(instruction, collective, starts=opcode.endswith("-start"))]
    if opcode == "custom-call":
      return self._custom_call(instruction, computation)
    return self._fusion(instruction, computation)

  def _work(self, action, kind: Kind, instruction: Instruction, **values) -> Work:
    return Work(action, kind, instruction.name, instruction.op_name, **values)

  def _transfer(
    self, instruction: Instruction, collective: Collective, *, starts: bool, key: str = ""
  ) -> Work:
    return self._work(
      "start" if starts else "block",
      "collective",
      instruction,
      roofline=collective.seconds,
      estimate=collective.seconds,
      queue=collective.queue,
      key=key or instruction.name,
      collective=collective,
    )

  def _copy(self, instruction: Instruction, num_bytes: float, shapes) -> Work:
    """Returns an asynchronous copy: within HBM and VMEM, or to or from the host."""
    spaces = [shape.memory_space for shape in shapes]
    queue, bandwidth = "dma", self.chip.hbm_bandwidth
    if HOST in spaces:
      queue = "host:out" if spaces[0] == HOST else "host:in"
      bandwidth = self.chip.host_bandwidth
    seconds = num_bytes / bandwidth
    return self._work(
      "start",
      "copy",
      instruction,
      roofline=seconds,
      estimate=seconds,
      queue=queue,
      key=instruction.name,
    )

  def _async(self, instruction: Instruction) -> list[Work]:
    """Prices a computation that runs beside the TensorCore."""
    inner = self.module.computations[instruction.called()]
    found = self._collectives(inner)
    if not found:
      root = inner.root
      updates = root.opcode == "dynamic-update-slice"
      moved = inner.by_name[root.operands[1]] if updates else root
      return [self._copy(instruction, moved.bytes, instruction.shapes)]
    works = [self._transfer(instruction, collective, starts=True) for _, collective, _ in found]
    flops = self.module.flops(instruction, inner)
    return [dataclasses.replace(works[0], flops=flops), *works[1:]]

  def _between_slices(self, instruction: Instruction, computation: Computation) -> list[Work]:
    """Prices a transfer over the data-centre network, which goes through the hosts.

    A send hands a reduction's operand to the network, and the matching recv brings the sum: as in
    a ring, 2 (k - 1) / k of the bytes cross between k slices.
    """
    transfer = instruction.attributes.partition('rendezvous="')[2].partition('"')[0]
    if instruction.opcode == "send":
      num = self.topology.num_slices
      payload = computation.operands(instruction)[0].bytes
      wire = 2 * payload * (num - 1) / num
      seconds = wire / self.chip.dcn_bandwidth
      collective = Collective("between slices", num, payload, wire, seconds, "dcn")
      return [self._transfer(instruction, collective, starts=True, key=transfer)]
    if instruction.opcode == "recv-done":
      source = computation.operands(instruction)[0].attributes
      key = source.partition('rendezvous="')[2].partition('"')[0]
      return [self._work("wait", "collective", instruction, key=key)]
    return []

  def _custom_call(self, instruction: Instruction, computation: Computation) -> list[Work]:
    target = instruction.custom_call_target
    if target in _FREE_CALLS:
      return []
    if target == "tpu_custom_call":
      cost = kernel_cost(instruction, computation, self.grouped_rows)
      self.notes[f"kernel by {cost.source}"] += 1
      seconds = max(
        cost.flops / (self.chip.peak_flops * cost.efficiency), cost.bytes / self.chip.hbm_bandwidth
      )
      return [
        self._work(
          "compute",
          "kernel",
          instruction,
          roofline=seconds,
          estimate=seconds,
          kernel_flops=cost.flops,
          hbm_bytes=cost.bytes,
        )
      ]
    if instruction.estimated_cycles:
      return self._fusion(instruction, computation)
    self.notes[f"bytes only: {target}"] += 1
    num_bytes = instruction.bytes + sum(x.bytes for x in computation.operands(instruction))
    seconds = num_bytes / self.chip.hbm_bandwidth
    return [self._work("compute", "elementwise", instruction, roofline=seconds, estimate=seconds)]

  def _fusion(self, instruction: Instruction, computation: Computation) -> list[Work]:
    """Prices work of the TensorCore, and the collectives that are fused into it."""
    works: list[Work] = []
    inner = self.module.computations.get(instruction.called())
    found = self._collectives(inner) if inner else []
    role = self._role(inner) if inner and found else None
    for fused, collective, where in found:
      if role is None:
        if collective.kind == "all-reduce" and _keeps_own_part(instruction, where):
          collective = collective.as_reduce_scatter()
        works.append(self._transfer(instruction, collective, starts=False))
      elif role == "start":
        works.append(self._transfer(instruction, collective, starts=True, key=_channel(fused)))
      elif role == "done":
        works.append(self._work("wait", "collective", instruction, key=_channel(fused)))
    if role in ("start", "done"):
      return works
    flops = self.module.flops(instruction, computation)
    num_bytes = hbm_bytes(instruction, computation, self.module)
    roofline = max(flops / self.chip.peak_flops, num_bytes / self.chip.hbm_bandwidth)
    only_moves = bool(found) and role is None
    estimate = instruction.estimated_cycles / self.chip.clock
    if not estimate and not only_moves:
      estimate = num_bytes / self.chip.hbm_bandwidth
    works.append(
      self._work(
        "compute",
        "matmul" if flops else "elementwise",
        instruction,
        roofline=0.0 if only_moves and not flops else roofline,
        estimate=estimate,
        flops=flops,
        hbm_bytes=num_bytes,
      )
    )
    return works

  def _collectives(
    self, computation: Computation
  ) -> list[tuple[Instruction, Collective, Computation]]:
    """Returns all collectives inside a computation and those that it calls, and where each is."""
    found = []
    for instruction in computation:
      if collective_kind(instruction):
        collective = read_collective(instruction, computation, self.topology)
        found.append((instruction, collective, computation))
        continue
      for key in ("calls", "to_apply", "called_computations"):
        inner = self.module.computations.get(instruction.called(key))
        if inner and instruction.opcode in ("fusion", "call", "async-start", "custom-call"):
          found += self._collectives(inner)
    return found

  def _role(self, computation: Computation) -> Literal["start", "step", "done"] | None:
    """Returns a fusion's part in a collective that runs beside matrix products.

    Such a collective is written several times: where it starts, in the fusions that continue it,
    and where it is done.
    """
    role = None
    for instruction in computation:
      if "AsyncCollectiveStart" in instruction.attributes:
        return "start"
      if "AsyncCollectiveDone" in instruction.attributes:
        return "done"
      carried = ("async_collective_fusion_config", "chain_id")
      if collective_kind(instruction) and any(c in instruction.attributes for c in carried):
        role = "step"
      elif instruction.opcode == "fusion" and role is None:
        role = self._role(self.module.computations[instruction.called()])
    return role


def _keeps_own_part(fusion: Instruction, where: Computation) -> bool:
  """Whether a fused all-reduce is a reduce-scatter: the result is sliced."""
  names = (fusion.called(), where.name)
  return any("all-reduce-scatter" in name for name in names) or any(
    instruction.opcode == "dynamic-slice" for instruction in where
  )


def _channel(collective: Instruction) -> str:
  return "channel:" + (collective.attribute("channel_id") or collective.name)
