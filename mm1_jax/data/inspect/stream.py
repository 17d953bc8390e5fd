# SPDX-License-Identifier: Apache-2.0
"""Reads the packed stream as training does, and compares it with the records it was made from.

The batches are those of `make_pipeline`. What should be in them is computed a second time: the plan
names the pieces of each row, and their records are read, encoded and decoded once more.
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from mm1_jax.batch import Batch
from mm1_jax.config import DataConfig, RunConfig
from mm1_jax.data.drops import MIN_EXAMPLES_TO_JUDGE
from mm1_jax.data.examples import Encoder, make_encoder
from mm1_jax.data.index import Index
from mm1_jax.data.inspect.compare import Origin, Records
from mm1_jax.data.inspect.facts import Checks, RowSegment, SourceFacts, row_of, segments_of
from mm1_jax.data.mixing import Mixer, Row
from mm1_jax.data.pipeline import Pipeline, make_pipeline
from mm1_jax.data.planned import PlannedBatches

MAX_DRAWN = 24  # rows kept for drawing
SECONDS_BETWEEN_NEWS = 5.0


@dataclasses.dataclass(frozen=True)
class DrawnRow:
  """A row to draw."""

  name: str
  row: Batch  # of one row, without its first axis
  segments: list[RowSegment]
  origins: list[Origin | None]  # of each segment


@dataclasses.dataclass
class Stream:
  """What was found in some steps of the stream."""

  run: RunConfig
  encoder: Encoder
  steps: range
  num_rows: int  # read of each batch
  sources: list[SourceFacts]
  checks: Checks
  planned_rows: int = 0
  planned_pictures: int = 0
  rows: int = 0
  filled: int = 0  # positions
  slots_used: int = 0
  segments_per_row: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  drawn: list[DrawnRow] = dataclasses.field(default_factory=list)

  @property
  def failed(self) -> list[str]:
    return [check.name for check in self.checks if check.failed]

  def to_dict(self) -> dict[str, Any]:
    """Returns the figures as plain JSON."""
    data = self.run.data
    planned = max(1, sum(source.planned for source in self.sources))
    planned_examples = sum(source.planned_examples for source in self.sources) or 1.0
    all_positions = self.rows * data.seq_len
    all_slots = self.rows * data.images_per_row
    return {
      "name": self.run.name,
      "steps": [self.steps.start, self.steps.stop],
      "rows_of_each_batch": [self.num_rows, data.batch_size],
      "rows": self.rows,
      "positions": {
        "all": all_positions,
        "filled": self.filled,
        "filled_fraction": self.filled / max(1, all_positions),
        "trained": sum(source.trained for source in self.sources),
      },
      "image_slots": {
        "all": all_slots,
        "used": self.slots_used,
        "used_fraction": self.slots_used / max(1, all_slots),
      },
      "planned": {
        "rows": self.planned_rows,
        "filled_fraction": planned / max(1, self.planned_rows * data.seq_len),
        "used_fraction": self.planned_pictures / max(1, self.planned_rows * data.images_per_row),
      },
      "segments_per_row": {str(n): self.segments_per_row[n] for n in sorted(self.segments_per_row)},
      "sources": {
        s.name: {
          "asked_fraction": s.asked,
          "planned_fraction": s.planned / planned,
          "asked_examples_fraction": s.asked_examples,
          "planned_examples_fraction": s.planned_examples / planned_examples,
          "positions_fraction": s.positions / max(1, self.filled),
          "positions": s.positions,
          "trained": s.trained,
          "pictures": s.pictures,
          "segments": len(s.lengths),
          "parts": s.parts,
          "lengths": _quantiles(s.lengths),
          "dropped": dict(s.drops),
          "left_out_of_index": dict(s.left_out),
        }
        for s in self.sources
      },
      "checks": [dataclasses.asdict(check) for check in self.checks],
    }


def _quantiles(values: Sequence[int]) -> dict[str, int]:
  if not values:
    return {}
  low, middle, high = np.quantile(values, [0, 0.5, 1], method="lower").tolist()
  return {"min": int(low), "median": int(middle), "max": int(high)}


def read_stream(run: RunConfig, *, first_step: int, num_batches: int, num_rows: int) -> Stream:
  """Reads the first rows of some global batches, and checks them.

  Args:
    run: what is trained. Workers are not used, and no share of dropped examples ends this.
    first_step: global batch to begin with; the windows before it are planned, not read.
    num_batches: how many.
    num_rows: at least so many rows of each, fewer if there are not as many.

  Raises:
    UserError: as `make_pipeline`.
  """
  data = dataclasses.replace(run.data, num_workers=0, max_drop_fraction=1.0)
  share = min(
    n
    for n in range(1, data.batch_size + 1)
    if data.batch_size % n == 0 and n >= min(num_rows, data.batch_size)
  )
  first = _pipeline(run, data, share, None)
  encoder = make_encoder(
    run.data,
    first.tokenizer,
    run.input_spec,
  )
  steps = range(first_step, first_step + num_batches)
  mixer = Mixer(data, list(first.indexes.values()), run.image_positions)
  sources = _source_facts(data, steps, mixer)
  planned = PlannedBatches(mixer, mixer.first_state, 0, range(data.batch_size))
  state = {**first.state(), **_seek(planned, first_step)}
  first.close()
  stream = Stream(
    run,
    encoder,
    steps,
    share,
    sources,
    Checks(encoder, len(sources)),
  )
  expected = Records(run, encoder, first.indexes)
  pipeline = _pipeline(run, data, share, state)
  for step in stream.steps:
    batch, stats = next(pipeline)
    rows, _ = planned[step]
    _add_plan(stream, rows, mixer.indexes)
    _add_batch(stream, expected, step, batch, rows[:share], stats.drops)
    logging.info("step %d: read %d of %d rows", step, share, data.batch_size)
  pipeline.close()
  _add_drop_limit(stream)
  return stream


def _pipeline(
  run: RunConfig, data: DataConfig, num_rows: int, state: dict[str, Any] | None
) -> Pipeline:
  """Returns the stream of the first `num_rows` rows: those of the first of several processes."""
  return make_pipeline(
    data,
    run.input_spec,
    process_count=data.batch_size // num_rows,
    state=state,
  )


def _seek(planned: PlannedBatches, step: int) -> dict[str, Any]:
  """Returns a pipeline's state before batch `step`; each window follows from the one before."""
  if not step:
    return {}
  told = time.monotonic()
  for before in range(step):
    _, state = planned[before]
    if time.monotonic() - told > SECONDS_BETWEEN_NEWS:
      told = time.monotonic()
      logging.info("planned up to step %d of %d", before, step)
  return {"batch": step, "plan": state.to_dict()}


def _source_facts(data: DataConfig, steps: range, mixer: Mixer) -> list[SourceFacts]:
  positions, examples = (
    np.mean([shares(step) for step in steps], axis=0).tolist()
    for shares in (mixer.shares, mixer.example_shares)
  )
  return [
    SourceFacts(source.name, *asked, left_out=index.drops)
    for source, index, *asked in zip(data.leaves, mixer.indexes, positions, examples, strict=True)
  ]


def _add_plan(stream: Stream, rows: Sequence[Row], indexes: Sequence[Index]) -> None:
  """Counts what all rows of a global batch should hold."""
  stream.planned_rows += len(rows)
  for source, example, start, stop in itertools.chain.from_iterable(rows):
    pictures = indexes[source].images(example)
    stream.sources[source].planned += stop - start
    stream.sources[source].planned_examples += (stop - start) / indexes[source].num_positions[
      example
    ]
    stream.planned_pictures += int(((pictures >= start) & (pictures < stop)).sum())


def _add_batch(
  stream: Stream,
  records: Records,
  step: int,
  batch: Batch,
  rows: Sequence[Row],
  counted: Mapping[str, int],
) -> None:
  """Counts and checks the rows of a batch that were read."""
  names = [f"step {step}, row {r}" for r in range(len(rows))]
  stream.checks.add_batch(batch, names)
  found: collections.Counter = collections.Counter()
  for r, pieces in enumerate(rows):
    row = row_of(batch, r)
    segments = segments_of(row, stream.encoder)
    origins, drops = records.compare(row, segments, pieces, names[r], stream.checks)
    for source, reason in drops:
      stream.sources[source].drops[reason] += 1
      found[f"{stream.sources[source].name}: {reason}"] += 1
    _add_row(stream, row, segments, origins)
    if len(stream.drawn) < MAX_DRAWN:
      stream.drawn.append(DrawnRow(names[r], row, segments, origins))
  same = found == collections.Counter(counted)
  stream.checks["what is missing from rows was counted as dropped"].add(
    max(1, found.total()),
    () if same else [(1, f"step {step}: {dict(found)} missing, {dict(counted)} counted")],
  )


def _add_row(
  stream: Stream, row: Batch, segments: Sequence[RowSegment], origins: Sequence[Origin | None]
) -> None:
  stream.rows += 1
  stream.filled += int((row.segment_ids != 0).sum())
  stream.slots_used += int(row.image_mask.sum())
  stream.segments_per_row[len(segments)] += 1
  for segment, origin in zip(segments, origins, strict=True):
    if 0 <= segment.source_id < len(stream.sources):
      facts = stream.sources[segment.source_id]
      facts.add(row, segment)
      facts.parts += origin is not None and not origin.whole


def _add_drop_limit(stream: Stream) -> None:
  limit = stream.run.data.max_drop_fraction
  dropped = sum(source.drops.total() for source in stream.sources)
  seen = dropped + sum(len(source.lengths) for source in stream.sources)
  check = stream.checks["no more examples are dropped than data.max_drop_fraction allows"]
  over = seen >= MIN_EXAMPLES_TO_JUDGE and dropped > limit * seen
  check.add(seen, [(dropped, f"{dropped} of {seen}, more than {limit:.1%}")] if over else ())
