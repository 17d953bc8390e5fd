# SPDX-License-Identifier: Apache-2.0
r"""Draws what is trained on, to look at before a run and when one goes wrong.

The packed stream as a page, a picture and figures, with a list of checks:

  python -m mm1_jax.data.inspect --config=configs/mm1_debug.py --output=runs/inspect
  python -m mm1_jax.data.inspect --config=configs/mm1_debug.py --steps=100:102 --rows=16

Records of one source, drawn at random:

  python -m mm1_jax.data.inspect --config=configs/mm1_debug.py --source=captions
  python -m mm1_jax.data.inspect --config=configs/mm1_debug.py --source=eval_sources.captions
  python -m mm1_jax.data.inspect --config=configs/mm1_debug.py --path='data/web-*.arrayrecord'

Any value of the config can be overridden, such as `--config.data.seq_len=512`. The exit code is 1
if a check fails. No accelerator is needed.
"""

import argparse
import re
from typing import TYPE_CHECKING

from absl import logging
from etils import epath

from mm1_jax import cli
from mm1_jax.config import ConfigError, RunConfig, SourceConfig

if TYPE_CHECKING:
  from mm1_jax.data.inspect.draw import Drawing


def main(argv: list[str] | None = None) -> None:
  args = _parse(argv)
  if args.source and args.path:
    raise ConfigError("--source and --path are two ways to name records; give one of them.")
  # Only now: --help needs nothing of it, and importing it takes a second.
  from mm1_jax.data.sources import DataError

  drawing = _draw(cli.load_config(args), args)
  logging.info("wrote %s, %s and %s", drawing.page, drawing.picture, drawing.figures)
  for check in drawing.facts.get("checks", ()):
    verdict = "FAIL" if check["failed"] else "pass"
    logging.info(
      "%s  %s: %d of %d failed", verdict, check["name"], check["failed"], check["tested"]
    )
    for place in check["places"]:
      logging.info("      %s", place)
  if drawing.failed:
    raise DataError(f"{len(drawing.failed)} checks failed: look at {drawing.page}.")


def _parse(argv: list[str] | None) -> argparse.Namespace:
  parser = cli.make_parser("mm1_jax.data.inspect", __doc__)
  parser.add_config()
  add = parser.add_argument
  add("--output", default="runs/inspect", metavar="FOLDER", help="also gs:// (runs/inspect)")
  add("--batches", type=int, default=4, metavar="N", help="global batches to read (4)")
  add("--steps", default="0", metavar="A:B", help="first batch, or A to B - 1 (0)")
  add("--rows", type=int, default=8, metavar="N", help="to read of each batch; 24 are drawn (8)")
  add("--source", metavar="NAME", help="draw records of this source instead")
  add("--path", metavar="GLOB", help="draw records of these ArrayRecord shards instead")
  add("--records", type=int, default=24, metavar="N", help="to draw of a source (24)")
  add("--seed", type=int, default=0, metavar="N", help="of the records that are drawn (0)")
  return parser.parse_args(argv)


def _draw(run: RunConfig, args: argparse.Namespace) -> "Drawing":
  from mm1_jax.data.inspect import draw_source, draw_stream

  source = SourceConfig(_name(args.path), args.path) if args.path else args.source
  if source:
    return draw_source(run, args.output, source, num_records=args.records, seed=args.seed)
  first, num = _parse_steps(args.steps, args.batches)
  return draw_stream(run, args.output, first_step=first, num_batches=num, num_rows=args.rows)


def _name(path: str) -> str:
  """Returns what to call the shards of a glob: web-train of data/web-train-*.arrayrecord."""
  fixed = re.split(r"[*?\[]", epath.Path(path).stem)[0]
  return re.sub(r"\W+", "-", fixed).strip("-") or "records"


def _parse_steps(steps: str, num_batches: int) -> tuple[int, int]:
  """Returns the first step and the number of steps."""
  match = re.fullmatch(r"(\d+)(?::(\d+))?", steps)
  if not match:
    raise ConfigError(f"--steps={steps} must be a step, such as 100, or a range, such as 100:104.")
  first = int(match[1])
  num = int(match[2]) - first if match[2] else num_batches
  if num < 1:
    raise ConfigError(f"--steps={steps} --batches={num_batches} holds no step.")
  return first, num


if __name__ == "__main__":
  cli.run(main)
