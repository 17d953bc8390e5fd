# SPDX-License-Identifier: Apache-2.0
"""A train step in bfloat16 on one GPU beside PyTorch's: `python -m bench.gpu.step --peer=PYTHON`.

  python -m bench.gpu.step --kind=moe --peer=/path/to/an/environment/with/torch/bin/python
  python -m bench.gpu.step --size=tiny      # on a CPU: whether it runs, nothing about speed

As bench/cpu/step.py, with a decoder of 1.2B params, ViT-L at 336 pixels, and rows of 2048. The
peer (bench/peer/torch_peer.py) attends by its fused kernels, and its layers are compiled by
`torch.compile`. With `--kind=moe` a decoder of half the width has 8 experts in every second layer;
the peer's are Mixtral's.

One after the other, each with the whole GPU, of which 80 GB suffice.
"""

import argparse
import os
import sys

import jax

from bench.cpu.step import beside
from mm1_jax.config import RunConfig
from mm1_jax.configs import common, mm1_debug, mm1_proxy


def run_config(size: str, kind: str) -> RunConfig:
  """Returns the run whose step is taken."""
  if size == "tiny":
    values = mm1_debug.get_config(kind).to_dict()
  else:
    config = mm1_proxy.get_config("302m" if kind == "moe" else "1b")
    if kind == "moe":
      common.moe(config, num_experts=8, every=2)
    values, sample = config.to_dict(), str(common.SAMPLE)
    sources = common.mixture(sample, common.MM1).to_dict()
    values["data"].update(tokenizer=f"{sample}/tokenizer.model", sources=sources, eval_sources={})
    values["data"].update(seq_len=2048, batch_size=8, images_per_row=4, window_rows=64)
    values["model"]["remat"] = common.KEEP_PRODUCTS
  if moe := values["model"]["decoder"]["moe"]:
    moe["capacity_factor"] = None  # the peer drops nothing either
  values["model"]["dtype"] = "bfloat16"
  return RunConfig.from_dict(values)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--kind", choices=("dense", "moe"), default="dense")
  parser.add_argument("--size", choices=("1b", "tiny"), default="1b")
  parser.add_argument("--peer", default=sys.executable, help="python with torch and transformers")
  parser.add_argument("--turns", type=int, default=5, help="of three steps each")
  args = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")  # of this process, which only makes the batch
  os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.92"
  peer = ["--dtype=bfloat16"]
  if args.size != "tiny":
    peer += ["--device=cuda", "--compile"]
  beside(
    run_config(args.size, args.kind), args.peer, peer, args.turns, together=args.size == "tiny"
  )


if __name__ == "__main__":
  main()
