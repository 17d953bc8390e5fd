# SPDX-License-Identifier: Apache-2.0
"""Writes a page, a picture and the figures of the packed stream, or of records of one source."""

import dataclasses
import html
import io
import json
from typing import Any

import PIL.Image
from etils import epath

from mm1_jax.config import ConfigError, RunConfig, SourceConfig
from mm1_jax.data.inspect.page import stream_page
from mm1_jax.data.inspect.picture import draw_batch, stack
from mm1_jax.data.inspect.records import read_records
from mm1_jax.data.inspect.sample_page import draw_sample, sample_page
from mm1_jax.data.inspect.stream import read_stream

NUM_PICTURED = 4  # rows of the PNG


@dataclasses.dataclass(frozen=True)
class Drawing:
  """What was written."""

  page: epath.Path
  picture: epath.Path
  figures: epath.Path
  facts: dict[str, Any]  # what is in `figures`
  failed: list[str]  # checks

  def _repr_html_(self) -> str:
    """Returns the page in a frame of its own, for notebooks."""
    page = html.escape(self.page.read_text())
    return f'<iframe srcdoc="{page}" style="width:100%;height:900px;border:0"></iframe>'


def draw_stream(
  run: RunConfig,
  output: epath.PathLike,
  *,
  first_step: int = 0,
  num_batches: int = 4,
  num_rows: int = 8,
) -> Drawing:
  """Reads, checks and draws some steps of the packed stream: `stream.html`, `.png` and `.json`.

  Args:
    run: what is trained.
    output: folder to write to; made if missing.
    first_step: global batch to begin with. The windows before it are planned, which takes time.
    num_batches: how many.
    num_rows: rows read of each, or a few more: their number divides the batch.

  Raises:
    UserError: a setting, file or number that does not fit.
  """
  for name, value, least in (
    ("first_step", first_step, 0),
    ("num_batches", num_batches, 1),
    ("num_rows", num_rows, 1),
  ):
    if value < least:
      raise ConfigError(f"{name} is {value}; it must be at least {least}.")
  stream = read_stream(run, first_step=first_step, num_batches=num_batches, num_rows=num_rows)
  pixels = draw_batch(
    stack([drawn.row for drawn in stream.drawn[:NUM_PICTURED]]),
    stream.encoder,
    [source.name for source in stream.sources],
  )
  png = io.BytesIO()
  PIL.Image.fromarray(pixels).save(png, "PNG")
  return _write(
    output, "stream", stream_page(stream), png.getvalue(), stream.to_dict(), stream.failed
  )


def draw_source(
  run: RunConfig,
  output: epath.PathLike,
  source: str | SourceConfig,
  *,
  num_records: int = 24,
  seed: int = 0,
) -> Drawing:
  """Draws records of one source, at random: `source-NAME.html`, `.png` and `.json`.

  Args:
    run: says how records are encoded, and what its sources are.
    output: folder to write to; made if missing.
    source: a name in `data.sources`, `eval_sources.NAME` for a held-out one, or any source.
    num_records: how many.
    seed: of the draw.

  Raises:
    UserError: a name, file or number that does not fit.
  """
  if num_records < 1:
    raise ConfigError(f"num_records is {num_records}; it must be at least 1.")
  config = find_source(run, source) if isinstance(source, str) else source
  name = source if isinstance(source, str) else source.name
  sample = read_records(run, config, num_records=num_records, seed=seed)
  stem = f"source-{name.replace('/', '-')}"
  return _write(output, stem, sample_page(sample), draw_sample(sample), sample.to_dict(), [])


def find_source(run: RunConfig, name: str) -> SourceConfig:
  """Returns a source or held-out source by its name.

  Raises:
    ConfigError: there is none; the message lists them.
  """
  known = {source.name: source for source in run.data.leaves}
  known |= {f"eval_sources.{source.name}": source for source in run.data.eval_sources}
  if name not in known:
    raise ConfigError(f"no source '{name}'; the config has {', '.join(known) or 'none'}.")
  return known[name]


def _write(
  output: epath.PathLike, stem: str, page: str, png: bytes, facts: dict[str, Any], failed: list[str]
) -> Drawing:
  folder = epath.Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  page_path, png_path, json_path = (folder / f"{stem}.{kind}" for kind in ("html", "png", "json"))
  drawing = Drawing(page_path, png_path, json_path, facts, failed)
  drawing.page.write_text(page)
  drawing.picture.write_bytes(png)
  drawing.figures.write_text(json.dumps(facts, indent=2) + "\n")
  return drawing
