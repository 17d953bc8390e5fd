# SPDX-License-Identifier: Apache-2.0
"""Tries rows at a time x remat policy x mesh, and shows the plans on the frontier.

The global batch stays what the config says: fewer rows at a time are more micro-batches. Every
combination gets a quick plan, of seconds; only what these leave on the frontier is compiled whole.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterator, Sequence

from absl import logging

from mm1_jax.config import MESH_AXES, ConfigError, MeshConfig, RunConfig
from mm1_jax.plan.estimate import ROOM, Plan, make_plan
from mm1_jax.plan.memory import GIB
from mm1_jax.plan.topology import Topology


def parse_mesh(text: str) -> MeshConfig:
  """Reads `fsdp=-1,tensor=2`; an axis that is not named has length 1.

  Raises:
    ConfigError: it is not of that form.
  """
  lengths = {field.name: 1 for field in dataclasses.fields(MeshConfig)}
  for entry in text.split(","):
    axis, _, length = entry.strip().partition("=")
    if axis not in lengths or not length.lstrip("-").isdigit():
      raise ConfigError(f"'{text}' is no mesh; meshes look like fsdp=-1,tensor=2.")
    lengths[axis] = int(length)
  return MeshConfig(**lengths)


def search(
  run: RunConfig,
  topology: Topology,
  *,
  meshes: Sequence[MeshConfig],
  remats: Sequence[str],
  accumulations: Sequence[int],
  cache: pathlib.Path | None = None,
  quick: bool = False,
) -> list[Plan]:
  """Returns a plan for every combination that divides, from little memory to much.

  With a mesh and a remat policy, more rows at a time need more memory: once they do not fit, still
  more are not tried. A combination that does not divide over the slice is logged and left out. With
  `quick` nothing is compiled whole.

  Raises:
    ConfigError: no combination divides over the slice.
  """
  plans: list[Plan] = []
  for mesh, remat in itertools.product(meshes, remats):
    for candidate in _candidates(run, topology, mesh, remat, accumulations):
      plan = make_plan(candidate, topology, cache=cache, quick=True)
      logging.info("%s", _line(plan))
      plans.append(plan)
      if not plan.fits:
        break
  if not plans:
    raise ConfigError(f"no mesh that was asked for divides {run.name} over {topology}.")
  for plan in [] if quick else frontier(plans):
    plans[plans.index(plan)] = make_plan(plan.run, topology, cache=cache)
  return plans


def _candidates(
  run: RunConfig,
  topology: Topology,
  mesh: MeshConfig,
  remat: str,
  accumulations: Sequence[int],
) -> Iterator[RunConfig]:
  """Yields runs with ever more rows at a time."""
  for steps in sorted(set(accumulations), reverse=True):
    try:
      candidate = dataclasses.replace(
        run,
        mesh=mesh,
        model=dataclasses.replace(run.model, remat=remat),
        train=dataclasses.replace(run.train, accumulation_steps=steps),
      )
      candidate.check_mesh(topology.num_devices)
    except ConfigError as e:
      logging.info("left out: %s", e)
      continue
    yield candidate


def frontier(plans: Sequence[Plan]) -> list[Plan]:
  """Returns the plans that fit and that no other beats in both time and memory, fastest first.

  Quick plans, with lower bounds for times, count only where all are quick.
  """
  best: list[Plan] = []
  usable = [plan for plan in plans if plan.step and plan.memory_share <= ROOM]
  usable = [plan for plan in usable if not plan.quick] or usable
  for plan in sorted(usable, key=lambda p: (_seconds(p), p.memory_share)):
    if not best or plan.memory_share < best[-1].memory_share:
      best.append(plan)
  return best


def search_table(plans: Sequence[Plan]) -> str:
  """Returns all plans, fastest first; a star marks the frontier."""
  best = {id(plan) for plan in frontier(plans)}
  ordered = sorted(plans, key=lambda p: (not p.fits, _seconds(p)))
  header = f"   step s   MFU   GiB  of chip  rows  {' x '.join(MESH_AXES):<42}  remat"
  return "\n".join([header, *(f"{' *'[id(p) in best]} {_line(p)}" for p in ordered)])


def _seconds(plan: Plan) -> float:
  return plan.step.seconds if plan.step else math.inf


def _line(plan: Plan) -> str:
  mesh = plan.mesh
  rows = plan.run.data.batch_size // plan.run.train.accumulation_steps
  rows //= mesh["data"] * mesh["fsdp"] * mesh["expert"]
  time, mfu = "     -", "    -"
  if plan.step:
    time = f"{'>' * plan.quick}{plan.step.seconds:.4g}".rjust(6)
    mfu = f"{plan.mfu(plan.step.seconds):>5.1%}"
  needed = plan.memory_share * plan.topology.chip.hbm_gib * GIB
  sizes = " x ".join(str(size) for size in mesh.values())
  return (
    f"{time} {mfu} {needed / GIB:>5.1f} {plan.memory_share:>7.0%} {rows:>5}  {sizes:<42}  "
    f"{plan.run.model.remat}"
  )
