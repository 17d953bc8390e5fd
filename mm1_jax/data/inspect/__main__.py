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

import re

from absl import app, flags, logging
from etils import epath

from mm1_jax import cli
from mm1_jax.config import ConfigError, RunConfig, SourceConfig
from mm1_jax.data.inspect import Drawing, draw_source, draw_stream
from mm1_jax.data.sources import DataError

_CONFIG = cli.define_config()
_OUTPUT = flags.DEFINE_string("output", "runs/inspect", "Folder to write to, also gs://.")
_BATCHES = flags.DEFINE_integer("batches", 4, "Global batches to read.")
_STEPS = flags.DEFINE_string("steps", "0", "First batch, or first and last: A:B is A to B - 1.")
_ROWS = flags.DEFINE_integer("rows", 8, "Rows to read of each batch; the page draws the first 24.")
_SOURCE = flags.DEFINE_string("source", None, "Draw records of this source instead.")
_PATH = flags.DEFINE_string("path", None, "Draw records of these ArrayRecord shards instead.")
_RECORDS = flags.DEFINE_integer("records", 24, "Records to draw of a source.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the records that are drawn.")


def main(argv: list[str]) -> None:
  cli.refuse_arguments(argv)
  if _SOURCE.value and _PATH.value:
    raise ConfigError("--source and --path are two ways to name records; give one of them.")
  drawing = _draw(cli.load_config(_CONFIG))
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


def _draw(run: RunConfig) -> Drawing:
  source = SourceConfig(_name(_PATH.value), _PATH.value) if _PATH.value else _SOURCE.value
  if source:
    return draw_source(run, _OUTPUT.value, source, num_records=_RECORDS.value, seed=_SEED.value)
  first, num = _parse_steps(_STEPS.value, _BATCHES.value)
  return draw_stream(run, _OUTPUT.value, first_step=first, num_batches=num, num_rows=_ROWS.value)


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
  cli.run(app.run, main, flags_parser=cli.parse)
