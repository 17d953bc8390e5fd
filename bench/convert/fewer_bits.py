# SPDX-License-Identifier: Apache-2.0
"""What fewer bits cost: a run's held-out loss with its matrices as they are, in int8 and in int4.

  python -m bench.convert.fewer_bits --checkpoint=runs/demo/pretrain

Each held-out source is read whole, once. Needs the extra `quant`.
"""

import argparse
import dataclasses

import jax

from mm1_jax import cli
from mm1_jax.inference import QUANTIZED
from mm1_jax.inference.model import Model
from mm1_jax.train.heldout import held_out_loss


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--checkpoint", required=True, metavar="RUN")
  args = parser.parse_args()
  for kind in (None, *QUANTIZED):
    model = Model.load(args.checkpoint, quantize=kind)
    train = dataclasses.replace(model.run.train, eval_batches=None)
    run = dataclasses.replace(model.run, train=train)
    with jax.set_mesh(model.mesh):
      losses = held_out_loss(model.params, run, model.mesh)
    if kind is None:
      whole = losses
      print("| source |", *(f"{name.removeprefix('eval/loss/')} |" for name in losses))
      print("|---|" + "---|" * len(losses))
    row = (f"{loss:.4f} ({loss - whole[name]:+.4f}) |" for name, loss in losses.items())
    print(f"| {kind or 'as trained'} |", *row, flush=True)


if __name__ == "__main__":
  cli.run(main)
