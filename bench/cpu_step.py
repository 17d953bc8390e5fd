# SPDX-License-Identifier: Apache-2.0
"""A train step of mm1_debug on a CPU beside PyTorch's: `python -m bench.cpu_step --peer=PYTHON`.

  python -m bench.cpu_step --kind=moe --peer=/path/to/an/environment/with/torch/bin/python

Both take whole steps by turns, on the same rows of the shipped sample, in float32, with the same
number of threads; see bench/torch_peer.py for what the peer is. `--peer` names an interpreter that
has torch, transformers and numpy; it reads `bench` from this folder.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence

from bench.ours import save_work
from bench.workers import Worker, by_turns
from configs import mm1_debug
from mm1_jax.config import RunConfig
from mm1_jax.metrics import PEAK_FLOPS, model_flops
from mm1_jax.sharding import make_mesh
from mm1_jax.train.feed import training_batches


def report(workers: dict[str, Worker], turns: int, run: RunConfig, images: int) -> None:
  """Lets the workers take steps by turns, and prints what they did; ours is the first."""
  tokens = run.data.batch_size * run.data.seq_len
  for worker in workers.values():
    worker.ask(do="steps", num=2)  # compiles
  seconds = by_turns(workers, turns, do="steps", num=3)
  middle = {name: statistics.median(times) for name, times in seconds.items()}
  print("| | params | ms a step | fastest | tokens/s | images/s | peak GiB | loss | with |")
  print("|---|---|---|---|---|---|---|---|---|")
  devices = []
  for name, worker in workers.items():
    facts, loss = worker.ask(do="facts"), worker.ask(do="steps", num=1)["loss"]
    devices.append(facts.get("device"))
    print(
      f"| {name} | {facts['params'] / 1e6:.2f}M | {1e3 * middle[name]:.0f} | "
      f"{1e3 * min(seconds[name]):.0f} | {tokens / middle[name]:,.0f} | "
      f"{images / middle[name]:,.0f} | {facts['peak_gib']:.2f} | {loss:.2f} | {facts['version']} |"
    )
  ours, *peers = middle
  for peer in peers:
    print(f"{ours} is {middle[peer] / middle[ours]:.2f} times as fast as {peer}")
  if peak := PEAK_FLOPS.get(devices[0]):
    share = model_flops(run)["total"] / middle[ours] / peak
    print(f"{ours} on one {devices[0]}: {share:.1%} MFU")


def beside(run: RunConfig, python: str, peer: Sequence[str], turns: int) -> None:
  """Takes the steps of a run beside the peer's: the interpreter `python`, with arguments `peer`."""
  mesh = make_mesh(run)
  with contextlib.closing(training_batches(run, None, mesh)) as batches:
    batch, stats = next(batches)
  threads = len(os.sched_getaffinity(0))
  print(
    f"{run.name}, {batch.tokens.shape} positions, {stats.num_images} pictures in "
    f"{batch.image_mask.size} slots, {run.model.dtype}, {threads} threads"
  )
  with tempfile.TemporaryDirectory() as folder:
    save_work(folder, run, batch)
    workers = {
      "mm1_jax": Worker("bench.ours", folder),
      "torch": Worker("bench.torch_peer", folder, *peer, python=python, threads=threads),
    }
    report(workers, turns, run, int(stats.num_images))
    for worker in workers.values():
      worker.close()


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
