# SPDX-License-Identifier: Apache-2.0
"""The model card of an export: what the model is, how it was made, what it was measured at.

Everything in it is read from the run. What is not in the run is said to be unknown.
"""

import collections
import itertools
from collections.abc import Iterator

from mm1_jax.config import RunConfig, SourceConfig
from mm1_jax.convert.export.format import ExportOptions
from mm1_jax.convert.export.run_reader import RunReader
from mm1_jax.data.sources import DataError, RecordError
from mm1_jax.data.sources import Source as Records
from mm1_jax.metrics import read_metrics

NAME = "README.md"
LOOKED_AT = 2000  # records of each source that are asked for their licence


def text(reader: RunReader, options: ExportOptions, use: str) -> str:
  """Returns the card, in Markdown; `use` says how the files are used."""
  run = reader.run
  sections = {
    "Use": use,
    "Model": _model(reader),
    "Training": _training(reader),
    "Data": _data(run),
    "Evaluation": _evaluation(reader),
    "Licences": _licences(run),
  }
  head = (
    "---\npipeline_tag: image-text-to-text\ntags:\n- mm1\n- vision-language\n---\n\n"
    f"# {run.name}\n\nStep {reader.step}, {reader.num_params:,} parameters, {options.dtype}. "
    "Trained with mm1_jax, after the recipe of MM1 (arXiv 2403.09611). `manifest.json` has the "
    "hash of every file.\n"
  )
  return head + "".join(f"\n## {title}\n\n{body.rstrip()}\n" for title, body in sections.items())


def _model(reader: RunReader) -> str:
  vision, decoder = reader.run.model.vision, reader.run.model.decoder
  connector, moe = reader.run.model.connector, reader.run.model.decoder.moe
  experts = (
    f"; {moe.num_experts} experts in every {moe.every}. layer, {moe.top_k} active" if moe else ""
  )
  tiling = reader.run.data.tiling
  pictures = "whole" if tiling is None else f"cut into up to {tiling.max_slots} sub-images"
  return (
    f"- Encoder: ViT, {vision.num_blocks} blocks of width {vision.width}, patches of "
    f"{vision.patch_size} in {vision.image_size[0]} x {vision.image_size[1]} pixels.\n"
    f"- Connector: {connector.kind}, {connector.num_tokens} tokens a picture; pictures are "
    f"{pictures}.\n"
    f"- Decoder: {decoder.depth} layers of width {decoder.width}, {decoder.num_heads} heads, "
    f"{decoder.num_kv_heads} of keys and values{experts}; {decoder.vocab_size} ids, "
    f"{reader.run.data.seq_len} positions.\n"
  )


def _training(reader: RunReader) -> str:
  run = reader.run
  started = "from another run's or other models' params" if run.train.init_from else "from scratch"
  frozen = ", ".join(run.optimizer.frozen) or "nothing"
  return (
    f"{reader.step} of {run.train.num_steps} steps of {run.data.batch_size} rows of "
    f"{run.data.seq_len} positions, {run.optimizer.name}, {started}; frozen: {frozen}.\n"
  )


def _data(run: RunConfig) -> str:
  if not run.data.leaves:
    return "The run has no sources: its params were imported.\n"
  rows = "".join(f"| {leaf.name} | {leaf.weight:.1%} |\n" for leaf in run.data.leaves)
  return "Shares of positions, at the start.\n\n| source | share |\n|---|---|\n" + rows


def _evaluation(reader: RunReader) -> str:
  series = {
    name: values
    for name, values in read_metrics(reader.workdir).items()
    if name.startswith("eval/") and any(step <= reader.step for step in values)
  }
  if not series:
    return "The run has no held-out figures.\n"
  rows = ""
  for name, values in sorted(series.items()):
    step = max(step for step in values if step <= reader.step)
    rows += f"| {name.removeprefix('eval/')} | {values[step]:.4g} | {step} |\n"
  return "Held out from training.\n\n| figure | value | step |\n|---|---|---|\n" + rows


def _licences(run: RunConfig) -> str:
  unknown, counts = [], collections.Counter()
  for leaf in run.data.leaves:
    try:
      counts.update((leaf.name, record) for record in _licences_of(leaf))
    except (DataError, RecordError):
      unknown.append(leaf.name)
  parts = []
  if counts:
    rows = "".join(
      f"| {name} | {licence or '-'} | {n} |\n" for (name, licence), n in sorted(counts.items())
    )
    parts.append(
      f"As up to {LOOKED_AT} records of each source say, spread over it.\n\n"
      f"| source | licence | records |\n|---|---|---|\n{rows}"
    )
  if unknown or not counts:
    names = ", ".join(unknown) or "all data"
    parts.append(f"Not known when this was exported, for the records were not there: {names}.\n")
  parts.append(
    "The files of code are Apache-2.0. The weights' licence is for who publishes them.\n"
  )
  return "\n".join(parts)


def _licences_of(leaf: SourceConfig) -> Iterator[str]:
  records = Records(leaf)
  stride = max(1, len(records) // LOOKED_AT)
  for i in itertools.islice(range(0, len(records), stride), LOOKED_AT):
    yield records[i].get("license", "")
