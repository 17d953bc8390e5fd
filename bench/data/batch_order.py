# SPDX-License-Identifier: Apache-2.0
"""Are the batches the same, however a run is spread and whenever it stops? A table of hashes.

  python -m bench.data.batch_order --steps=200

Each line is a way to get the global batches 0 to `--steps`; its hash is over every field of every
row, pixels included. Processes are real ones, each with a slice of the rows; a restart begins in
new processes, with nothing but the saved state. Last it prints how long the first batch takes from
states far into a run.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from mm1_jax import cli
from mm1_jax.config import DataConfig, InputSpec, RunConfig
from mm1_jax.configs import common
from mm1_jax.data.pipeline import make_pipeline

INPUTS = InputSpec(image_size=(32, 32), tokens_per_image=16, image_token_id=4)


class Leg(NamedTuple):
  """A stretch of a run without interruption, up to batch `stop`."""

  stop: int
  processes: int
  workers: int


class Slice(NamedTuple):
  """The batches of one process of a leg."""

  hashes: list[list[str]]  # of its rows, batch by batch
  state: dict[str, Any]  # at the end


def small_data() -> DataConfig:
  """Returns the sample at 45:45:10, in rows that are quickly made."""
  config = common.pretrain("order", data=str(common.SAMPLE))
  config.data.update(seq_len=256, batch_size=8, images_per_row=3, window_rows=64)
  config.model.connector.token_grid = (4, 4)
  return RunConfig.from_dict(config.to_dict()).data


def ways(steps: int, stops: Sequence[int]) -> dict[str, list[Leg]]:
  """Returns ways to make the batches before `steps`; some stop at `stops` and begin anew."""
  first, second = stops
  return {
    "1 process": [Leg(steps, 1, 0)],
    "1 process, 4 workers": [Leg(steps, 1, 4)],
    "2 processes": [Leg(steps, 2, 0)],
    "4 processes": [Leg(steps, 4, 0)],
    "2 processes, 4 workers each": [Leg(steps, 2, 4)],
    f"stop at {first} and {second}": [Leg(first, 1, 0), Leg(second, 1, 0), Leg(steps, 1, 0)],
    f"4 processes, 2 from {first}, 1 from {second}": [
      *(Leg(first, 4, 0), Leg(second, 2, 0), Leg(steps, 1, 0))
    ],
    f"1 with 4 workers, 4 from {first}, 2 from {second}": [
      *(Leg(first, 1, 4), Leg(second, 4, 0), Leg(steps, 2, 0))
    ],
  }


def run(data: DataConfig, legs: Sequence[Leg]) -> list[str]:
  """Returns the hashes of the global batches that the legs make one after another."""
  hashes: list[str] = []
  state = None
  for leg in legs:
    num_batches = leg.stop - len(hashes)
    config = dataclasses.replace(data, num_workers=leg.workers)
    jobs = [(config, state, num_batches, i, leg.processes) for i in range(leg.processes)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(leg.processes, mp_context=context) as pool:
      slices = [job.result() for job in [pool.submit(make_slice, *job) for job in jobs]]
    state = slices[0].state
    if any(part.state != state for part in slices):
      raise AssertionError("processes of one run disagree on its state")
    for rows in zip(*(part.hashes for part in slices), strict=True):
      hashes.append(_digest("".join(itertools.chain(*rows)).encode()))
  return hashes


def make_slice(
  data: DataConfig,
  state: dict[str, Any] | None,
  num_batches: int,
  process_index: int,
  process_count: int,
) -> Slice:
  """Makes one process's rows of so many batches; runs in a process of its own."""
  pipeline = make_pipeline(
    data, INPUTS, process_index=process_index, process_count=process_count, state=state
  )
  hashes = []
  for _ in range(num_batches):
    batch, _ = next(pipeline)
    rows = zip(*batch, strict=True)
    hashes.append([_digest(b"".join(field.tobytes() for field in row)) for row in rows])
  saved = json.loads(json.dumps(pipeline.state()))  # as a checkpoint has it
  pipeline.close()
  return Slice(hashes, saved)


def seconds_to_first_batch(data: DataConfig, step: int) -> float:
  """Returns how long the first batch takes from a state as it would be at `step`."""
  pipeline = make_pipeline(data, INPUTS)
  for _ in range(9):
    next(pipeline)
  state = pipeline.state()
  pipeline.close()
  plan, shares = state["plan"], data.shares(0)
  drawn = step * data.batch_size * data.seq_len
  lengths = [index.num_positions.mean() for index in pipeline.indexes.values()]
  plan["cursors"] = [int(drawn * s / n) for s, n in zip(shares, lengths, strict=True)]
  plan["placed"] = [int(drawn * share) for share in shares]
  plan["batch"], state["batch"] = step, step
  start = time.perf_counter()
  pipeline = make_pipeline(data, INPUTS, state=state)
  next(pipeline)
  seconds = time.perf_counter() - start
  pipeline.close()
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
  parser.add_argument("--steps", type=int, default=200, help="last batch to hash")
  args = parser.parse_args()
  data, start = small_data(), time.perf_counter()
  found: collections.Counter = collections.Counter()
  for name, legs in ways(args.steps + 1, (37, 113)).items():
    hashes = run(data, legs)
    whole = _digest("".join(hashes).encode())
    found[whole] += 1
    print(f"{name:48} {len(hashes)} batches  {whole[:16]}", flush=True)
  equal = "all equal" if len(found) == 1 else f"{len(found)} DIFFERENT ORDERS"
  print(f"{equal}, {time.perf_counter() - start:.0f} s")
  for step in (10, 1_000, 100_000):
    print(f"first batch at step {step:7}: {seconds_to_first_batch(data, step):.2f} s", flush=True)


def _digest(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
  cli.run(main)
