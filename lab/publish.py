# SPDX-License-Identifier: Apache-2.0
"""Makes the notes on the findings of a workdir's results.

  python -m lab.publish --workdir=runs/lab

Copies the results to lab/results/, draws docs/notes/findings/NAME.png, and writes
docs/notes/findings.md.
"""

import io
import json
import pathlib
import textwrap
from collections.abc import Mapping

import numpy as np
import PIL.Image

from lab import results
from lab.__main__ import load, names
from mm1_jax import cli

ROOT = pathlib.Path(__file__).parents[1]
KEPT = ROOT / "lab" / "results"
NOTES = ROOT / "docs" / "notes"
WIDTH = 118  # columns of prose
COLORS = 64  # of a picture in the repository
INTRO = """# Findings

What MM1 found, tried by [the lab](../guides/lab.md): models of about a million params in a small
world, on CPU cores. Each verdict follows a rule that was written before the runs. Errors are of
held-out items and of seeds together; charts show two standard errors, and each seed as a dot. Made
by `python -m lab.publish` from the files in `lab/results/`.
"""


def main() -> None:
  args = parse()
  collected = results.read(args.workdir / "results")
  KEPT.mkdir(exist_ok=True)
  (NOTES / "findings").mkdir(exist_ok=True)
  for name, of in collected.items():
    (KEPT / f"{name}.json").write_text(json.dumps(of, indent=1) + "\n")
    picture = reduced(results.draw(load(name).charts, of))
    (NOTES / "findings" / f"{name}.png").write_bytes(picture)
  (NOTES / "findings.md").write_text(page(results.read(KEPT)))


def parse():
  parser = cli.make_parser("lab.publish", __doc__)
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/lab"))
  return parser.parse_args()


def page(collected: Mapping[str, results.Results]) -> str:
  """Returns the notes: a table of all findings, then each with its picture and figures."""
  there = [name for name in names() if name in collected]
  lines = [INTRO, "| finding | verdict | seeds | CPU minutes |", "|---|---|---|---|"]
  for name in there:
    of = collected[name]
    link = f"[{of['title']}](#{name})"
    lines.append(f"| {link} | {of['verdict']} | {of['seeds']} | {minutes(of):.0f} |")
  if missing := [name for name in names() if name not in collected]:
    lines += ["", *wrapped(f"Not run yet: {', '.join(f'`{name}`' for name in missing)}.")]
  for name in there:
    lines += ["", *section(name, collected[name])]
  return "\n".join(lines) + "\n"


def section(name: str, of: results.Results) -> list[str]:
  return [
    f"## {of['title']} {{ #{name} }}",
    "",
    *wrapped(f"**{of['verdict'].capitalize()}.** {of['question']}"),
    "",
    *wrapped(f"- Here: {of['why']}."),
    *wrapped(f"- MM1: {of['paper']}"),
    *wrapped(f"- Rule: {of['rule']}"),
    *(wrapped(f"- Our guess: {remark}") if (remark := load(name).remark) else ()),
    "",
    f"![{of['title']}: {of['verdict']}](findings/{name}.png)",
    "",
    *results.table_lines(of),
  ]


def wrapped(text: str) -> list[str]:
  """Returns a paragraph, or an item of a list, as lines."""
  indent = "  " if text.startswith("- ") else ""
  return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def minutes(of: results.Results) -> float:
  """Returns the CPU minutes of a finding's own cells, starts that they share left out."""
  return sum(float(np.sum(cell["cpu_seconds"])) for cell in of["cells"].values()) / 60


def reduced(png: bytes) -> bytes:
  """Returns a PNG with few colours, a third as large."""
  out = io.BytesIO()
  PIL.Image.open(io.BytesIO(png)).convert("RGB").quantize(COLORS).save(out, "PNG", optimize=True)
  return out.getvalue()


if __name__ == "__main__":
  cli.run(main)
