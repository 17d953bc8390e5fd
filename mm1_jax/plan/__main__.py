# SPDX-License-Identifier: Apache-2.0
r"""Plans a run before it is paid for.

Compiles the train step that `main` runs with the real TPU compiler, on a machine without a TPU, and
predicts memory, FLOPs, collectives, the expected time of a step, and what the run costs. Where the
config has a preset for the slice (`mm1_30b_moe:v5p-512`), it is planned with that.

  python -m mm1_jax.plan --config=configs/mm1_30b_moe.py --topology=v5p-512 --price=2.10 \
      --json=plan.json --picture=plan.png
  python -m mm1_jax.plan --config=configs/mm1_3b.py --topology=v5e-256 --search \
      --meshes='fsdp=-1; fsdp=-1,tensor=2' --remats=full,dots --accumulation=1,2,4
  python -m mm1_jax.plan --compare=a.json,b.json

Any value of the config can be overridden, such as `--config.data.batch_size=64`. See
docs/guides/plan.md for what is predicted and how well.
"""

import argparse
import json
import pathlib

from mm1_jax import cli, extras
from mm1_jax.config import ConfigError

WHAT = ("train", "prefill", "decode")  # programs that can be planned; `compile.What`


def main(argv: list[str] | None = None) -> None:
  args = _parse(argv)
  # Only now: --help needs none of these, and importing them takes a second.
  from mm1_jax.plan.compare import compare_table, markdown_table, read_figures

  if args.compare is not None:
    if len(args.compare) != 2:
      raise ConfigError("--compare takes two files: --compare=a.json,b.json.")
    print(compare_table(*map(read_figures, args.compare)))
  elif args.markdown is not None:
    print(markdown_table([read_figures(path) for path in args.markdown]))
  elif args.topology is None:
    raise ConfigError("--topology=SLICE is needed, such as v5p-128 or v5e-256.")
  elif args.search:
    _search(args)
  else:
    _plan(args)


def _plan(args: argparse.Namespace) -> None:
  from mm1_jax.plan.compile import parse_option
  from mm1_jax.plan.estimate import make_plan
  from mm1_jax.plan.report import figures, table
  from mm1_jax.plan.topology import find_topology

  if args.picture:
    extras.require("draw")  # compiling takes minutes
  plan = make_plan(
    cli.load_config(args, topology=args.topology),
    find_topology(args.topology, args.num_slices),
    args.what,
    options=dict(map(parse_option, args.compiler_options)),
    cache=_cache(args),
    quick=args.quick,
  )
  print(table(plan, args.price))
  _write(args, figures(plan, args.price))
  if args.picture:
    from mm1_jax.plan.picture import draw

    pathlib.Path(args.picture).write_bytes(draw(plan))


def _search(args: argparse.Namespace) -> None:
  from mm1_jax.plan.report import figures
  from mm1_jax.plan.search import parse_mesh, search, search_table
  from mm1_jax.plan.topology import find_topology

  run = cli.load_config(args, topology=args.topology)
  plans = search(
    run,
    find_topology(args.topology, args.num_slices),
    meshes=[parse_mesh(m) for m in args.meshes.split(";")] if args.meshes else [run.mesh],
    remats=args.remats or [run.model.remat],
    accumulations=_counts("accumulation", args.accumulation),
    cache=_cache(args),
    quick=args.quick,
  )
  print(search_table(plans))
  _write(args, [figures(plan, args.price) for plan in plans])


def _parse(argv: list[str] | None) -> argparse.Namespace:
  parser = cli.make_parser("mm1_jax.plan", __doc__)
  parser.add_config()
  add = parser.add_argument
  add("--topology", metavar="SLICE", help="of TPUs, such as v5p-128 or v5e-256")
  add("--num-slices", type=int, default=1, metavar="N", help="mesh.data runs between them (1)")
  add("--what", choices=WHAT, default="train", help="program to plan (train)")
  add("--price", type=float, metavar="P", help="of a chip for an hour, for the cost of the run")
  add("--json", metavar="FILE", help="to write all figures to")
  add("--picture", metavar="FILE", help="PNG to draw memory and time to")
  add("--cache", metavar="FOLDER", help="of compiled programs (~/.cache/mm1_jax/plans)")
  add("--compiler-options", type=_list, default=[], metavar="A=B,..", help="such as xla_tpu_x=true")
  add(
    "--quick",
    action="store_true",
    help="stop before code is generated: seconds, not minutes; times are lower bounds",
  )
  add("--search", action="store_true", help="try meshes x remat policies x rows at a time")
  add("--meshes", metavar="M;M", help="for --search: 'fsdp=-1; fsdp=-1,tensor=2' (the config's)")
  add("--remats", type=_list, metavar="A,B", help="for --search: of model.remat (the config's)")
  add(
    "--accumulation",
    type=_list,
    default=["1", "2", "4"],
    metavar="N,N",
    help="for --search: values of train.accumulation_steps (1,2,4)",
  )
  add("--markdown", type=_list, metavar="FILES", help="JSON of plans, for one Markdown table")
  add("--compare", type=_list, metavar="A,B", help="two JSON files of plans, to set side by side")
  return parser.parse_args(argv)


def _list(text: str) -> list[str]:
  return [item.strip() for item in text.split(",") if item.strip()]


def _cache(args: argparse.Namespace) -> pathlib.Path:
  from mm1_jax.plan.compile import default_cache

  return pathlib.Path(args.cache) if args.cache else default_cache()


def _write(args: argparse.Namespace, values) -> None:
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(values, indent=1) + "\n")


def _counts(flag: str, texts: list[str]) -> list[int]:
  if not all(text.isdigit() and int(text) for text in texts):
    raise ConfigError(f"--{flag}={','.join(texts)} must be counts, such as 1,2,4.")
  return [int(text) for text in texts]


if __name__ == "__main__":
  cli.run(main)
