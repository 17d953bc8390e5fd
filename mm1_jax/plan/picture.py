# SPDX-License-Identifier: Apache-2.0
"""Draws a plan: memory, and the time of a step."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mm1_jax import drawing
from mm1_jax.plan.estimate import ROOM, Plan, Step
from mm1_jax.plan.memory import GIB
from mm1_jax.plan.report import largest_first


def draw(plan: Plan) -> bytes:
  """Returns a PNG: memory against the chip's, and where the time of a step goes."""
  figure = Figure(figsize=(11, 5 if plan.step else 2.6), dpi=drawing.DPI, layout="constrained")
  figure.suptitle(f"{plan.run.name}: {plan.what} on {plan.topology}", color=drawing.INK)
  axes = figure.subplots(3 if plan.step else 1, 1, squeeze=False)[:, 0]
  _draw_memory(axes[0], plan)
  if plan.step:
    _draw_kinds(axes[1], plan, plan.step)
    _draw_regions(axes[2], plan.step)
  return drawing.to_png(figure)


def _draw_memory(axes: Axes, plan: Plan) -> None:
  left, available = 0.0, plan.topology.chip.hbm_gib
  parts = {name: size / GIB for name, size in plan.memory.items() if size > 0}
  if plan.shortage:  # what the compiler did not break down
    parts["more"] = max(0.0, plan.shortage.needed / GIB - sum(parts.values()))
  for i, (name, size) in enumerate(parts.items()):
    shade = drawing.PADDING if name == "more" else drawing.color(i)
    axes.barh(0, size, left=left, color=shade, label=f"{name} {size:.2f}")
    left += size
  axes.axvline(available, color=drawing.WRONG)
  axes.axvline(ROOM * available, color=drawing.WRONG, linestyle=":")
  axes.set_title(f"memory of a device: {left:.1f} of {available:.1f} GiB", loc="left", fontsize=10)
  axes.set_xlim(0, max(left, available) * 1.02)
  _finish(axes, "GiB")


def _draw_kinds(axes: Axes, plan: Plan, step: Step) -> None:
  left = 0.0
  for i, (kind, seconds) in enumerate(largest_first(step.seconds_by_kind)):
    axes.barh(0, seconds, left=left, color=drawing.color(i), label=f"{kind} {seconds:.3g}")
    left += seconds
  axes.plot([step.lower, step.upper], [0.48, 0.48], color=drawing.INK, linewidth=2)
  axes.axvline(step.seconds, color=drawing.INK)
  state = "at best" if plan.quick else "expected"
  title = f"step: {step.seconds:.3g} s {state}, {plan.mfu(step.seconds):.1%} MFU"
  axes.set_title(
    title + ("" if plan.topology.chip.calibrated else ", UNCALIBRATED"), loc="left", fontsize=10
  )
  _finish(axes, "s, the compiler's estimate by kind; line above: from the roofline to it")


def _draw_regions(axes: Axes, step: Step) -> None:
  """Draws the step in order: its loops, and what lies between them."""
  order = [kind for kind, _ in largest_first(step.seconds_by_kind)]
  left = 0.0
  for region in step.regions:
    begin = left
    for kind in order:
      seconds = region.seconds.get(kind, 0.0)
      axes.barh(0, seconds, left=left, color=drawing.color(order.index(kind)))
      left += seconds
    if left - begin > 0.06 * step.upper:
      axes.text((begin + left) / 2, 0.5, region.name, ha="center", fontsize=8)
    axes.plot([left, left], [-0.4, 0.4], color=drawing.PAPER, linewidth=1.5)
  axes.set_title("in order: loops, and what lies between them", loc="left", fontsize=10)
  axes.set_ylim(-0.5, 0.8)
  _finish(axes, "s")


def _finish(axes: Axes, label: str) -> None:
  axes.set_yticks([])
  axes.set_xlabel(label, fontsize=8, color=drawing.MUTED)
  axes.tick_params(labelsize=8)
  for side in ("top", "left", "right"):
    axes.spines[side].set_visible(False)
  if axes.get_legend_handles_labels()[0]:
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
