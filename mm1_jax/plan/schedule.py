# SPDX-License-Identifier: Apache-2.0
"""Runs a priced program on paper: one TensorCore in order, and a queue for each kind of link.

A transfer that was started runs beside the TensorCore, and costs only the part that is left when it
is waited for. A loop's body is run twice, the second time with the queues as the first left them,
and every further turn costs what the second did.
"""

import collections
import dataclasses
from typing import Literal

from mm1_jax.plan.cost import Pricer, Work
from mm1_jax.plan.hlo import Computation, Instruction, Module
from mm1_jax.plan.topology import Topology

Price = Literal["roofline", "estimate"]


@dataclasses.dataclass
class CollectiveTotal:
  """All collectives of one kind in a step, of one device."""

  count: float = 0.0
  payload: float = 0.0  # bytes
  wire: float = 0.0  # bytes sent
  seconds: float = 0.0  # of the links; in part overlapped by other work


class Ledger:
  """Sums over instructions, loops multiplied by their trip counts."""

  def __init__(self):
    self.seconds: dict[str, float] = collections.defaultdict(float)  # of the TensorCore, by kind
    self.sums: dict[str, float] = collections.defaultdict(float)  # flops, kernel_flops, hbm_bytes
    self.collectives: dict[str, CollectiveTotal] = collections.defaultdict(CollectiveTotal)
    self.instructions: dict[str, list] = {}  # name -> [seconds, kind, op_name]

  def record(self, work: Work, seconds: float) -> None:
    """Adds a work that took the TensorCore `seconds`."""
    self.seconds[work.kind] += seconds
    for name in ("flops", "kernel_flops", "hbm_bytes"):
      self.sums[name] += getattr(work, name)
    if work.collective:
      total, one = self.collectives[work.collective.kind], work.collective
      total.count += 1
      total.payload += one.payload
      total.wire += one.wire
      total.seconds += one.seconds
    self.instructions.setdefault(work.name, [0.0, work.kind, work.op_name])[0] += seconds

  def add(self, other: "Ledger", times: float = 1.0) -> None:
    """Adds another ledger, `times` over."""
    for mine, theirs in ((self.seconds, other.seconds), (self.sums, other.sums)):
      for name, value in theirs.items():
        mine[name] += times * value
    for kind, theirs in other.collectives.items():
      mine = self.collectives[kind]
      for field in dataclasses.fields(CollectiveTotal):
        value = getattr(mine, field.name) + times * getattr(theirs, field.name)
        setattr(mine, field.name, value)
    for name, (seconds, kind, op_name) in other.instructions.items():
      self.instructions.setdefault(name, [0.0, kind, op_name])[0] += times * seconds


class Clock:
  """The time up to which the TensorCore and the links of one device are taken."""

  def __init__(self):
    self.now = 0.0
    self._free: dict[str, float] = collections.defaultdict(float)  # when a queue is done
    self._due: dict[str, float] = {}  # when a started transfer is done, by key
    self._kind: dict[str, str] = {}

  def copy(self) -> "Clock":
    other = Clock()
    other.now = self.now
    other._free.update(self._free)
    other._due, other._kind = dict(self._due), dict(self._kind)
    return other

  def run(self, work: Work, seconds: float) -> tuple[float, str]:
    """Runs one work; returns how long it occupied the TensorCore, and by what kind."""
    begin = self.now
    kind = work.kind
    match work.action:
      case "compute":
        self.now += seconds
      case "start":
        self._due[work.key] = self._free[work.queue] = self._free_at(work.queue) + seconds
        self._kind[work.key] = work.kind
      case "wait":
        kind = self._kind.get(work.key, kind)
        self.now = max(self.now, self._due.pop(work.key, 0.0))
      case "block":
        self.now = self._free[work.queue] = self._free_at(work.queue) + seconds
    return self.now - begin, kind

  def repeat(self, begin: "Clock", num: int) -> None:
    """Takes `num` more turns like the one since `begin`.

    Transfers that this turn started are shifted by as much; earlier ones are not.
    """
    skipped = num * (self.now - begin.now)
    self.now += skipped
    for mine, before in ((self._free, begin._free), (self._due, begin._due)):
      for name, time in mine.items():
        if time != before.get(name):
          mine[name] = time + skipped

  def _free_at(self, queue: str) -> float:
    """Returns when a transfer could begin; one over all chips takes every link."""
    if queue == "ici:all":
      return max([self.now, *(t for q, t in self._free.items() if q.startswith("ici"))])
    shared = self._free["ici:all"] if queue.startswith("ici") else 0.0
    return max(self.now, self._free[queue], shared)


@dataclasses.dataclass
class Region:
  """A stretch of the step: a loop of the entry computation, or what lies between two."""

  name: str
  seconds: dict[str, float]  # of the TensorCore, by kind


@dataclasses.dataclass
class Schedule:
  """A step on paper, of one device."""

  seconds: float
  ledger: Ledger
  regions: list[Region]
  trip_counts: dict[str, int]


class Simulator:
  """Runs a module; the prices of its instructions are computed once.

  Of a conditional the branch counts that takes longest; with `usual`, the one of a true predicate:
  the model writes its conditionals so. The shortest would be wrong: a rematerialised conditional
  may have nothing to do where the backward pass needs much. For `grouped_rows` see `kernel_cost`.
  """

  def __init__(
    self,
    module: Module,
    topology: Topology,
    *,
    usual: bool = False,
    grouped_rows: int | None = None,
  ):
    self._usual = usual
    self.module = module
    self.pricer = Pricer(module, topology, grouped_rows)
    self.trip_counts: dict[str, int] = {}
    self._works: dict[str, list[Work]] = {}

  def run(self, price: Price) -> Schedule:
    clock, total, regions = Clock(), Ledger(), []
    entry = self.module.computations[self.module.entry]
    between = Ledger()

    def close() -> None:
      if sum(between.seconds.values()):
        regions.append(Region("", dict(between.seconds)))
      total.add(between)

    for instruction in entry:
      if instruction.opcode != "while":
        self._step(instruction, entry, clock, between, price)
        continue
      close()
      between, loop = Ledger(), Ledger()
      self._step(instruction, entry, clock, loop, price)
      turns = self.trip_counts[instruction.name]
      way = "backward" if "transpose(" in instruction.op_name else "forward"
      regions.append(Region(f"{way} x {turns}", dict(loop.seconds)))
      total.add(loop)
    close()
    return Schedule(clock.now, total, regions, self.trip_counts)

  @property
  def uses_host(self) -> bool:
    """Whether anything is copied to or from host memory; known after a run."""
    return any(work.queue.startswith("host") for works in self._works.values() for work in works)

  def _run(self, name: str, clock: Clock, ledger: Ledger, price: Price) -> None:
    computation = self.module.computations[name]
    for instruction in computation:
      self._step(instruction, computation, clock, ledger, price)

  def _step(
    self,
    instruction: Instruction,
    computation: Computation,
    clock: Clock,
    ledger: Ledger,
    price: Price,
  ) -> None:
    match instruction.opcode:
      case "while":
        self._loop(instruction, computation, clock, ledger, price)
      case "conditional":
        self._branch(instruction, clock, ledger, price)
      case "call":
        self._run(instruction.called("to_apply"), clock, ledger, price)
      case _:
        # Names are unique in a module.
        if instruction.name not in self._works:
          self._works[instruction.name] = self.pricer.price(instruction, computation)
        for work in self._works[instruction.name]:
          seconds, kind = clock.run(work, getattr(work, price))
          ledger.record(dataclasses.replace(work, kind=kind), seconds)

  def _loop(self, loop: Instruction, computation: Computation, clock, ledger, price) -> None:
    num = self.module.trip_count(loop, computation)
    if num is None:
      self.pricer.notes["TIMES TOO LOW: a loop of unknown length was counted once"] += 1
      num = 1
    self.trip_counts[loop.name] = num
    body = loop.called("body")
    if num > 0:
      self._run(body, clock, ledger, price)
    if num > 1:
      begin, turn = clock.copy(), Ledger()
      self._run(body, clock, turn, price)
      ledger.add(turn, num - 1)
      clock.repeat(begin, num - 2)

  def _branch(self, branch: Instruction, clock: Clock, ledger: Ledger, price: Price) -> None:
    """Runs the branch that takes longest, or the usual one."""
    listed = (branch.attribute("branch_computations") or "{}")[1:-1].replace("%", "")
    names = [name.strip() for name in listed.split(",") if name.strip()]
    names = names or [branch.called("false_computation"), branch.called("true_computation")]

    def seconds(name: str) -> float:
      trial = clock.copy()
      self._run(name, trial, Ledger(), price)
      return trial.now

    picked = names[-1] if self._usual else max(names, key=seconds)
    self._run(picked, clock, ledger, price)
