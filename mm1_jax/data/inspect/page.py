# SPDX-License-Identifier: Apache-2.0
"""The packed stream as an HTML page: what was counted, what was checked, and the rows themselves.

Without scripts: a click on a segment's bar goes to its text, by its address on the page.
"""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mm1_jax.data.inspect.facts import SourceFacts
from mm1_jax.data.inspect.rows import chip, pictures_css, row_html
from mm1_jax.data.inspect.stream import Stream
from mm1_jax.drawing import as_html, page

STYLE = (pathlib.Path(__file__).parent / "page.css").read_text()
BARS = 20  # of a histogram, at most


def stream_page(stream: Stream) -> str:
  """Returns the page of a stream."""
  facts = stream.to_dict()
  data = stream.run.data
  drawn = stream.drawn
  shown = "" if len(drawn) == stream.rows else f" The first {len(drawn)} of them are drawn."
  about = (
    f"<p class=about>Steps {stream.steps.start} to {stream.steps[-1]}: {stream.num_rows} of the "
    f"{data.batch_size} rows of each global batch are read and checked, {stream.rows} in all."
    f"{shown} A row has {data.seq_len} positions and {data.images_per_row} image slots; a picture "
    f"takes {stream.run.image_positions} positions.</p>"
  )
  sections = [
    about + _verdict(stream) + _figures(facts),
    f"<h2>Mixture</h2>{_mixture(stream, facts)}",
    f"<h2>Lengths</h2>{_histograms(stream)}",
    f"<h2>Dropped</h2>{_drops(stream)}",
    f"<h2>Checks</h2>{_checks(stream)}",
    f"<h2>Rows</h2>{_legend(stream.sources)}",
  ]
  body = "".join(f"<section>{section}</section>\n" for section in sections)
  rows = "".join(row_html(stream, number, row) for number, row in enumerate(drawn))
  title = f"{stream.run.name}: the packed stream"
  return page(title, body + rows, STYLE + pictures_css(drawn))


def _verdict(stream: Stream) -> str:
  failed = stream.failed
  checks = list(stream.checks)
  if not failed:
    return f"<p class=verdict>✓ All {len(checks)} checks passed.</p>"
  names = "".join(f"<li>{as_html(name)}" for name in failed)
  return (
    f'<div class="verdict failed"><b class=bad>✗ {len(failed)} of {len(checks)} checks failed</b>'
    f"<ul>{names}</ul>What fails is listed under Checks.</div>"
  )


def _figures(facts: Mapping[str, Any]) -> str:
  positions, slots, rows = facts["positions"], facts["image_slots"], max(1, facts["rows"])
  segments = sum(source["segments"] for source in facts["sources"].values())
  dropped = sum(sum(source["dropped"].values()) for source in facts["sources"].values())
  filled = max(1, positions["filled"])
  figures = (
    (f"{positions['filled_fraction']:.1%}", "of positions filled"),
    (f"{slots['used_fraction']:.1%}", "of image slots used") if slots["all"] else ("-", "no slots"),
    (f"{positions['trained'] / filled:.1%}", "of filled positions trained on"),
    (f"{segments / rows:.1f}", "segments a row"),
    (f"{slots['used'] / rows:.1f}", "pictures a row"),
    (f"{dropped:,}", "examples dropped"),
  )
  return figures_html(figures)


def figures_html(figures: Iterable[tuple[str, str]]) -> str:
  """Returns numbers, large, with what they are of."""
  cells = "".join(f"<div><b>{value}</b>{label}</div>" for value, label in figures)
  return f"<div class=figures>{cells}</div>"


def _mixture(stream: Stream, facts: Mapping[str, Any]) -> str:
  head = (
    "<th>source<th>asked<th>planned<th>read<th>examples asked<th>planned<th>positions"
    "<th>trained on<th>pictures<th>segments<th>parts of a record<th>median length<th>longest"
  )
  lines = []
  for number, source in enumerate(stream.sources):
    of = facts["sources"][source.name]
    lengths = of["lengths"]
    cells = (
      *(f"{of[f'{key}_fraction']:.1%}" for key in ("asked", "planned", "positions")),
      *(f"{of[f'{key}_examples_fraction']:.1%}" for key in ("asked", "planned")),
      *(f"{of[key]:,}" for key in ("positions", "trained", "pictures", "segments", "parts")),
      *((f"{lengths['median']:,}", f"{lengths['max']:,}") if lengths else ("-", "-")),
    )
    lines.append(
      f"<tr><td>{chip(number)}{as_html(source.name)}" + "".join(f"<td>{cell}" for cell in cells)
    )
  planned = facts["planned"]
  window = max(stream.run.data.window_rows, stream.run.data.batch_size)
  note = (
    f"<p class=note>Shares of positions: asked for by the weights; planned in all "
    f"{stream.planned_rows:,} rows of these steps, where {planned['filled_fraction']:.1%} of the "
    f"positions and {planned['used_fraction']:.1%} of the image slots are used; and read. Then of "
    f"examples. The weights are shares of {stream.run.data.weight_by}. "
    f"Few steps may be off: shares are held over {window:,} rows and more.</p>"
  )
  return f"<div class=scroll><table><tr>{head}{''.join(lines)}</table></div>{note}"


def _histograms(stream: Stream) -> str:
  lengths = [length for source in stream.sources for length in source.lengths]
  rows = sorted(stream.segments_per_row.elements())
  return (
    "<div class=histograms>"
    + _histogram("Segments by length, in positions", lengths)
    + _histogram("Rows by number of segments", rows)
    + "</div>"
  )


def _histogram(caption: str, values: Sequence[int]) -> str:
  if not values:
    return f"<figure class=histogram><figcaption>{caption}: nothing to count.</figcaption></figure>"
  width = -(-(max(values) + 1 - min(values)) // BARS)
  first = min(values) // width * width
  edges = range(first, max(values) + width, width)
  counts, _ = np.histogram(values, bins=edges)
  bars = "".join(
    f'<div title="{low} to {low + width - 1}: {count}">{count or ""}'
    f'<i style="height:{80 * count / counts.max():.0f}px"></i><span>{low}</span></div>'
    for low, count in zip(edges, counts.tolist(), strict=False)
  )
  per_bar = "one value a bar" if width == 1 else f"{width} values a bar, from the one below it"
  return (
    f"<figure class=histogram><figcaption>{caption} ({per_bar})</figcaption>"
    f"<div class=bars>{bars}</div></figure>"
  )


def _drops(stream: Stream) -> str:
  lines = [
    f"<tr><td>{chip(number)}{as_html(source.name)}<td class=wide>{as_html(reason)}"
    f"<td class=wide>{where}<td>{count:,}"
    for number, source in enumerate(stream.sources)
    for where, drops in (
      ("these rows", source.drops),
      ("the whole source, when it was indexed", source.left_out),
    )
    for reason, count in drops.items()
  ]
  if not lines:
    return "<p>Nothing was left out, of these rows or when the sources were indexed.</p>"
  head = "<tr><th>source<th class=wide>reason<th class=wide>left out of<th>examples"
  return f"<div class=scroll><table>{head}{''.join(lines)}</table></div>"


def _checks(stream: Stream) -> str:
  lines = []
  for check in stream.checks:
    places = "<br>".join(map(as_html, check.places))
    more = "<br>…" if check.failed and len(check.places) < check.failed else ""
    verdict = "<span class=bad>✗ FAIL</span>" if check.failed else "✓ pass"
    lines.append(
      f'<tr class="{"failed" if check.failed else "passed"}"><td class=wide>{as_html(check.name)}'
      f"<td>{verdict}<td>{check.tested:,}<td>{check.failed:,}<td class=wide>{places}{more}"
    )
  head = "<tr><th class=wide>what must hold<th>result<th>looked at<th>failed<th class=wide>where"
  return f"<div class=scroll><table>{head}{''.join(lines)}</table></div>"


def _legend(sources: Sequence[SourceFacts]) -> str:
  names = " ".join(
    f"<span class=name>{chip(number)}{as_html(source.name)}</span>"
    for number, source in enumerate(sources)
  )
  return (
    f"<p>{names}</p><p class=note>The bar: positions of the row, by segment (its number on top), "
    "in full colour where the ids are a picture's (its slot inside), striped where padding. Below: "
    "black where trained on, red where that must not be; then <code>positions</code>, which climb "
    "from 0 in each segment. A click on a segment goes to its text. In the texts, "
    "<span class=off>grey</span> is not trained on, <span class=id>&lt;s&gt;</span> is a special "
    "id, and a picture is shown where its <code>&lt;image&gt;</code> ids are.</p>"
  )
