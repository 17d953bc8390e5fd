# SPDX-License-Identifier: Apache-2.0
"""Plans side by side, from the JSON files that they were written to."""

from typing import Any

from mm1_jax import untrusted
from mm1_jax.plan.compile import PlanError
from mm1_jax.plan.memory import GIB

# Lists, and what only one of two may have.
_HIDDEN = ("compiler_memory", "kept", "slowest", "notes", "shortage")

_COLUMNS = (
  *("config", "slice", "mesh", "rows at a time", "remat", "memory GiB", "of chip"),
  # What depends on predicted time.
  *("step s", "MFU", "tokens/s", "collectives", "days", "chip-hours", "cost"),
  *("compile s", "CPU s", "compile GiB"),
)
_NUM_TIMES = 7


def read_figures(path: str) -> dict[str, Any]:
  """Reads what `--json` wrote.

  Raises:
    PlanError: there is no such file, or it is no plan.
  """
  values = untrusted.read_object(path, PlanError)
  if "model_flops" not in values:
    raise PlanError(f"'{path}' is no plan; `--json={path}` writes one.")
  return values


def compare_table(first: dict[str, Any], second: dict[str, Any]) -> str:
  """Returns every figure in which two plans differ, with the ratio of numbers."""
  a, b = _flat(first), _flat(second)
  lines = []
  for name in dict.fromkeys([*a, *b]):
    left, right = a.get(name), b.get(name)
    if left == right:
      continue
    ratio = ""
    if isinstance(left, int | float) and isinstance(right, int | float) and left:
      ratio = f"{right / left:.3f} x"
    lines.append(f"{name:<34} {_show(left):>16} {_show(right):>16}  {ratio}".rstrip())
  return "\n".join(lines) if lines else "the two plans are equal."


def markdown_table(plans: list[dict[str, Any]]) -> str:
  """Returns a row for each plan, as in docs/notes/plans.md; times only where they can be quoted."""
  lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
  for plan in plans:
    memory, mesh = plan["memory"], plan["mesh"]
    cells = [
      plan["config"] + ("" if plan["what"] == "train" else f" {plan['what']}"),
      plan["slice"],
      ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device",
      str(plan["rows_a_device"]),
      plan["remat"],
      f"{memory['total'] / GIB:.1f}",
      f"{memory['share']:.0%}" + ("" if plan["fits"] else ", does not fit"),
      *_times(plan),
      f"{plan['compile']['seconds']:.0f}" + ", no code" * plan["quick"],
      # If the compiler is stopped from outside, its time and memory are unknown.
      "-" if plan["quick"] else f"{plan['compile']['cpu_seconds']:.0f}",
      "-" if plan["quick"] else f"{plan['compile']['gib']:.1f}",
    ]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _times(plan: dict[str, Any]) -> list[str]:
  """Returns a plan's cells that depend on predicted time."""
  if not (plan["fits"] and plan.get("calibrated")):
    return ["-"] * _NUM_TIMES
  step, run = plan["step_seconds"], plan.get("run")
  # A quick plan has a lower bound of the time alone.
  least, most = ("at least ", "at most ") if plan["quick"] else ("", "")
  bounds = "" if plan["quick"] else f" ({step['lower']:.3g} to {step['upper']:.3g})"
  return [
    f"{least}{step['expected']:.3g}{bounds}",
    f"{most}{plan['mfu']['expected']:.1%}",
    f"{most}{plan['tokens_a_second']:,.0f}",
    "-" if plan["quick"] else f"{plan['collective_share']:.1%}",
    f"{least}{run['days']:.1f}" if run else "-",
    f"{least}{run['chip_hours']:,.0f}" if run else "-",
    f"{least}{run['cost']:,.0f}" if run and "cost" in run else "-",
  ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns nested figures by their path, such as `memory.params`."""
  flat: dict[str, Any] = {}
  for name, value in values.items():
    if name in _HIDDEN:
      continue
    if isinstance(value, dict):
      flat |= _flat(value, f"{prefix}{name}.")
    else:
      flat[f"{prefix}{name}"] = value
  return flat


def _show(value: Any) -> str:
  if value is None:
    return "-"
  if isinstance(value, float):
    return f"{value:.5g}"
  if isinstance(value, int) and not isinstance(value, bool):
    return f"{value:,}" if value < 10**9 else f"{value:.5g}"
  return str(value)
