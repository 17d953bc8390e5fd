# SPDX-License-Identifier: Apache-2.0
"""The pipeline: an iterator of host-local batches that can be stopped and resumed exactly.

`make_pipeline` is for training: endless, mixed, shuffled. `make_eval_batches` is for evaluation:
one held-out source, each of its examples once.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import weakref
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import grain
from absl import flags, logging

from mm1_jax.batch import Batch
from mm1_jax.config import ConfigError, DataConfig, InputSpec, SourceConfig, UserError
from mm1_jax.data.drops import Drops
from mm1_jax.data.examples import Encoder, make_encoder
from mm1_jax.data.index import Index, load_index
from mm1_jax.data.loader import LoadedRow, RowLoader
from mm1_jax.data.mixing import Mixer, WindowState, check_fingerprint, fingerprint, plan_once
from mm1_jax.data.packing import stack
from mm1_jax.data.planned import PlannedBatches, PlannedRow, PlannedRows
from mm1_jax.data.sources import DataError, Source, sample_hashes
from mm1_jax.data.tokenizer import Tokenizer

# Where slots are this many times the images of a full row, all rows find room for theirs.
SLOTS_TO_SPARE = 1.05
# Threads that make rows in each process. Reading and decoding release Python's lock, but the code
# around them does not: to use more than a few cores, use worker processes.
NUM_THREADS = 2

# Smaller arrays come from a worker through a pipe: each shared one is a file to open and remove.
MIN_SHARED_BYTES = 1 << 20
KILLED = "terminated unexpectedly"  # in Grain's error for a worker that has ended


class BatchStats(NamedTuple):
  """How full a host's rows are, and what they lost."""

  padded_fraction: float  # of positions
  empty_slot_fraction: float  # of image slots; 0 where rows have none
  num_positions: int  # that are not padding
  num_images: int
  num_examples: int
  drops: dict[str, int]  # examples left out of their rows, by reason


class PipelineError(RuntimeError):
  """Making a batch failed for another reason than the data or the config."""


class WorkerKilled(UserError):
  """A data worker has ended, such as by the system where memory is short."""


class Pipeline:
  """Yields `(Batch, BatchStats)` of this process's rows, without end.

  Attributes:
    tokenizer: the one that the data is tokenised with.
    indexes: by source name, the lengths of all its examples.
  """

  def __init__(
    self,
    loaded: grain.DatasetIterator[LoadedRow],
    *,
    num_rows: int,
    tokenizer: Tokenizer,
    indexes: dict[str, Index],
    lengths: Sequence[float],
    state: dict[str, Any],
    max_drop_fraction: float,
  ):
    self.tokenizer = tokenizer
    self.indexes = indexes
    self._drops = Drops(max_drop_fraction)
    self._loaded = [loaded]
    self._num_rows = num_rows
    self._lengths = lengths
    self._state = state
    self._error: Exception | None = None
    # Also at exit: Grain's threads and workers do not survive the interpreter's own clean-up. This
    # clears the list, so that the iterator is not closed a second time.
    self._finalizer = weakref.finalize(self, _close, self._loaded)

  @property
  def drops(self) -> collections.Counter:
    """Examples lost so far, by reason; `indexes` have those that never had a row."""
    return self._drops.reasons

  def close(self) -> None:
    """Stops the threads and workers; there is no next batch."""
    self._finalizer()

  def __iter__(self) -> "Pipeline":
    return self

  def __next__(self) -> tuple[Batch, BatchStats]:
    """Returns the next batch.

    Raises:
      DataError: too many examples were dropped; again on every later call.
      WorkerKilled: a worker was killed; again on every later call.
      PipelineError: a worker failed; again on every later call.
    """
    if self._error:
      raise self._error
    if not self._loaded:
      raise PipelineError("the pipeline is closed; make_pipeline continues from its state().")
    try:
      rows = [next(self._loaded[0]) for _ in range(self._num_rows)]
      batch, stats = _join(rows)
      self._drops.note(stats.drops)
      self._drops.count(stats.num_examples, sum(stats.drops.values()))
    except DataError as e:
      self._error = e
      raise
    except Exception as e:
      # After its first error Grain's worker pool only says that the data has ended.
      self._error = _failed(self._state["batch"], e)
      raise self._error from e
    before, self._state = (
      self._state,
      {
        **self._state,
        "batch": self._state["batch"] + 1,
        "plan": json.loads(rows[-1].next_window),
      },
    )
    self._tell_used_up(before["plan"]["cursors"])
    return batch, stats

  def state(self) -> dict[str, Any]:
    """Returns what `make_pipeline` needs to continue with the next batch, as plain JSON.

    It is the same on every process, and for any number of processes and workers.
    """
    return self._state

  def _tell_used_up(self, before: Sequence[int]) -> None:
    """Logs which sources gave their last example in the window that ends here."""
    cursors = self._state["plan"]["cursors"]
    for name, a, b, length in zip(self.indexes, before, cursors, self._lengths, strict=True):
      if a < length <= b:
        logging.info(
          "source '%s' is used up at step %d; the others keep their proportions",
          *(name, self._state["batch"]),
        )


def _failed(batch: int, error: Exception) -> Exception:
  if KILLED not in str(error):
    return PipelineError(f"making batch {batch} failed: {type(error).__name__}: {error}")
  return WorkerKilled(
    f"a data worker was killed while batch {batch} was made ({str(error).split('. ')[0]}). Where "
    "memory is short, the system does that: lower data.num_workers or data.prefetch_batches. Run "
    "again to continue."
  )


def _join(rows: Sequence[LoadedRow]) -> tuple[Batch, BatchStats]:
  """Returns rows as a batch, copied out of the workers' shared memory."""
  batch = stack([row.batch for row in rows])
  drops: collections.Counter = collections.Counter()
  for row in rows:
    drops.update(json.loads(row.drops))
  num_positions, num_images = int((batch.segment_ids > 0).sum()), int(batch.image_mask.sum())
  stats = BatchStats(
    padded_fraction=1 - num_positions / batch.tokens.size,
    empty_slot_fraction=1 - num_images / batch.image_mask.size if batch.image_mask.size else 0.0,
    num_positions=num_positions,
    num_images=num_images,
    num_examples=int(batch.segment_ids.max(axis=1).sum()),
    drops=dict(drops),
  )
  return batch, stats


def _close(iterators: list[grain.DatasetIterator]) -> None:
  while iterators:
    iterators.pop().close()


def make_pipeline(
  data: DataConfig,
  spec: InputSpec,
  *,
  process_index: int = 0,
  process_count: int = 1,
  state: dict[str, Any] | None = None,
) -> Pipeline:
  """Returns the training batches, from the first or from where `state` was taken.

  Global batch n is a function of `data` and n. Each process gets its contiguous slice of the rows.

  Args:
    data: sources and row shape.
    spec: the model's inputs; its `<image>` id is checked against the tokenizer's.
    process_index: of this process.
    process_count: processes that share the global batch.
    state: what `Pipeline.state()` returned, on any number of processes.

  Raises:
    ConfigError: settings that do not fit each other, the tokenizer or `state`.
    DataError: files that are missing, damaged or empty.
  """
  if not data.sources:
    raise ConfigError("data.sources is empty; name at least one source to train on.")
  rows = _local_rows(data, process_index, process_count)
  encoder = _encoder(data, spec)
  sources = [Source(config) for config in data.leaves]
  indexes = [_index(source, encoder, data, process_index) for source in sources]
  mixer = Mixer(data, indexes, len(encoder.image_ids))
  if process_index == 0:
    _log_slots(data, mixer)
  hashes = [sample_hashes(source.paths) for source in sources]
  now = fingerprint(data, len(encoder.image_ids), indexes, hashes)
  if state is None:
    state = {"batch": 0, "plan": mixer.first_state.to_dict(), "fingerprint": now}
  paths = {source.name: source.paths for source in sources}
  check_fingerprint(state["fingerprint"], now, state["plan"].get("batch", 0), paths)
  planned = PlannedBatches(mixer, WindowState.from_dict(state["plan"]), state["batch"], rows)
  load = RowLoader(data, sources, indexes, encoder, spec.image_size, len(rows))
  ahead = math.ceil(data.prefetch_batches * len(rows) / max(1, data.num_workers))
  loaded = grain.MapDataset.source(PlannedRows(planned, len(rows))).map(load)
  loaded = loaded.to_iter_dataset(grain.ReadOptions(NUM_THREADS, max(NUM_THREADS, ahead)))
  if data.num_workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain's worker pool reads flags, also outside of app.run
    sharing = grain.experimental.DatasetOptions(min_shm_size=MIN_SHARED_BYTES)
    loaded = grain.experimental.WithOptionsIterDataset(loaded, sharing)
    options = grain.MultiprocessingOptions(num_workers=data.num_workers)
    loaded = loaded.mp_prefetch(options, worker_init_fn=_begin_worker)
  return Pipeline(
    iter(loaded),
    num_rows=len(rows),
    tokenizer=encoder.tokenizer,
    indexes={config.name: index for config, index in zip(data.leaves, indexes, strict=True)},
    lengths=[order.length for order in mixer.orders],
    state=state,
    # Each of several processes counts a part; `train.loop` adds them up.
    max_drop_fraction=data.max_drop_fraction if process_count == 1 else 1.0,
  )


def _log_slots(data: DataConfig, mixer: Mixer) -> None:
  """Says how full the image slots will be, and how many would suit the data."""
  for step in (0, *(change.step for change in data.reweight)):
    images = mixer.expected_images(step)
    if not images or data.packing != "joint":
      continue  # rows of a single source need as many slots as that source, not the mixture
    enough = min(math.ceil(SLOTS_TO_SPARE * images), data.seq_len // mixer.image_positions)
    if data.images_per_row < images:
      used = f"too few: rows will be about {data.images_per_row / images:.0%} full"
    else:
      used = f"about {images / data.images_per_row:.0%} of them will be used"
    logging.info(
      "from step %d on, %.1f images come with a full row; data.images_per_row %d: %s%s",
      *(step, images, data.images_per_row, used),
      "" if data.images_per_row == enough else f"; {enough} would suit, {images / enough:.0%} used",
    )


def _begin_worker(_worker: int, _num_workers: int) -> None:
  """Leaves signals to the training process, whose group a terminal or Slurm sends them to.

  And ends with that process: after its kill -9 a worker would wait for ever for room in a queue.
  """
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None
  multiprocessing.connection.wait([parent.sentinel])
  os._exit(1)


def make_eval_batches(
  source: SourceConfig,
  data: DataConfig,
  spec: InputSpec,
  *,
  process_index: int = 0,
  process_count: int = 1,
  limit: int | None = None,
) -> Generator[Batch]:
  """Yields each example of a held-out source once, in `data`'s row shape and batch size.

  The last batch is filled up with empty rows. The rows are the same for any number of processes,
  and `source_ids` are all 0.

  Args:
    source: what to evaluate on.
    data: row shape, batch size and tokenizer; its own sources are not looked at.
    spec: as in `make_pipeline`, like `process_index` and `process_count`.
    process_index: see there.
    process_count: see there.
    limit: batches to stop after.

  Raises:
    ConfigError: settings that do not fit each other or the tokenizer.
    DataError: files that are missing, damaged or empty.
  """
  local = _local_rows(data, process_index, process_count)
  encoder = _encoder(data, spec)
  opened = Source(source)
  index = _index(opened, encoder, data, process_index)
  rows = plan_once(index, data, len(encoder.image_ids))
  rows += [[]] * (-len(rows) % data.batch_size)
  starts = range(0, len(rows), data.batch_size)[:limit]
  planned = [
    PlannedRow(rows[start + r], None, (start, i)) for start in starts for i, r in enumerate(local)
  ]
  here = dataclasses.replace(data, num_workers=0)
  load = RowLoader(here, [opened], [index], encoder, spec.image_size, len(local))
  loaded = grain.MapDataset.source(planned).map(load)
  options = grain.ReadOptions(NUM_THREADS, max(NUM_THREADS, len(local)))
  return _eval_batches(loaded.to_iter_dataset(options), len(local), source.name)


def _eval_batches(loaded: grain.IterDataset, num_rows: int, name: str) -> Generator[Batch]:
  drops: collections.Counter = collections.Counter()
  with contextlib.closing(iter(loaded)) as iterator:
    while rows := list(itertools.islice(iterator, num_rows)):
      batch, stats = _join(rows)
      drops.update(stats.drops)
      yield batch
  if drops:
    logging.warning("evaluation source '%s' lost examples: %s", name, dict(drops))


def _encoder(data: DataConfig, spec: InputSpec) -> Encoder:
  tokenizer = Tokenizer(data.tokenizer)
  if tokenizer.image_id != spec.image_token_id:
    raise ConfigError(
      f"model.image_token_id is {spec.image_token_id}, but data.tokenizer '{data.tokenizer}' has "
      f"<image> at {tokenizer.image_id}; set it to that."
    )
  encoder = make_encoder(data, tokenizer, spec)
  if data.images_per_row and len(encoder.image_ids) > data.seq_len:
    raise ConfigError(
      f"data.seq_len {data.seq_len} cannot hold one image of {len(encoder.image_ids)} positions."
    )
  return encoder


def _index(source: Source, encoder: Encoder, data: DataConfig, process_index: int) -> Index:
  return load_index(
    source,
    encoder,
    seq_len=data.seq_len,
    max_images=data.images_per_row,
    max_drop_fraction=data.max_drop_fraction,
    process_index=process_index,
  )


def _local_rows(data: DataConfig, process_index: int, process_count: int) -> range:
  """Returns the rows of a global batch that are this process's."""
  if data.batch_size % process_count:
    raise ConfigError(
      f"data.batch_size {data.batch_size} does not divide over {process_count} processes; use a "
      f"multiple of {process_count}."
    )
  size = data.batch_size // process_count
  return range(process_index * size, (process_index + 1) * size)
