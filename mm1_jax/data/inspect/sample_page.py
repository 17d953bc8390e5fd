# SPDX-License-Identifier: Apache-2.0
"""Records of one source, as an HTML page and as a picture."""

import textwrap

import PIL.Image
from matplotlib.figure import Figure

from mm1_jax.data.inspect.page import STYLE, figures_html
from mm1_jax.data.inspect.records import Sample, ShownPicture, ShownRecord, Text, Turn
from mm1_jax.drawing import (
  DPI,
  INK,
  MUTED,
  PAPER,
  WRONG,
  as_html,
  counted,
  data_url,
  elided,
  page,
  printable,
  shorten,
  thumbnail,
  to_png,
)

THUMBNAIL = 224  # pixels
MAX_PICTURES = 24  # shown of a record
COLUMNS, MAX_CELLS = 4, 12  # of the picture


def sample_page(sample: Sample) -> str:
  """Returns the page of a sample."""
  facts = sample.to_dict()
  count = max(1, len(sample.records))
  about = (
    f"<p class=about>{len(sample.records)} of {counted(sample.num_records, 'record')} in "
    f"{counted(sample.num_shards, 'shard')}, drawn with seed {sample.seed}.</p>"
  )
  positions = facts["positions"]
  figures = (
    (f"{positions['median']:,}", "positions, median"),
    (f"{positions['max']:,}", f"longest; a row has {sample.seq_len:,}"),
    (f"{facts['trained'] / max(1, positions['sum']):.1%}", "of positions trained on"),
    (f"{facts['pictures'] / count:.1f}", "pictures a record"),
    (str(sum(1 for record in sample.records if record.problems)), "records that are left out"),
  )
  tables = "".join(
    _counts(title, facts[key])
    for title, key in (
      ("kind", "kinds"),
      ("licence", "licenses"),
      ("source", "sources"),
      ("left out because", "left_out"),
    )
  )
  records = "".join(map(_record, sample.records))
  body = f"<section>{about}{figures_html(figures)}<div class=counts>{tables}</div></section>"
  return page(f"{sample.name}: records", f"{body}\n{records}", STYLE)


def _counts(title: str, counts: dict[str, int]) -> str:
  if not counts:
    return ""
  lines = "".join(
    f"<tr><td class=wide>{shorten(name, 90) or '(none)'}<td>{count:,}"
    for name, count in counts.items()
  )
  return f"<table><tr><th class=wide>{title}<th>records{lines}</table>"


def _record(record: ShownRecord) -> str:
  facts = [counted(record.num_positions, "position"), f"{record.trained:,} trained on"]
  facts += [shorten(text, 160) for text in (record.source, record.license, record.credit) if text]
  problems = "".join(f"<p class=bad>✗ left out: {as_html(p)}</p>" for p in record.problems)
  turns = "".join(map(_turn, record.turns))
  return (
    f"<section class=row><h3>{record.number:,} {shorten(record.id, 160)} "
    f"<small>{' · '.join(facts)}</small></h3>{problems}{turns}</section>\n"
  )


def _turn(turn: Turn) -> str:
  left = MAX_PICTURES
  items = []
  for item in turn.items:
    if isinstance(item, ShownPicture):
      left -= 1
      items.append(_picture(item) if left >= 0 else "<p class=cut>a picture, not shown</p>")
    else:
      items.append(_text(item))
  role = f"<p class=role>{as_html(turn.role)}</p>" if turn.role else ""
  return f'<div class="turn {as_html(turn.role)}">{role}{"".join(items)}</div>'


def _text(item: Text) -> str:
  return (
    f"<div class=item><div class=text dir=auto>{elided(item.text)}</div>"
    f"<small>{counted(item.num_positions, 'position')}</small></div>"
  )


def _picture(item: ShownPicture) -> str:
  if item.pixels is None:
    shown = f"<p class=bad>✗ {as_html(item.problem)}</p>"
  else:
    jpeg = thumbnail(PIL.Image.fromarray(item.pixels), THUMBNAIL)
    shown = f'<img alt="" src="{data_url(jpeg, "jpeg")}">'
  caption = f"{as_html(item.about)}, {counted(item.num_positions, 'position')}"
  return f"<figure class=item>{shown}<small>{caption}</small></figure>"


def draw_sample(sample: Sample) -> bytes:
  """Returns a PNG of the first records: the first picture of each, and how its text begins."""
  cells = sample.records[:MAX_CELLS]
  lines = max(1, -(-len(cells) // COLUMNS))
  inches = 3.1 * lines + 0.5
  figure = Figure(figsize=(13, inches), dpi=DPI, facecolor=PAPER)
  title = f"{sample.name}: {len(cells)} of {sample.num_records:,} records"
  figure.text(
    0.02, 1 - 0.15 / inches, title, fontsize=12, weight="bold", color=INK, va="top",
    parse_math=False,
  )  # fmt: skip
  height = 3.1 / inches
  for number, record in enumerate(cells):
    line, column = divmod(number, COLUMNS)
    left, top = 0.02 + column * 0.245, 1 - 0.5 / inches - line * height
    pictures = [p.pixels for p in record.pictures if p.pixels is not None]
    if pictures:
      ax = figure.add_axes((left, top - 0.55 * height, 0.225, 0.55 * height), xticks=[], yticks=[])
      ax.imshow(pictures[0])
      ax.set_anchor("NW")
      ax.set_axis_off()
    _write(figure, left, top - 0.57 * height * bool(pictures), record, 4 if pictures else 14)
  return to_png(figure)


def _write(figure: Figure, left: float, top: float, record: ShownRecord, num_lines: int) -> None:
  """Writes what a record is, in one line, and the beginning of its text below."""
  about = f"{record.number}: {counted(record.num_positions, 'position')}"
  about += f", {counted(len(record.pictures), 'picture')}"
  head = f"{record.number}: left out, {record.problems[0]}" if record.problems else about
  color = WRONG if record.problems else MUTED
  style = {"va": "top", "parse_math": False}
  figure.text(
    left, top, textwrap.shorten(head, 44, placeholder=" …"), fontsize=8, color=color, **style
  )
  text = printable(record.text if record.turns else record.id)
  lines = textwrap.wrap(text, 42, max_lines=num_lines, placeholder=" …")
  inch = 1 / figure.get_figheight()
  figure.text(left, top - 0.18 * inch, "\n".join(lines), fontsize=9, color=INK, **style)
