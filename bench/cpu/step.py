# SPDX-License-Identifier: Apache-2.0
"""A train step of mm1_debug on a CPU beside PyTorch's: `python -m bench.cpu.step --peer=PYTHON`.

  python -m bench.cpu.step --kind=moe --peer=/path/to/an/environment/with/torch/bin/python

Both take whole steps by turns, on the same rows of the shipped sample, in float32, with the same
number of threads; see bench/peer/torch_peer.py for what the peer is. `--peer` names an interpreter
that has torch, transformers and numpy; it reads `bench` from this folder.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from bench.peer.ours import save_work
from bench.peer.workers import Worker, by_turns
from mm1_jax.chips import PEAK_FLOPS
from mm1_jax.config import RunConfig
from mm1_jax.configs import mm1_debug
from mm1_jax.models.flops import model_flops
from mm1_jax.sharding import make_mesh
from mm1_jax.train.feed import training_batches


def measure(workers: dict[str, Worker], turns: int) -> dict[str, dict[str, Any]]:
  """Lets the workers take steps by turns, and returns what each did, and their facts."""
  for worker in workers.values():
    worker.ask(do="steps", num=2)  # compiles
  seconds = by_turns(workers, turns, do="steps", num=3)
  return {
    name: {
      "seconds": statistics.median(seconds[name]),
      "fastest": min(seconds[name]),
      "loss": worker.ask(do="steps", num=1)["loss"],
      **worker.ask(do="facts"),
    }
    for name, worker in workers.items()
  }


def print_rows(results: dict[str, dict[str, Any]], run: RunConfig, images: int) -> None:
  tokens = run.data.batch_size * run.data.seq_len
  for name, facts in results.items():
    seconds = facts["seconds"]
    print(
      f"| {name} | {facts['params'] / 1e6:.2f}M | {1e3 * seconds:.0f} | "
      f"{1e3 * facts['fastest']:.0f} | {tokens / seconds:,.0f} | {images / seconds:,.0f} | "
      f"{facts['peak_gib']:.2f} | {facts['loss']:.2f} | {facts['version']} |",
      flush=True,
    )


def compare(results: dict[str, dict[str, Any]], run: RunConfig, images: int) -> None:
  """Prints how much faster ours is, which is the first, and its share of the device's peak."""
  ours, *peers = results
  seconds, device = results[ours]["seconds"], results[ours]["device"]
  for peer in peers:
    print(f"{ours} is {results[peer]['seconds'] / seconds:.2f} times as fast as {peer}")
  if peak := PEAK_FLOPS.get(device):
    flops = model_flops(run, images)["total"]
    print(f"{ours} on one {device}: {flops / seconds / peak:.1%} MFU")


def beside(
  run: RunConfig, python: str, peer: Sequence[str], turns: int, *, together: bool = True
) -> None:
  """Takes the steps of a run beside the peer's: the interpreter `python`, with arguments `peer`.

  By turns, so that what else the machine does slows both; or, if not `together`, one after the
  other, so that each has the whole of a GPU's memory.
  """
  mesh = make_mesh(run)
  with contextlib.closing(training_batches(run, None, mesh)) as batches:
    batch, stats = next(batches)
  threads = len(os.sched_getaffinity(0))
  print(
    f"{run.name}, {batch.tokens.shape} positions, {stats.num_images} pictures in "
    f"{batch.image_mask.size} slots, {run.model.dtype}, {threads} threads"
  )
  print("| | params | ms a step | fastest | tokens/s | images/s | peak GiB | loss | with |")
  print("|---|---|---|---|---|---|---|---|---|", flush=True)
  results = {}
  with tempfile.TemporaryDirectory() as folder:
    save_work(folder, run, batch)
    start = {
      "mm1_jax": lambda: Worker("bench.peer.ours", folder),
      "torch": lambda: Worker(
        "bench.peer.torch_peer", folder, *peer, python=python, threads=threads
      ),
    }
    for names in [list(start)] if together else [[name] for name in start]:
      workers = {name: start[name]() for name in names}
      results |= (measured := measure(workers, turns))
      print_rows(measured, run, int(stats.num_images))
      for worker in workers.values():
        worker.close()
  compare(results, run, int(stats.num_images))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--kind", choices=("dense", "moe"), default="dense")
  parser.add_argument("--peer", default=sys.executable, help="python with torch and transformers")
  parser.add_argument("--turns", type=int, default=5, help="of three steps each")
  args = parser.parse_args()
  run = RunConfig.from_dict(mm1_debug.get_config(args.kind).to_dict())
  beside(run, args.peer, [], args.turns)


if __name__ == "__main__":
  main()
