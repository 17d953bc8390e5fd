# SPDX-License-Identifier: Apache-2.0
"""Pictures for people: how a run went, and what the model says about images.

Everything is drawn on matplotlib's Agg canvas, without pyplot and its global state.
"""

import dataclasses
import html
import io
import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from mm1_jax.drawing import (
  COLORS,
  DPI,
  INK,
  MUTED,
  PADDING,
  PAPER,
  WRONG,
  img,
  page,
  printable,
  printable_lines,
  to_png,
)
from mm1_jax.goodput import Goodput, read_goodput
from mm1_jax.legend import STANDARD_ERROR
from mm1_jax.metrics import format_seconds, read_metrics, read_tables

TASKS = "eval_tasks/"
GRID_COLUMNS = 6
Run = Mapping[str, Mapping[int, Any]]  # series of numbers and of tables, by name and step


@dataclasses.dataclass(frozen=True)
class Answer:
  """The model's answer about a picture, and the true one."""

  image: np.ndarray  # uint8[H, W, 3]
  prompt: str
  said: str
  truth: str


def write_report(
  out_dir: epath.PathLike,
  stages: Mapping[str, epath.PathLike],
  answers: Sequence[Answer] = (),
  accuracy: Mapping[str, Mapping[str, Mapping[int, float]]] | None = None,
) -> tuple[epath.Path, epath.Path]:
  """Writes `report.png` and the self-contained page `report.html`; returns their paths.

  Args:
    out_dir: where they go; made if missing.
    stages: workdir by stage name, in order, such as `{"pretrain": ..., "sft": ...}`. Read are
      `loss`, `loss/{source}`, `eval/loss/{source}`, the table `moe/load`, `lr`,
      `grad_norm/{part}` and where the time went; what a stage did not write is left out.
    answers: held-out pictures. The page shows all of them, the picture the first eight.
    accuracy: shares of right answers by stage, kind of question and step.
  """
  out_dir = epath.Path(out_dir)
  out_dir.mkdir(parents=True, exist_ok=True)
  runs = {
    name: read_metrics(path)
    | read_tables(path)
    | {f"accuracy/{kind}": curve for kind, curve in (accuracy or {}).get(name, {}).items()}
    for name, path in stages.items()
  }
  png, html_page = out_dir / "report.png", out_dir / "report.html"
  png.write_bytes(_draw_overview(runs, answers[:8]))
  goodput = {name: read_goodput(path) for name, path in stages.items()}
  html_page.write_text(_page(runs, goodput, answers))
  return png, html_page


# Curves.


def _draw_overview(runs: Mapping[str, Run], answers) -> bytes:
  """Returns the PNG of `report.png`: a column of panels for each stage, pictures below."""
  panels = [rows for rows in PANELS if any(rows.keys(run) for run in runs.values())]
  heights = [panel.height for panel in panels]
  answer_rows = -(-len(answers) // 2)
  if answers:
    heights.append(0.4 + 1.7 * answer_rows)
  figure = Figure(figsize=(13, sum(heights) + 0.6), dpi=DPI, facecolor=PAPER, layout="constrained")
  bands = figure.subfigures(max(1, len(heights)), 1, squeeze=False, height_ratios=heights or [1])[
    :, 0
  ]
  figure.suptitle(
    "MM1: " + " → ".join(runs), color=INK, fontsize=15, weight="bold", parse_math=False
  )
  for panel, band in zip(panels, bands, strict=False):
    axes = band.subplots(1, len(runs), squeeze=False)[0]
    for ax, (name, run) in zip(axes, runs.items(), strict=True):
      _draw_panel(panel, band, ax, name, run)
  if answers:
    _draw_answers(bands[-1], answers, answer_rows)
  return to_png(figure)


@dataclasses.dataclass(frozen=True)
class Panel:
  """One kind of plot, drawn once for each stage that wrote its keys."""

  title: str
  height: float  # inches
  keys: Callable[[Run], list[str]]
  draw: Callable[[Figure | SubFigure, Axes, Run], None]


def _draw_panel(panel: Panel, figure, ax: Axes, stage: str, run) -> None:
  _style(ax, f"{stage}: {panel.title}")
  if panel.keys(run):
    panel.draw(figure, ax, run)
  else:
    ax.set_axis_off()
    ax.text(0.5, 0.5, "nothing written", ha="center", color=MUTED, transform=ax.transAxes)


def _style(ax: Axes, title: str) -> None:
  ax.set_title(title, loc="left", fontsize=11, color=INK, weight="bold", parse_math=False)
  ax.spines[["top", "right"]].set_visible(False)
  ax.spines[["left", "bottom"]].set_color(PADDING)
  ax.tick_params(colors=MUTED, labelsize=9)
  ax.grid(axis="y", color=PADDING, linewidth=0.6)
  ax.set_axisbelow(True)


def _loss_keys(run) -> list[str]:
  return [name for name in run if name == "loss" or name.startswith(("loss/", "eval/loss/"))]


def _sources(run) -> list[str]:
  names = (name.removeprefix("eval/") for name in _loss_keys(run))
  return sorted({name.removeprefix("loss/") for name in names if "/" in name})


def _draw_loss(_figure, ax: Axes, run) -> None:
  """Training loss faint and smoothed, held-out loss as dots, one colour for each source."""
  for source, color in zip(_sources(run), itertools.cycle(COLORS)):
    trained = f"loss/{source}" in run
    if trained:
      steps, values = _points(run[f"loss/{source}"])
      ax.plot(steps, values, color=color, alpha=0.35, linewidth=0.8)
      ax.plot(steps, _smooth(values), color=color, linewidth=1.8, label=source)
    steps, values = _points(run.get(f"eval/loss/{source}", {}))
    label = None if trained else source
    ax.plot(
      steps, values, color=color, linewidth=1.2, linestyle=(0, (3, 2)), marker="o",
      markersize=4.5, markeredgecolor=PAPER, markeredgewidth=0.6, label=label,
    )  # fmt: skip
  if not _sources(run):
    steps, values = _points(run["loss"])
    ax.plot(steps, values, color=INK, alpha=0.35, linewidth=0.8)
    ax.plot(steps, _smooth(values), color=INK, linewidth=1.8, label="all")
  if any(name.startswith("eval/loss/") for name in run):
    ax.plot(
      [], [], color=MUTED, linestyle=(0, (3, 2)), marker="o", markersize=4.5, label="held out"
    )
  ax.set_xlabel("step", loc="left", fontsize=9, color=MUTED)
  ax.set_ylabel("loss, nats a token", fontsize=9, color=MUTED)
  _legend(ax)


def _draw_optimizer(_figure, ax: Axes, run) -> None:
  """Gradient norm of each part on the left, learning rate on the right."""
  parts = sorted(name for name in run if name.startswith("grad_norm/"))
  for name, color in zip(parts, itertools.cycle(COLORS)):
    steps, values = _points(run[name])
    positive = values > 0
    ax.plot(steps[positive], values[positive], color=color, linewidth=1.1, label=name[10:])
  if parts:
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("gradient norm", fontsize=9, color=MUTED)
  ax.set_xlabel("step", loc="left", fontsize=9, color=MUTED)
  if "lr" in run:
    right = ax.twinx() if parts else ax
    right.plot(*_points(run["lr"]), color=MUTED, linewidth=1.1, linestyle=":")
    right.set_ylabel("learning rate (dotted)", fontsize=9, color=MUTED)
    right.spines[["top", "left", "right", "bottom"]].set_visible(False)
    right.tick_params(colors=MUTED, labelsize=9)
    right.yaxis.set_major_formatter("{x:.2g}")
    right.set_ylim(bottom=0)
  _legend(ax)


def _expert_keys(run) -> list[str]:
  return ["moe/load"] if "moe/load" in run else []


def _draw_experts(figure, ax: Axes, run) -> None:
  """A heat map: steps across, the experts of each sparse layer down; white is an even share.

  A table is the mean over the steps since the one before.
  """
  tables = np.stack(list(run["moe/load"].values()), axis=-1)  # [units, experts, steps]
  num_units, num_experts, _ = tables.shape
  load = tables.reshape(num_units * num_experts, -1)
  mesh = ax.pcolormesh(
    [0, *run["moe/load"]],
    np.arange(len(load) + 1),
    load,
    cmap="RdBu_r",
    norm=TwoSlopeNorm(1.0, 0.0, max(2.0, float(np.percentile(load, 99)))),
    rasterized=True,
  )
  for unit in range(1, num_units):
    ax.axhline(unit * num_experts, color=INK, linewidth=0.8)
  ax.set_yticks(
    [(unit + 0.5) * num_experts for unit in range(num_units)],
    [f"unit {unit}\n{num_experts} experts" for unit in range(num_units)],
  )
  ax.invert_yaxis()
  ax.grid(visible=False)
  ax.set_xlabel("step", loc="left", fontsize=9, color=MUTED)
  bar = figure.colorbar(mesh, ax=ax, pad=0.02, fraction=0.05)
  bar.set_label("tokens, times an even share", fontsize=9, color=MUTED)
  bar.ax.tick_params(colors=MUTED, labelsize=8)
  bar.outline.set_visible(False)


def _task_keys(run) -> list[str]:
  """Returns the first metric of each benchmark."""
  names = [n for n in run if n.startswith(TASKS) and not n.endswith(STANDARD_ERROR)]
  return list({name.split("/")[1]: name for name in reversed(names)}.values())[::-1]


def _draw_tasks(_figure, ax: Axes, run) -> None:
  """Benchmarks with one standard error: shares on the left, other units (dotted) on the right."""
  right = None
  for name, color in zip(_task_keys(run), itertools.cycle(COLORS)):
    steps, values = _points(run[name])
    errors = run.get(f"{name}{STANDARD_ERROR}", {})
    share = values.max(initial=0) <= 1
    if not share and right is None:
      right = ax.twinx()
      right.tick_params(colors=MUTED, labelsize=9)
      right.spines[["top", "left", "right", "bottom"]].set_visible(False)
    axis, style = (ax, "-") if share else (right or ax, ":")
    axis.errorbar(
      steps, values, [errors.get(int(step), 0) for step in steps], color=color, linewidth=1.4,
      linestyle=style, marker="o", markersize=4, capsize=2,
    )  # fmt: skip
    ax.plot([], [], color=color, linestyle=style, marker="o", label=name.removeprefix(TASKS))
  ax.set_xlabel("step", loc="left", fontsize=9, color=MUTED)
  _legend(ax)


def _accuracy_keys(run) -> list[str]:
  return [name for name in run if name.startswith("accuracy/")]


def _draw_accuracy(_figure, ax: Axes, run) -> None:
  """Share of right answers about held-out pictures, a line for each kind of question."""
  for name, color in zip(_accuracy_keys(run), itertools.cycle(COLORS)):
    steps, values = _points(run[name])
    ax.plot(
      steps, 100 * values, color=color, linewidth=1.6, marker="o", markersize=4.5,
      label=name.removeprefix("accuracy/"),
    )  # fmt: skip
  ax.set_ylim(0, 101)
  ax.set_xlabel("step", loc="left", fontsize=9, color=MUTED)
  ax.set_ylabel("right of held out, %", fontsize=9, color=MUTED)
  _legend(ax)


PANELS = (
  Panel("answers", 3.0, _accuracy_keys, _draw_accuracy),
  Panel("loss", 3.4, _loss_keys, _draw_loss),
  Panel("benchmarks", 2.8, _task_keys, _draw_tasks),
  Panel("expert load", 2.6, _expert_keys, _draw_experts),
  Panel(
    "optimizer",
    2.2,
    lambda run: [n for n in run if n == "lr" or n.startswith("grad_norm/")],
    _draw_optimizer,
  ),
)


def _legend(ax: Axes) -> None:
  if ax.get_legend_handles_labels()[0]:
    legend = ax.legend(
      frameon=False, fontsize=9, labelcolor=INK, loc="upper right", bbox_to_anchor=(1, -0.13),
      ncols=5, borderpad=0, borderaxespad=0.2, handlelength=1.4, columnspacing=1.2,
    )  # fmt: skip
    for text in legend.get_texts():
      text.set_parse_math(False)


def _points(series: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the steps and values of a series, without what is not finite."""
  steps, values = np.array(list(series), np.float64), np.array(list(series.values()), np.float64)
  finite = np.isfinite(values)
  return steps[finite], values[finite]


def _smooth(values: np.ndarray) -> np.ndarray:
  """Returns a centred moving average over a twentieth of the curve, shorter at its ends."""
  half = min(len(values) // 5, max(2, len(values) // 40))
  sums = np.concatenate([[0.0], np.cumsum(values)])
  i = np.arange(len(values))
  begin, end = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
  return (sums[end] - sums[begin]) / (end - begin)


# Answers.


def _draw_answers(figure, answers: Sequence[Answer], num_rows: int) -> None:
  figure.suptitle("held-out pictures", x=0.01, ha="left", fontsize=11, color=INK, weight="bold")
  axes = figure.subplots(num_rows, 4, width_ratios=[1, 2.7] * 2, squeeze=False).reshape(-1, 2)
  for ax in axes.ravel():
    ax.set_axis_off()
  for (left, right), answer in zip(axes, answers, strict=False):
    left.imshow(answer.image)
    left.set_anchor("NW")
    down = 2.0  # points below the top of the picture
    for label, text, color, num_lines in (
      ("asked", answer.prompt, MUTED, 2),
      ("said", answer.said, INK, 3),
      ("true", answer.truth, COLORS[2], 3),
    ):
      wrapped = _wrap(text, 46, num_lines)
      weight = "bold" if label == "said" else "normal"
      _put(right, 0, down + 1.5, label, fontsize=8, color=MUTED)
      _put(right, 34, down, "\n".join(wrapped), fontsize=10, color=color, weight=weight)
      down += 14 * len(wrapped) + 6


def draw_grid(answers: Sequence[Answer]) -> bytes:
  """Returns a PNG of pictures with the question, and the answer in green if right, red if not."""
  lines = -(-len(answers) // GRID_COLUMNS)
  figure = Figure((13, 2.2 * lines), dpi=DPI, facecolor=PAPER, layout="constrained")
  axes = figure.subplots(lines, GRID_COLUMNS, squeeze=False).ravel()
  for ax in axes[len(answers) :]:
    ax.set_axis_off()
  for ax, answer in zip(axes, answers, strict=False):
    ax.imshow(answer.image)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_color(PADDING)
    question = "\n".join(_wrap(answer.prompt, 32, 2))
    ax.set_title(question, fontsize=9, color=MUTED, parse_math=False)
    right = answer.said == answer.truth
    said = f"✓ {answer.said}" if right else f"✗ {answer.said}  (true: {answer.truth})"
    style = {"fontsize": 11, "weight": "bold", "color": COLORS[2] if right else WRONG}
    text = "\n".join(_wrap(said, 26, 2))
    ax.text(
      0.5, -0.05, text, ha="center", va="top", transform=ax.transAxes, parse_math=False, **style
    )  # fmt: skip
  return to_png(figure)


def _put(ax: Axes, right: float, down: float, text: str, **style) -> None:
  """Puts text so many points right of and below the upper left corner."""
  ax.annotate(
    text, (0, 1), (right, -down), "axes fraction", "offset points",
    va="top", parse_math=False, linespacing=1.2, **style,
  )  # fmt: skip


def _wrap(text: str, width: int, num_lines: int) -> list[str]:
  """Returns at most `num_lines` lines of printable text, the last one cut with an ellipsis."""
  lines = textwrap.wrap(printable(text), width, max_lines=num_lines, placeholder=" …")
  return lines or ["(nothing)"]


# The page.

STYLE = """
section > img { width: 100%; background: #fff; border-radius: 8px; margin-bottom: 12px; }
.answers { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
figure { flex: 0 1 336px; margin: 0; background: #fff; border-radius: 8px; overflow: hidden; }
figure img { width: 100%; aspect-ratio: 4 / 3; object-fit: contain; background: #e9ebef; }
figcaption { padding: 8px 16px 14px; overflow-wrap: anywhere; }
dl { margin: 0; display: grid; grid-template-columns: 52px 1fr; gap: 4px 8px; }
dt { color: #5f6570; font-size: 13px; line-height: 24px; } dd { margin: 0; white-space: pre-wrap; }
.said { font-weight: 600; } .truth { color: #2f7a3f; } .prompt { color: #5f6570; }
"""


def _page(
  runs: Mapping[str, Run], goodput: Mapping[str, Goodput | None], answers: Sequence[Answer]
) -> str:
  """Returns the HTML page."""
  sections = []
  for name, run in runs.items():
    images = []
    for panel in PANELS:
      if panel.keys(run):
        figure = Figure((10, panel.height + 0.3), dpi=DPI, facecolor=PAPER, layout="constrained")
        _draw_panel(panel, figure, figure.subplots(), name, run)
        images.append(img(to_png(figure), f"{name}: {panel.title}"))
    tables = _loss_table(run) + _time_table(goodput[name])
    sections.append(f"<h2>{html.escape(name)}</h2>{tables}{''.join(images)}")
  if answers:
    cards = "".join(_card(answer) for answer in answers)
    sections.append(f'<h2>Held-out pictures</h2><div class="answers">{cards}</div>')
  body = "".join(f"<section>{section}</section>\n" for section in sections)
  return page("MM1: " + " → ".join(runs), body, STYLE)


def _loss_table(run) -> str:
  """Returns the first and last losses of each source as an HTML table."""
  rows = []
  for source in _sources(run):
    cells = []
    for key in (f"loss/{source}", f"eval/loss/{source}"):
      steps, values = _points(run.get(key, {}))
      cells += [f"{values[0]:.3f}", f"{values[-1]:.3f}"] if len(steps) else ["", ""]
    rows.append(f"<tr><td>{html.escape(source)}" + "".join(f"<td>{cell}" for cell in cells))
  head = "<tr><th>source<th>loss, first<th>last<th>held out, first<th>last"
  return f"<table>{head}{''.join(rows)}</table><br>" if rows else ""


def _time_table(spent: Goodput | None) -> str:
  """Returns where a run's time went, over all its commands, as an HTML table."""
  if spent is None or spent.total <= 0:
    return ""
  parts = [field.name for field in dataclasses.fields(spent) if field.name != "commands"]
  times = [getattr(spent, name) for name in parts]
  cells = "".join(f"<td>{format_seconds(s)} ({s / spent.total:.0%})" for s in times)
  head = "".join(f"<th>{name}" for name in parts)
  return (
    f"<table><tr><th>goodput<th>commands<th>all{head}<tr><td>{spent.share:.0%}"
    f"<td>{spent.commands}<td>{format_seconds(spent.total)}{cells}</table><br>"
  )


def _card(answer: Answer) -> str:
  out = io.BytesIO()
  Image.fromarray(answer.image).save(out, "PNG")
  lines = "".join(
    f'<dt>{label}<dd class="{kind}">{html.escape(printable_lines(text)) or "(nothing)"}'
    for label, kind, text in (
      ("asked", "prompt", answer.prompt),
      ("said", "said", answer.said),
      ("true", "truth", answer.truth),
    )
  )
  return (
    f"<figure>{img(out.getvalue(), 'held-out picture')}"
    f"<figcaption><dl>{lines}</dl></figcaption></figure>"
  )
