# SPDX-License-Identifier: Apache-2.0
"""Shows a plan: as figures for other programs, and as a table for people."""

from typing import Any

from mm1_jax.metrics import format_seconds
from mm1_jax.plan.estimate import ROOM, Plan, Step
from mm1_jax.plan.memory import GIB

_MEANINGS = {
  "temporaries": "activations, gradients, workspace, at the fullest moment",
  "padding": "of params, optimizer and batch to whole tiles",
  "matmul": "matrix products",
  "elementwise": "everything else that is computed",
  "kernel": "Pallas kernels",
  "collective": "waiting for other chips",
  "copy": "waiting for HBM or the host",
}


def figures(plan: Plan, price: float | None = None) -> dict[str, Any]:
  """Returns all figures of a plan, JSON-compatible; bytes, FLOPs and seconds in plain units.

  Args:
    plan: one that fits or not; what is unknown is left out.
    price: of a chip for an hour.
  """
  run, topology, result = plan.run, plan.topology, plan.compiled.result
  rows = run.data.batch_size // run.train.accumulation_steps
  split = plan.mesh["data"] * plan.mesh["fsdp"] * plan.mesh["expert"]
  values: dict[str, Any] = {
    "config": run.name,
    "what": plan.what,
    "quick": plan.quick,
    "slice": topology.name,
    "num_slices": topology.num_slices,
    "chips": topology.num_chips,
    "hosts": topology.num_hosts,
    "mesh": plan.mesh,
    "rows": run.data.batch_size,
    "rows_a_device": rows // split,
    "accumulation_steps": run.train.accumulation_steps,
    "positions_a_row": run.data.seq_len,
    "images_a_row": run.data.images_per_row,
    "remat": run.model.remat,
    "fits": plan.fits,
    "memory": {
      **plan.memory,
      "total": plan.shortage.needed if plan.shortage else sum(plan.memory.values()),
      "available": topology.chip.hbm_gib * GIB,
      "share": plan.memory_share,
    },
    "compiler_memory": result.memory,
    "kept": [vars(buffer) for buffer in result.kept],
    "model_flops": plan.model_flops,
    "compile": {
      "seconds": result.seconds,
      "cpu_seconds": result.cpu_seconds,
      "gib": result.process_gib,
      "rematerializations": result.rematerializations,
      **result.versions,
    },
    "notes": plan.notes,
  }
  if plan.shortage:
    values["shortage"] = {
      "excess": plan.shortage.excess,
      "buffers": [vars(buffer) for buffer in plan.shortage.buffers],
      "advice": plan.advice,
    }
  if plan.step:
    values |= _speed(plan, plan.step, price)
  return values


def _speed(plan: Plan, step: Step, price: float | None) -> dict[str, Any]:
  seconds = step.seconds
  values: dict[str, Any] = {
    "calibrated": plan.topology.chip.calibrated,
    "step_seconds": {"expected": seconds, "lower": step.lower, "upper": step.upper},
    "mfu": {
      "expected": plan.mfu(seconds),
      "lower": plan.mfu(step.upper),
      "upper": plan.mfu(step.lower),
    },
    "tokens_a_second": plan.tokens / seconds,
    "images_a_second": plan.images / seconds,
    "seconds_by_kind": step.seconds_by_kind,
    "collective_share": step.seconds_by_kind.get("collective", 0.0) / step.upper,
    "executed_flops": step.flops * plan.topology.num_devices,
    "hbm_bytes": step.hbm_bytes,
    "collectives": {kind: vars(total) for kind, total in step.collectives.items()},
    "slowest": [
      dict(zip(("seconds", "kind", "name", "op_name"), entry, strict=True))
      for entry in step.slowest
    ],
    "trip_counts": step.trip_counts,
  }
  if plan.what == "train":
    values["run"] = {
      "steps": plan.run.train.num_steps,
      "days": plan.hours / 24,
      "chip_hours": plan.chip_hours,
    }
    if price is not None:
      values["run"] |= {"price": price, "cost": price * plan.chip_hours}
  return values


def table(plan: Plan, price: float | None = None) -> str:
  """Returns a plan for people to read."""
  values = figures(plan, price)
  mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
  lines = [
    f"{plan.run.name}: {plan.what} on {plan.topology}",
    f"mesh {mesh}; {values['rows']} rows of {values['positions_a_row']} positions and "
    f"{values['images_a_row']} images, {values['rows_a_device']} at a time on a device "
    f"({values['accumulation_steps']} micro-batches); remat {values['remat']}",
    "",
    *_memory_lines(plan, values),
    "",
    *_flops_lines(plan, values),
  ]
  if plan.step:
    lines += ["", *_collective_lines(values), "", *_time_lines(values)]
  compile_ = values["compile"]
  if compile_["rematerializations"]:
    lines += ["", f"! {compile_['rematerializations']} arrays are wholly rematerialized"]
  lines += [
    "",
    _compile_line(compile_),
    *(f"- {note}" for note in plan.notes),
  ]
  return "\n".join(lines)


def _compile_line(values: dict[str, Any]) -> str:
  line = f"compiled in {format_seconds(values['seconds'])}"
  if values["cpu_seconds"]:  # unknown of a compile that was stopped from outside
    line += f", {values['cpu_seconds']:.0f} s of CPU, with {values['gib']:.1f} GiB"
  return line + f" (jax {values['jax']}, libtpu {values['libtpu']})"


def _memory_lines(plan: Plan, values: dict[str, Any]) -> list[str]:
  memory, lines = values["memory"], []
  if not plan.shortage or plan.compiled.hlo:  # else only the arguments are known
    lines = [
      _row(name, f"{size / GIB:.2f} GiB", _MEANINGS.get(name, ""))
      for name, size in plan.memory.items()
    ]
  state = "fits" if memory["share"] <= ROOM else "too tight" if plan.fits else "does NOT fit"
  total = f"{memory['total'] / GIB:.2f} GiB"
  chip = f"of {memory['available'] / GIB:.2f} ({memory['share']:.0%}): {state}"
  lines = ["memory of a device", *lines, _row("total", total, chip)]
  if plan.shortage:
    lines.append(f"  {plan.shortage.excess / GIB:.2f} GiB too much. The largest buffers:")
    lines += [
      f"    {b.bytes / GIB:7.2f} GiB  {b.shape}  {b.operation}  {b.source}".rstrip()
      for b in plan.shortage.buffers
    ]
    lines += ["  What would help:", *(f"    {line}" for line in plan.advice)]
  return lines


def _flops_lines(plan: Plan, values: dict[str, Any]) -> list[str]:
  flops = plan.model_flops
  lines = [f"model FLOPs of a {'step' if plan.what == 'train' else 'call'}"]
  lines += [
    _row(name, f"{count:.3g}", f"{count / flops['total']:.1%}") for name, count in flops.items()
  ]
  if plan.step:
    ratio = values["executed_flops"] / flops["total"]
    lines.append(_row("executed", f"{values['executed_flops']:.3g}", f"{ratio:.2f} x the model's"))
    lines.append(_row("HBM traffic", f"{plan.step.hbm_bytes / 1e9:.4g} GB", "of a device"))
  return lines


def _collective_lines(values: dict[str, Any]) -> list[str]:
  lines = ["collectives of a device     times   GB sent   s of links"]
  for kind, total in sorted(values["collectives"].items(), key=lambda item: -item[1]["seconds"]):
    lines.append(
      f"  {kind:<22} {total['count']:>8.0f}  {total['wire'] / 1e9:>8.3g}  {total['seconds']:>10.3g}"
    )
  return lines if len(lines) > 1 else ["no collectives"]


def _time_lines(values: dict[str, Any]) -> list[str]:
  step, mfu = values["step_seconds"], values["mfu"]

  def span(low: float, high: float, form: str) -> str:
    return f"between {low:{form}} and {high:{form}}"

  lines = [
    "predicted" + ", at best" * values["quick"] + ", UNCALIBRATED" * (not values["calibrated"]),
    _row("step", f"{step['expected']:.4g} s", span(step["lower"], step["upper"], ".4g")),
    _row("MFU", f"{mfu['expected']:.1%}", span(mfu["lower"], mfu["upper"], ".1%")),
    _row("tokens/s", f"{values['tokens_a_second']:,.0f}"),
    _row("images/s", f"{values['images_a_second']:,.0f}"),
  ]
  lines += [
    _row(kind, f"{seconds / step['upper']:.1%}", _MEANINGS[kind])
    for kind, seconds in largest_first(values["seconds_by_kind"])
  ]
  if run := values.get("run"):
    lines.append(_row("the run", f"{run['days']:.1f} days", f"{run['steps']:,} steps on all chips"))
    lines.append(_row("", f"{run['chip_hours']:,.0f}", "chip-hours"))
    if "cost" in run:
      lines.append(_row("", f"{run['cost']:,.0f}", f"at {run['price']:g} a chip-hour"))
  return lines


def _row(name: str, value: str, remark: str = "") -> str:
  return f"  {name:<20} {value:>12}  {remark}".rstrip()


def largest_first(values: dict[str, float]) -> list[tuple[str, float]]:
  """Returns the items of a dict of numbers, in falling order of the numbers."""
  return sorted(values.items(), key=lambda item: -item[1])
