# SPDX-License-Identifier: Apache-2.0
"""A plan: what a run needs of a slice, how fast it will be, and what it will cost.

A step is predicted between two bounds (`cost.py`), and their geometric mean is the figure to quote.
"""

import dataclasses
import math
import pathlib

from mm1_jax.config import MESH_AXES, RunConfig
from mm1_jax.models.flops import image_slots, model_flops
from mm1_jax.plan.compile import Compiled, What, compile_program
from mm1_jax.plan.hlo import Module
from mm1_jax.plan.memory import GIB, Shortage, advice, read_shortage
from mm1_jax.plan.schedule import CollectiveTotal, Region, Simulator
from mm1_jax.plan.topology import Topology

ROOM = 0.92  # of a chip's memory; a program that needs more leaves nothing for surprises
_NUM_SLOWEST = 10  # instructions that are named

QUICK = (
  "no code was generated: times are lower bounds, every operation at its roofline, and the code is "
  "not in the memory"
)
UNSEEN = (
  "loading of data, evaluation, checkpoints, restarts, and hosts that are slower than others are "
  "not in these times"
)
UNCALIBRATED = "times on {chip} were never held against published ones: do not quote them"
HOST = "copies to and from host memory are modelled, but never held against a published time"
SLICES = "transfers between slices are modelled at {gbs:g} GB/s a device, and never checked"
KERNELS = "Pallas kernels: {kinds}; a share of the peak is assumed, no compiler estimates them"


@dataclasses.dataclass(frozen=True)
class Step:
  """What a device does in a step, loops multiplied by their trip counts, and how long it takes."""

  lower: float  # seconds, every operation at its roofline
  upper: float  # seconds by the compiler's own estimates; `lower` where it made none
  seconds_by_kind: dict[str, float]  # of `upper`: matmul, elementwise, kernel, collective, copy
  regions: list[Region]  # of `upper`, in order
  flops: float  # of matrix products, as the program executes them, recomputation included
  hbm_bytes: float
  collectives: dict[str, CollectiveTotal]
  slowest: list[tuple[float, str, str, str]]  # seconds, kind, instruction, where it comes from
  trip_counts: dict[str, int]

  @property
  def seconds(self) -> float:
    """The figure to quote."""
    return math.sqrt(self.lower * self.upper)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run on a slice. Bytes and seconds are of one device, and of a step."""

  run: RunConfig
  topology: Topology
  what: What
  mesh: dict[str, int]
  compiled: Compiled
  memory: dict[str, float]  # bytes by kind; their sum is what must fit
  shortage: Shortage | None  # None if it fits
  advice: list[str]  # what to change if it does not
  step: Step | None  # None if the compiler refused it
  model_flops: dict[str, float]  # of the global batch, by part, and `total`
  notes: list[str]  # what the figures leave out

  @property
  def quick(self) -> bool:
    """Whether the times are lower bounds."""
    return self.compiled.result.quick

  @property
  def fits(self) -> bool:
    return self.shortage is None

  @property
  def memory_share(self) -> float:
    """Of the device's memory that is needed."""
    needed = self.shortage.needed if self.shortage else sum(self.memory.values())
    return needed / (self.topology.chip.hbm_gib * GIB)

  @property
  def tokens(self) -> int:
    """Positions of a step."""
    data = self.run.data
    return data.batch_size * (1 if self.what == "decode" else data.seq_len)

  @property
  def images(self) -> int:
    """Image slots of a step."""
    return 0 if self.what == "decode" else image_slots(self.run)

  def mfu(self, seconds: float) -> float:
    """Returns the model FLOPs utilisation of a step that takes so long."""
    peak = self.topology.num_devices * self.topology.chip.peak_flops
    return self.model_flops["total"] / seconds / peak

  @property
  def hours(self) -> float:
    """Of the whole run, at the expected time."""
    assert self.step
    return self.run.train.num_steps * self.step.seconds / 3600

  @property
  def chip_hours(self) -> float:
    return self.hours * self.topology.num_chips


def make_plan(
  run: RunConfig,
  topology: Topology,
  what: What = "train",
  *,
  options: dict[str, str | bool] | None = None,
  cache: pathlib.Path | None = None,
  quick: bool = False,
) -> Plan:
  """Compiles a program for a slice and reads off what it needs.

  A program that does not fit is a plan too: see `Plan.shortage` and `Plan.advice`.

  Raises:
    ConfigError: the run does not divide over the slice.
    PlanError: the compiler is missing, or failed.
  """
  compiled = compile_program(run, topology, what, options=options, cache=cache, quick=quick)
  return read_plan(compiled, run, topology, what)


def read_plan(compiled: Compiled, run: RunConfig, topology: Topology, what: What) -> Plan:
  """Returns what a compiled program says."""
  memory = _memory(compiled)
  shortage = _shortage(compiled, memory, topology)
  step, notes = None, [QUICK if compiled.result.quick else UNSEEN]
  if compiled.hlo:
    step, more = _simulate(compiled, topology)
    notes += more
  return Plan(
    run=run,
    topology=topology,
    what=what,
    mesh=dict(zip(MESH_AXES, run.check_mesh(topology.num_devices), strict=True)),
    compiled=compiled,
    memory=memory,
    shortage=shortage,
    advice=advice(run, topology) if shortage else [],
    step=step,
    model_flops=step_flops(run, what),
    notes=notes,
  )


def usual_step(plan: Plan, *, even_load: bool = False) -> tuple[float, float]:
  """Returns the two bounds of a step in which every conditional takes its usual branch.

  The model has one kind of conditional: a dropless layer with a load too uneven for one chip's
  buffers runs in rounds (`MoEConfig.exchange_factor`). `Plan.step` counts these rounds.

  With `even_load` every chip's experts get as many tokens as any other's, and the rest of its
  buffers is empty; without, the buffers are full to the last row, which is more than there are.
  """
  rows = None
  if even_load and (moe := plan.run.model.decoder.moe):
    chips = plan.topology.num_devices // plan.mesh["tensor"]
    rows = plan.tokens * moe.top_k // chips // plan.run.train.accumulation_steps
  simulator = Simulator(Module(plan.compiled.hlo), plan.topology, usual=True, grouped_rows=rows)
  return simulator.run("roofline").seconds, simulator.run("estimate").seconds


def step_flops(run: RunConfig, what: What) -> dict[str, float]:
  """Returns the model FLOPs of one call on the global batch, see `models.flops`.

  Every image slot holds a picture: a plan is of full batches. A prefill makes logits of each row's
  last position only; a decode reads one token a row, with as many positions in the cache as a row
  has.
  """
  if what == "train":
    return model_flops(run, image_slots(run))
  trained = dataclasses.replace(run.optimizer, frozen=())
  num_images = 0 if what == "decode" else image_slots(run)
  flops = model_flops(dataclasses.replace(run, optimizer=trained), num_images)
  forward = {name: count // 3 for name, count in flops.items() if name != "total"}
  positions = run.data.seq_len
  forward["head"] //= positions
  if what == "decode":
    for name in ("decoder/dense", "decoder/experts"):
      forward[name] //= positions
    # The whole cache, not half of a square.
    forward["decoder/attention"] = 2 * forward["decoder/attention"] // positions
  return {**forward, "total": sum(forward.values())}


def _memory(compiled: Compiled) -> dict[str, float]:
  """Returns the bytes of a device by kind; the temporaries are those of the fullest moment.

  The compiler's `temporaries` are more than it asks for (and refuses by): they are summed as if no
  two could share memory at different times. Its `peak` is arguments and temporaries together.
  """
  memory: dict[str, float] = dict(compiled.result.arguments)
  stats = compiled.result.memory
  if stats:
    # Arguments that the program does not read are not in the compiler's sum, but on the device.
    memory["padding"] = max(0, stats["arguments"] - sum(memory.values()))
    memory["temporaries"] = stats["peak"] - stats["arguments"]
    memory["code"] = stats["code"]
  return memory


def _shortage(compiled: Compiled, memory: dict[str, float], topology: Topology) -> Shortage | None:
  """Returns what is missing. The compiler refuses by temporaries alone, arguments left out."""
  result, total = compiled.result, sum(memory.values())
  if result.refusal:
    shortage = read_shortage(result.refusal, arguments=total)
    return dataclasses.replace(shortage, buffers=shortage.buffers or result.kept)
  available = topology.chip.hbm_gib * GIB
  return Shortage(total, available, result.kept) if total > available else None


def _simulate(compiled: Compiled, topology: Topology) -> tuple[Step, list[str]]:
  simulator = Simulator(Module(compiled.hlo), topology)
  lower = simulator.run("roofline")
  upper = lower if compiled.result.quick else simulator.run("estimate")
  ledger = upper.ledger
  slowest = sorted(ledger.instructions.items(), key=lambda item: -item[1][0])[:_NUM_SLOWEST]
  step = Step(
    lower=lower.seconds,
    upper=upper.seconds,
    seconds_by_kind=dict(ledger.seconds),
    regions=upper.regions,
    flops=ledger.sums["flops"] + ledger.sums["kernel_flops"],
    hbm_bytes=ledger.sums["hbm_bytes"],
    collectives=dict(ledger.collectives),
    slowest=[(seconds, kind, name, where) for name, (seconds, kind, where) in slowest],
    trip_counts=upper.trip_counts,
  )
  return step, _notes(simulator, topology)


def _notes(simulator: Simulator, topology: Topology) -> list[str]:
  """Returns what makes these times less certain than others."""
  chip, notes = topology.chip, []
  if not chip.calibrated:
    notes.append(UNCALIBRATED.format(chip=chip.name))
  if simulator.uses_host:
    notes.append(HOST)
  if topology.num_slices > 1:
    notes.append(SLICES.format(gbs=chip.dcn_bandwidth / 1e9))
  assumed = dict(simulator.pricer.notes)
  kernels = {k.removeprefix("kernel by "): n for k, n in assumed.items() if k.startswith("kernel")}
  if kernels:
    notes.append(KERNELS.format(kinds=", ".join(f"{n} by {k}" for k, n in kernels.items())))
  notes += [f"{what} ({n})" for what, n in assumed.items() if not what.startswith("kernel")]
  return notes
