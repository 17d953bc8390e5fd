# SPDX-License-Identifier: Apache-2.0
"""The first rows of a batch as a picture."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from mm1_jax.batch import Batch
from mm1_jax.data.examples import Encoder
from mm1_jax.data.inspect.facts import (
  RowSegment,
  Run,
  odd_loss,
  row_of,
  segments_of,
  words_of,
)
from mm1_jax.drawing import (
  DPI,
  INK,
  MUTED,
  PADDING,
  PAPER,
  WRONG,
  color,
  counted,
  printable,
  to_pixels,
)

ROW_INCHES = 3.0
MAX_LINES = 9  # segments listed of a row
MAX_CHARACTERS = 400  # of a segment's text, more than a line holds
LEGEND = (
  "colour: source, pale where text, full where a picture's tokens;  grey: padding;  "
  "numbers: segments above, image slots inside;  black below: trained on;  red: must not be"
)


def draw_batch(
  batch: Batch, encoder: Encoder, source_names: Sequence[str], *, num_rows: int = 4
) -> np.ndarray:
  """Returns `uint8[H, W, 3]`: what the first rows of a batch (numpy arrays) hold.

  Of each row: its positions in the colours of their sources, and which of them are trained on; its
  image slots, and the segments they belong to; and how each segment begins.

  Args:
    batch: the rows, on the host.
    encoder: the one that the data is encoded with.
    source_names: `data.sources` in order.
    num_rows: how many rows to draw, at most.
  """
  num_rows = min(num_rows, len(batch.tokens))
  inches = ROW_INCHES * num_rows + 0.4
  figure = Figure(figsize=(13, inches), dpi=DPI, facecolor=PAPER)
  figure.text(0.02, 0.1 / inches, LEGEND, color=MUTED)
  height = ROW_INCHES / inches
  odd = odd_loss(batch, encoder)
  for r in range(num_rows):
    row = row_of(batch, r)
    segments = segments_of(row, encoder)
    bottom = 1 - (r + 1) * height
    _draw_title(figure, bottom + 0.965 * height, r, row, segments, odd[r])
    _draw_strip(
      figure.add_axes((0.02, bottom + 0.69 * height, 0.96, 0.22 * height)), row, segments, odd[r]
    )
    left = _draw_slots(figure, bottom, height, row, segments)
    ax = figure.add_axes((left, bottom + 0.04 * height, 0.98 - left, 0.6 * height))
    _list_segments(ax, row, segments, encoder, source_names, 84 if left > 0.1 else 170)
  return to_pixels(figure)


def stack(rows: Sequence[Batch]) -> Batch:
  """Returns rows as a batch."""
  return Batch(*(np.stack(fields) for fields in zip(*rows, strict=True)))


def _draw_title(figure: Figure, y: float, number: int, row: Batch, segments, odd) -> None:
  counts = (
    f"row {number}:",
    f"{counted(len(segments), 'segment')},",
    f"{np.mean(row.segment_ids != 0):.1%} of {len(row.tokens)} positions filled,",
    f"{int(row.image_mask.sum())} of {len(row.image_mask)} image slots used,",
    f"{int(np.sum(row.loss_mask != 0))} trained on",
  )
  figure.text(0.02, y, "  ".join(counts), fontsize=10, color=INK, weight="bold", va="top")
  if odd.any():
    text = f"{int(odd.sum())} positions of padding or pictures are trained on"
    figure.text(0.98, y, text, fontsize=10, color=WRONG, weight="bold", va="top", ha="right")


def _draw_strip(ax: Axes, row: Batch, segments: Sequence[RowSegment], odd: np.ndarray) -> None:
  """Draws the positions of a row, numbered by segment, above what is trained on."""
  length = len(row.tokens)
  colors = np.tile(to_rgb(PADDING), (length, 1))
  for segment in segments:
    full = np.array(to_rgb(color(segment.source_id)))
    colors[segment.start : segment.stop] = 0.6 + 0.4 * full
    for run in segment.runs:
      colors[run.start : run.stop] = full
  loss = np.where((row.loss_mask != 0)[:, None], to_rgb(INK), to_rgb(PADDING))
  loss[odd] = to_rgb(WRONG)
  strip = np.stack([colors] * 7 + [np.ones_like(colors)] + [loss] * 2)
  ax.imshow(strip, aspect="auto", interpolation="nearest", extent=(0, length, 10, 0))
  ax.set_axis_off()
  for segment in segments:
    ax.plot([segment.start] * 2, [-2, 7], color=INK, linewidth=0.8)
    at = segment.start + 0.003 * length
    ax.text(at, -1, str(segment.number), fontsize=8, color=INK, va="center", clip_on=True)
    for run in segment.runs:
      label = {"boxstyle": "round,pad=0.15", "facecolor": PAPER, "linewidth": 0}
      if run.stop - run.start > 0.012 * length:
        ax.text(
          (run.start + run.stop) / 2,
          3.5,
          str(run.slot),
          fontsize=7,
          color=INK,
          ha="center",
          va="center",
          bbox=label,
        )
  ax.set(xlim=(0, length), ylim=(10, -2))


def _draw_slots(
  figure: Figure, bottom: float, height: float, row: Batch, segments: Sequence[RowSegment]
) -> float:
  """Draws the image slots into the left half; returns where it ends."""
  num_slots = len(row.images)
  if not num_slots:
    return 0.02
  owners = {run.slot: segment for segment in segments for run in segment.runs}
  columns = min(num_slots, max(4, -(-num_slots // 2)))
  lines = -(-num_slots // columns)
  width = 0.46 / columns
  for slot, (image, used) in enumerate(zip(row.images, row.image_mask, strict=True)):
    i, j = divmod(slot, columns)
    cell = (0.02 + j * width, bottom + (0.66 - 0.57 * (i + 1) / lines) * height)
    ax = figure.add_axes(
      (*cell, 0.92 * width, 0.57 * height / lines - 0.055 * height), xticks=[], yticks=[]
    )
    ax.set_anchor("NW")
    ax.imshow(image if used else np.array([[to_rgb(PADDING)]]))
    owner = owners.get(slot)
    ax.spines[:].set(color=color(owner.source_id) if owner else PADDING, linewidth=3 * bool(owner))
    wrong = used != (owner is not None)
    label = (
      f"{slot}: segment {owner.number}" if owner else f"{slot}: " + ("of none" if used else "empty")
    )
    ax.set_xlabel(label, fontsize=7.5, color=WRONG if wrong else MUTED, loc="left", labelpad=3)
  return 0.5


def _list_segments(
  ax: Axes, row: Batch, segments: Sequence[RowSegment], encoder: Encoder, names, width: int
) -> None:
  """Writes how each segment begins."""
  ax.set_axis_off()
  for line, segment in enumerate(segments):
    y = 1 - line / MAX_LINES
    if line == MAX_LINES - 1 and len(segments) > MAX_LINES:
      ax.text(0.03, y, f"and {len(segments) - line} more", fontsize=8.5, color=MUTED, va="top")
      break
    text = printable(_beginning(row, segment, encoder))
    name = names[segment.source_id] if segment.source_id < len(names) else "of no source"
    line_text = textwrap.shorten(f"{segment.number} {name}: {text}", width, placeholder=" …")
    ax.text(0, y, "■", fontsize=9, color=color(segment.source_id), va="top")
    ax.text(0.03, y, line_text, fontsize=8.5, color=INK, va="top", parse_math=False)


def _beginning(row: Batch, segment: RowSegment, encoder: Encoder) -> str:
  """Returns the text of a segment's first tokens; a picture is one mark."""
  text = ""
  for part in words_of(row, segment, encoder):
    if isinstance(part, Run):
      text += f" [picture in slot {part.slot}] "
    elif not part.special:
      text += part.text
    if len(text) > MAX_CHARACTERS:
      break
  return text
