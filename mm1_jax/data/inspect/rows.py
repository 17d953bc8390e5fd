# SPDX-License-Identifier: Apache-2.0
"""One packed row as HTML: its bar, what is trained on, its positions, image slots and texts."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import PIL.Image

from mm1_jax.batch import Batch
from mm1_jax.data.inspect.compare import Origin
from mm1_jax.data.inspect.facts import RowSegment, Run, odd_loss, stretches, words_of
from mm1_jax.data.inspect.stream import DrawnRow, Stream
from mm1_jax.drawing import (
  COLORS,
  INK,
  MUTED,
  WRONG,
  as_html,
  color,
  counted,
  data_url,
  elided,
  shorten,
  thumbnail,
)

THUMBNAIL = 112  # pixels


def row_html(stream: Stream, number: int, drawn: DrawnRow) -> str:
  row, segments = drawn.row, drawn.segments
  length = len(row.tokens)
  filled, trained = int((row.segment_ids != 0).sum()), int((row.loss_mask != 0).sum())
  counts = (
    f"{counted(len(segments), 'segment')}, {filled:,} of {length:,} positions filled, "
    f"{int(row.image_mask.sum())} of {len(row.image_mask)} image slots used, {trained:,} trained on"
  )
  bars = "".join(_bar(stream, number, segment, length) for segment in segments)
  one = Batch(*(field[None] for field in row))
  odd = odd_loss(one, stream.encoder)[0]
  details = "".join(
    _segment(stream, number, row, segment, origin)
    for segment, origin in zip(segments, drawn.origins, strict=True)
  )
  return (
    f'<section class=row id="r{number}"><h3>{as_html(drawn.name)} <small>{counts}</small></h3>'
    f"<div class=strip>{bars}</div>{_loss_lane(row, odd)}{_saw(row)}{_slots(number, drawn)}"
    f"<ol class=segments>{details}</ol></section>\n"
  )


def _bar(stream: Stream, number: int, segment: RowSegment, length: int) -> str:
  def place(start: int, stop: int, within: int) -> str:
    return f"left:{100 * start / within:.3f}%;width:{100 * (stop - start) / within:.3f}%"

  def run_html(run: Run) -> str:
    where = place(run.start - segment.start, run.stop - segment.start, len(segment))
    title = f"slot {run.slot}: positions {run.start} to {run.stop - 1}"
    return f'<i class=run style="{where}" title="{title}"><span>{run.slot}</span></i>'

  runs = "".join(map(run_html, segment.runs))
  title = f"segment {segment.number}, {_name(stream, segment)}: {_positions(segment)}"
  return (
    f'<a class=bar href="#r{number}s{segment.number}" title="{as_html(title)}" '
    f'style="{place(segment.start, segment.stop, length)};{_colors(segment.source_id)}">'
    f"<b>{segment.number}</b>{runs}</a>"
  )


def _loss_lane(row: Batch, odd: np.ndarray) -> str:
  """Returns the loss mask as one black path, and one red path of what must not be in it."""
  paths = "".join(
    f'<path fill="{fill}" d="{_path(mask)}"/>'
    for fill, mask in ((INK, (row.loss_mask != 0) & ~odd), (WRONG, odd))
    if mask.any()
  )
  return (
    f'<svg class="lane loss" viewBox="0 0 {len(odd)} 1" preserveAspectRatio="none" role="img" '
    f'aria-label="what is trained on">{paths}</svg>'
  )


def _path(mask: np.ndarray) -> str:
  return "".join(f"M{a} 0H{b}V1H{a}Z" for a, b in stretches(mask) if mask[a])


def _saw(row: Batch) -> str:
  """Returns the positions as a line: in a good row one tooth for each segment."""
  positions = row.positions
  corners = [0, *(np.flatnonzero(np.diff(positions, n=2)) + 1).tolist(), len(positions) - 1]
  top = max(1, int(positions.max(initial=0)))
  points = " ".join(f"{x},{top - int(positions[x])}" for x in sorted(set(corners)))
  return (
    f'<svg class="lane saw" viewBox="0 0 {len(positions)} {top}" preserveAspectRatio="none" '
    f'role="img" aria-label="positions"><polyline points="{points}" fill="none" stroke="{MUTED}" '
    'vector-effect="non-scaling-stroke"/></svg>'
  )


def _slots(number: int, drawn: DrawnRow) -> str:
  owners = {run.slot: segment for segment in drawn.segments for run in segment.runs}
  cells = []
  for slot, used in enumerate(drawn.row.image_mask):
    owner = owners.get(slot)
    if owner and not used:
      label = f"<span class=bad>{slot}: empty, but segment {owner.number} has its ids</span>"
    elif used and not owner:
      label = f"<span class=bad>{slot}: of no segment</span>"
    else:
      label = f"{slot}: segment {owner.number}" if owner else f"{slot}: empty"
    cells.append(f"<div class=slot>{_picture(number, slot, owner, bool(used))}{label}</div>")
  return f"<div class=slots>{''.join(cells)}</div>" if cells else ""


def _picture(number: int, slot: int, owner: RowSegment | None, used: bool) -> str:
  colors = f' style="{_colors(owner.source_id)}"' if owner else ""
  kind = f"picture p{number}_{slot}" if used else "picture"
  return (
    f'<span class="{kind}"{colors} role=img title="slot {slot}" aria-label="slot {slot}"></span>'
  )


def pictures_css(rows: Iterable[DrawnRow]) -> str:
  """Returns the style that gives each slot its picture: it is shown twice, and kept once."""
  rules = []
  for number, drawn in enumerate(rows):
    for slot, (image, used) in enumerate(zip(drawn.row.images, drawn.row.image_mask, strict=True)):
      if used:
        url = data_url(thumbnail(PIL.Image.fromarray(image), THUMBNAIL), "jpeg")
        rules.append(f".p{number}_{slot} {{ background-image: url({url}); }}\n")
  return "".join(rules)


def _segment(
  stream: Stream, number: int, row: Batch, segment: RowSegment, origin: Origin | None
) -> str:
  at = slice(segment.start, segment.stop)
  first, last = row.positions[at][0], row.positions[at][-1]
  trained = int((row.loss_mask[at] != 0).sum())
  slots = ", ".join(str(run.slot) for run in segment.runs)
  facts = [
    _positions(segment),
    f"<code>positions</code> {first} to {last}",
    f"{trained:,} trained on",
    f"{'slot' if len(segment.runs) == 1 else 'slots'} {slots}" if slots else "no picture",
    _origin(origin),
  ]
  text = "".join(
    _part(number, row, segment, part) for part in words_of(row, segment, stream.encoder)
  )
  return (
    f'<li class=segment id="r{number}s{segment.number}" style="{_colors(segment.source_id)}">'
    f"<p><b>{segment.number} {as_html(_name(stream, segment))}</b> <small>{' · '.join(facts)}"
    f"</small></p><div class=text dir=auto>{text}</div></li>"
  )


def _origin(origin: Origin | None) -> str:
  if origin is None:
    return "<span class=bad>of no record</span>"
  part = (
    "whole"
    if origin.whole
    else f"part: {origin.start:,} to {origin.stop - 1:,} of its {origin.num_positions:,}"
  )
  licence = "".join(f" · {shorten(text, 120)}" for text in (origin.license, origin.credit) if text)
  differs = ", ".join(origin.differs)
  wrong = f" <span class=bad>✗ not as in the record: {differs}</span>" if differs else ""
  return f"record {origin.record:,} “{shorten(origin.id, 80)}”, {part}{licence}{wrong}"


def _part(number: int, row: Batch, segment: RowSegment, part: Any) -> str:
  if isinstance(part, Run):
    used = part.slot < len(row.image_mask) and bool(row.image_mask[part.slot])
    picture = _picture(number, part.slot, segment, used)
    trained = row.loss_mask[max(0, part.start - 1) : part.stop - 1].any()
    label = f"&lt;image&gt; &times; {part.stop - part.start}, slot {part.slot}"
    return f'{picture}<span class="id{" odd" if trained or not used else ""}">{label}</span>'
  if not part.special:
    text = elided(part.text)
    return text if part.trained else f"<span class=off>{text}</span>"
  odd = part.trained and part.text.startswith("<image")
  kind = "id odd" if odd else "id on" if part.trained else "id"
  return f'<span class="{kind}">{as_html(part.text)}</span>'


def _positions(segment: RowSegment) -> str:
  return (
    f"{counted(len(segment), 'position')}, {segment.start:,} to {segment.stop - 1:,} of the row"
  )


def _name(stream: Stream, segment: RowSegment) -> str:
  known = 0 <= segment.source_id < len(stream.sources)
  return stream.sources[segment.source_id].name if known else f"source {segment.source_id}?"


def chip(source: int) -> str:
  return f'<span class=chip style="{_colors(source)}"></span>'


def _colors(source: int) -> str:
  """Returns a source's colour, full and pale, as CSS variables; striped when used once more."""
  full = color(source)
  red, green, blue = (int(full[i : i + 2], 16) for i in (1, 3, 5))
  pale = "".join(f"{round(0.6 * 255 + 0.4 * level):02x}" for level in (red, green, blue))
  again = ";--stripes:repeating-linear-gradient(90deg,#fffa 0 2px,#fff0 2px 6px)"
  return f"--full:{full};--pale:#{pale}" + again * (source >= len(COLORS))
