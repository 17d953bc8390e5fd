# SPDX-License-Identifier: Apache-2.0
"""How a step's time grows with what it is made of.

  python -m bench.tpu.growth --picture=growth.png

One thing is doubled at a time, from MM1-3B's step with everything else as it is, and each step gets
a quick plan of the TPU compiler (`make libtpu`): its time with every operation at its roofline, a
lower bound. A *doubling* of 2.00 is linear, below it is better than that, above it is worse.
Strong scaling keeps the batch and doubles the chips: 0.50 would be ideal. Weak scaling doubles
both: 1.00 would be ideal.
"""

import argparse
import dataclasses
import itertools
import pathlib
from collections.abc import Iterator

from matplotlib.figure import Figure

from mm1_jax.config import MeshConfig, RunConfig
from mm1_jax.configs import mm1_3b, mm1_3b_moe
from mm1_jax.drawing import COLORS, to_png
from mm1_jax.plan.compile import default_cache
from mm1_jax.plan.estimate import make_plan
from mm1_jax.plan.topology import find_topology

BASE, MOE = "v5p-128", "v5p-256"  # 64 and 128 chips
IDEAL = {"chips": 0.5, "chips and rows": 1.0, "experts": 1.0}  # else 2: linear


def dense(*, rows=256, length=4096, images=16, depth=26, data=1) -> RunConfig:
  """Returns MM1-3B's step in one micro-batch, its params sharded over all chips but for `data`."""
  run = RunConfig.from_dict(mm1_3b.get_config(BASE).to_dict())
  run = resized(run, rows, length, images, depth)
  return dataclasses.replace(run, mesh=MeshConfig(data=data, fsdp=-1))


def sparse(experts: int) -> RunConfig:
  """Returns MM1-3B-MoE's step on 128 chips with so many experts, 8 chips along their axis."""
  run = RunConfig.from_dict(mm1_3b_moe.get_config(MOE).to_dict())
  run = resized(run, rows=256, length=4096, images=16, depth=26)
  moe = dataclasses.replace(run.model.decoder.moe, num_experts=experts)
  decoder = dataclasses.replace(run.model.decoder, moe=moe)
  return dataclasses.replace(
    run,
    model=dataclasses.replace(run.model, decoder=decoder),
    mesh=MeshConfig(fsdp=16, expert=8),
  )


def resized(run: RunConfig, rows: int, length: int, images: int, depth: int) -> RunConfig:
  decoder = dataclasses.replace(run.model.decoder, depth=depth)
  return dataclasses.replace(
    run,
    model=dataclasses.replace(run.model, decoder=decoder),
    data=dataclasses.replace(run.data, batch_size=rows, seq_len=length, images_per_row=images),
    train=dataclasses.replace(run.train, accumulation_steps=1),
  )


SERIES = {
  "rows": [(n, dense(rows=n), BASE) for n in (64, 128, 256)],
  "positions in a row": [
    (n, dense(rows=64, length=n, images=4), BASE) for n in (1024, 2048, 4096, 8192, 16384)
  ],
  "pictures in a row": [(n, dense(rows=128, images=n), BASE) for n in (2, 4, 8, 16)],
  "blocks": [(n, dense(rows=128, depth=n), BASE) for n in (13, 26, 52)],
  "experts": [(n, sparse(n), MOE) for n in (8, 16, 32, 64)],
  "chips": [(chips, dense(rows=256), f"v5p-{2 * chips}") for chips in (64, 128, 256)],
  "chips and rows": [  # MM1's encoder is 1280 wide, which is no multiple of 512
    (chips, dense(rows=2 * chips, data=max(1, chips // 256)), f"v5p-{2 * chips}")
    for chips in (64, 128, 256, 512)
  ],
}


def measure(name: str) -> Iterator[tuple[int, float]]:
  """Yields what is doubled and the seconds of its step, and prints them."""
  before = None
  for value, run, slice_name in SERIES[name]:
    plan = make_plan(run, find_topology(slice_name), cache=default_cache(), quick=True)
    if plan.step is None:
      print(f"| {name} | {value} | {slice_name} | does not fit | | |", flush=True)
      continue
    seconds, collectives = plan.step.lower, plan.step.seconds_by_kind.get("collective", 0.0)
    growth = f"{seconds / before:.2f}" if before else ""
    print(
      f"| {name} | {value} | {slice_name} | {seconds:.3f} | {growth} | "
      f"{collectives / seconds:.0%} | {plan.memory_share:.0%} |",
      flush=True,
    )
    before = seconds
    yield value, seconds


def draw(series: dict[str, list[tuple[int, float]]]) -> Figure:
  """Returns each series, its first point at 1 x 1, with what would be ideal as a dotted line."""
  figure = Figure(figsize=(12, 6), layout="constrained")
  axes = figure.subplots(2, 4, sharey=True)
  for (name, points), ax, color in zip(
    series.items(), axes.flat, itertools.cycle(COLORS), strict=False
  ):
    values, seconds = zip(*points, strict=True)
    times = [s / seconds[0] for s in seconds]
    slope = IDEAL.get(name, 2.0)
    ideal = [slope**i for i in range(len(values))]
    ax.plot(values, ideal, ":", color="#5f6570", label="ideal")
    ax.plot(values, times, "o-", color=color, label="predicted")
    ax.set(xscale="log", yscale="log", title=name, xticks=values, yticks=(0.25, 0.5, 1, 2, 4, 8))
    ax.set_xticklabels([f"{v}" for v in values])
    ax.set_yticklabels(["0.25", "0.5", "1", "2", "4", "8"])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
  for ax in axes.flat[len(series) :]:
    ax.set_visible(False)
  axes.flat[0].legend()
  figure.suptitle("Time of a step, as a multiple of the first; a lower bound by the TPU compiler")
  figure.supylabel("times as long")
  return figure


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--series", default=",".join(SERIES), help="what to double: %(default)s")
  parser.add_argument("--picture", type=pathlib.Path, help="PNG file to draw to")
  args = parser.parse_args()
  names = args.series.split(",")
  if unknown := [name for name in names if name not in SERIES]:
    parser.error(f"no series {unknown}; there are {', '.join(SERIES)}.")
  print("| what | how much | slice | step s, at least | doubling | collectives | of a chip |")
  print("|---|---|---|---|---|---|---|", flush=True)
  measured = {name: list(measure(name)) for name in names}
  if args.picture:
    args.picture.write_bytes(to_png(draw({k: v for k, v in measured.items() if v})))


if __name__ == "__main__":
  main()
