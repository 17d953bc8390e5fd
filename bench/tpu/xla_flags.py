# SPDX-License-Identifier: Apache-2.0
"""What compiler options do to two blocks of a 7B decoder: `python -m bench.tpu.xla_flags`.

  python -m bench.tpu.xla_flags --slice=v6e-4 --options='; xla_tpu_scoped_vmem_limit_kib=65536'

Compiles forward, backward and update of two layers of Llama-2-7B's shape, 8192 tokens a chip, once
for each set of options; the first is what `mm1_jax/chips.py` has for the chip. Nothing
runs: `mm1_jax.plan` prices the programs, see docs/guides/plan.md. Differences under 5% are no win.
"""

import argparse

from bench.tpu.peer_shapes import ALL, L7B, text_only
from mm1_jax.plan.compile import PlanError, parse_option
from mm1_jax.plan.estimate import make_plan
from mm1_jax.plan.topology import find_topology

VMEM = "xla_tpu_scoped_vmem_limit_kib"
SETS = ";".join(["", *(f"{VMEM}={kib}" for kib in (32768, 49152, 65536, 98304))])
TOKENS = 8192  # a chip


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--slice", default="v5p-8", help="a small one: %(default)s, v5e-4, ...")
  parser.add_argument("--options", default=SETS, help="sets divided by ;, options by ,")
  args = parser.parse_args()
  topology = find_topology(args.slice)
  run = text_only(L7B, topology, TOKENS, remat=ALL, depth=2)
  print("| slice | options | roof ms | **mid ms** | pred ms |\n|---|---|---|---|---|")
  for text in args.options.split(";"):
    options = dict(map(parse_option, filter(None, text.strip().split(","))))
    try:
      step = make_plan(run, topology, options=options).step
    except PlanError as e:
      print(f"| {args.slice} | {text.strip()} | refused: {str(e).splitlines()[-1][:80]} | | |")
      continue
    cells = ["", "", ""]
    if step is not None:
      cells = [f"{1e3 * s:.1f}" for s in (step.lower, step.seconds, step.upper)]
    print(f"| {args.slice} | {text.strip() or 'as it is'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  main()
