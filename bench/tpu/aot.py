# SPDX-License-Identifier: Apache-2.0
"""Train steps through the real TPU compiler, beside MaxText's: `python -m bench.tpu.aot`.

  python -m bench.tpu.aot --shape=d30_8k,moe64 --markdown=table.md
  python -m bench.tpu.aot --shape=family

Nothing runs on a TPU: the compiler (`make libtpu`) makes the program of a slice that is not there,
and `mm1_jax.plan` prices it, see docs/guides/plan.md. A shape takes minutes and some gigabytes;
what was compiled once is found again, so a second run takes as long as tracing does.

For each step: `roof`, every operation at its roofline; `mid`, the figure to quote; `pred`, the
compiler's own cycles. A dropless layer over an `expert` axis has buffers of `exchange_factor` times
an even load, and runs in rounds where a chip's experts get more. `even` is a step in which all get
the same, and the kernels skip what is empty; `full` one in which all buffers are full; `worst` one
in which all layers run in rounds, and all tokens choose the experts of one chip.
"""

import argparse
import dataclasses
import pathlib
import sys

from mm1_jax.configs.common import KEEP_PRODUCTS

from bench.tpu.peer_shapes import SHAPES, Shape, Step
from mm1_jax.config import RunConfig
from mm1_jax.configs import mm1_3b, mm1_3b_moe, mm1_7b, mm1_7b_moe, mm1_30b, mm1_30b_moe
from mm1_jax.plan.compare import markdown_table
from mm1_jax.plan.compile import default_cache
from mm1_jax.plan.estimate import Plan, make_plan, usual_step
from mm1_jax.plan.memory import GIB
from mm1_jax.plan.report import figures
from mm1_jax.plan.topology import find_topology

FAMILY = (mm1_3b, mm1_7b, mm1_30b, mm1_3b_moe, mm1_7b_moe, mm1_30b_moe)
COLUMNS = (
  "shape",
  "slice",
  "tokens a chip",
  "case",
  "roof s",
  "**mid s**",
  "pred s",
  "MFU",
  "GiB of a chip",
  "MaxText mid s",
  "its MFU",
  "MaxText / ours",
)


def plan_shape(shape: Shape) -> Plan:
  """Compiles a shape's step, or finds it in the cache of plans."""
  return make_plan(shape.run(), find_topology(shape.slice), cache=default_cache())


def vision_run() -> RunConfig:
  """Returns a run that is nearly all pictures: mm1_3b's encoder and connector, as it has them.

  Its decoder is one thin layer of the same width, so that the read-out is whole; its FLOPs, 1%,
  count too. 48 pictures at a time on a chip of a v5p-128, all matrix products of a block kept.
  """
  run = RunConfig.from_dict(mm1_3b.get_config().to_dict())
  decoder = dataclasses.replace(
    run.model.decoder, vocab_size=1024, depth=1, num_heads=1, num_kv_heads=1, mlp_dim=64
  )
  slots = 12
  return dataclasses.replace(
    run,
    name="vision",
    model=dataclasses.replace(run.model, decoder=decoder, remat=KEEP_PRODUCTS),
    data=dataclasses.replace(run.data, seq_len=1792, batch_size=512, images_per_row=slots),
    train=dataclasses.replace(run.train, accumulation_steps=2),
  )


def vision_table() -> str:
  """Returns the step of `vision_run` on a v5p-128."""
  plan = make_plan(vision_run(), find_topology("v5p-128"), cache=default_cache())
  assert plan.step is not None
  step = plan.step
  per_image = 1e6 * step.seconds * plan.topology.num_chips / plan.images
  head = "shape", "slice", "pictures a chip", "roof s", "**mid s**", "pred s", "MFU", "GiB"
  row = (
    "vision",
    "v5p-128",
    str(plan.images // plan.topology.num_chips),
    f"{step.lower:.3g}",
    f"**{step.seconds:.3g}**",
    f"{step.upper:.3g}",
    f"{plan.mfu(step.seconds):.1%}",
    f"{sum(plan.memory.values()) / GIB:.1f}",
    f"{per_image:.0f}",
  )
  return markdown([(*head, "chip-us a picture"), ("---",) * len(row), row])


def family_table() -> str:
  """Returns the family's training steps on v5p, as their presets are."""
  plans = []
  for module in FAMILY:
    slice_name = next(name for name in module.SLICES if name.startswith("v5p"))
    run = RunConfig.from_dict(module.get_config(slice_name).to_dict())
    print(f"compiling {run.name} ...", file=sys.stderr, flush=True)
    plans.append(figures(make_plan(run, find_topology(slice_name), cache=default_cache())))
  return markdown_table(plans)


def rows(name: str, shape: Shape, plan: Plan) -> list[tuple[str, ...]]:
  """Returns a row of the table for each way a step may go."""
  needed = plan.shortage.needed if plan.shortage else sum(plan.memory.values())
  memory = f"{needed / GIB:.1f}" + ("" if plan.fits else ", does not fit")
  head = name, shape.slice, str(shape.tokens)
  peer = f"{shape.maxtext.seconds:g}", f"{shape.maxtext_mfu:.1%}"
  if plan.step is None:
    return [(*head, "", "", "refused", "", "", memory, *peer, "")]

  def usual(even_load: bool) -> Step:
    lower, upper = usual_step(plan, even_load=even_load)
    return Step(lower, (lower * upper) ** 0.5, upper)

  worst = Step(plan.step.lower, plan.step.seconds, plan.step.upper)
  even, full = usual(True), usual(False)
  cases = {"": full} if full == worst else {"even": even, "full": full, "worst": worst}
  return [
    (
      *head,
      case,
      f"{step.lower:.3g}",
      f"**{step.seconds:.3g}**",
      f"{step.upper:.3g}",
      f"{plan.mfu(step.seconds):.1%}",
      memory,
      *peer,
      f"{shape.maxtext.seconds / step.seconds:.2f}",
    )
    for case, step in cases.items()
  ]


def peer_table(names: list[str]) -> str:
  """Returns the steps of the shapes of these names, each beside MaxText's."""
  table = [COLUMNS, ("---",) * len(COLUMNS)]
  for name in names:
    print(f"compiling {name} ...", file=sys.stderr, flush=True)
    table += rows(name, SHAPES[name], plan_shape(SHAPES[name]))
  return markdown(table)


def markdown(table: list[tuple[str, ...]]) -> str:
  return "\n".join(f"| {' | '.join(row)} |" for row in table)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--shape",
    default=",".join(SHAPES),
    help="which, of %(default)s; or on its own: vision, or family, MM1's six on their v5p slices",
  )
  parser.add_argument("--markdown", help="file to write the table to as well")
  args = parser.parse_args()
  names = args.shape.split(",")
  alone = {"vision": vision_table, "family": family_table}
  if args.shape in alone:
    text = alone[args.shape]()
  elif unknown := [name for name in names if name not in SHAPES]:
    parser.error(f"no shape {unknown}; there are {', '.join(SHAPES)}; alone, {', '.join(alone)}.")
  else:
    text = peer_table(names)
  print(text)
  if args.markdown:
    pathlib.Path(args.markdown).write_text(text + "\n")


if __name__ == "__main__":
  main()
