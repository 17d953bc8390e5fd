# SPDX-License-Identifier: Apache-2.0
r"""Asks a trained model about pictures; prints its answer on stdout and nothing else there.

  python -m mm1_jax.inference.generate --checkpoint=runs/debug_sft \
      --image=a.jpg --prompt="What is this?"

--image and --prompt may be repeated; their order is the content's. Two examples, then a question:

  python -m mm1_jax.inference.generate --checkpoint=runs/debug --raw \
      --image=a.jpg --prompt="A cat." --image=b.jpg --prompt="A dog." --image=c.jpg
"""

import argparse
import sys
import time

from etils import epath

from mm1_jax import cli
from mm1_jax.inference.model import Model, PromptError
from mm1_jax.inference.sampler import Sampling


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m mm1_jax.inference.generate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("--checkpoint", required=True, metavar="RUN", help="a run's workdir, or one of its steps")
  # Both fill one list: a text is a str, a picture a path.
  add("--image", dest="content", action="append", type=epath.Path, metavar="FILE", help="a picture")
  add("--prompt", dest="content", action="append", metavar="TEXT", help="a text")
  add("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (128)")
  add("--temperature", type=float, default=0.0, metavar="T", help="0, the default: the likeliest")
  add("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest tokens")
  add("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest P of all")
  add("--seed", type=int, default=0, help="of what is drawn (0)")
  add("--tensor", type=int, default=1, metavar="N", help="devices to split the model over (1)")
  chat = parser.add_mutually_exclusive_group()
  chat.add_argument(
    "--chat",
    action="store_true",
    default=None,
    help="the content is a question to answer (default if the run was trained on conversations)",
  )
  chat.add_argument(
    "--raw",
    dest="chat",
    action="store_false",
    default=None,
    help="the content is the beginning of a document to go on with (default otherwise)",
  )
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
  args = parse(argv)
  if not args.content:
    raise PromptError("there is nothing to answer; give --prompt=TEXT, --image=FILE, or both.")
  start = time.perf_counter()
  model = Model.load(args.checkpoint, tensor=args.tensor)
  loaded = time.perf_counter()
  _tell(f"loaded '{args.checkpoint}' in {loaded - start:.1f} s; compiling and answering")
  (answer,) = model.generate(
    [args.content],
    max_new_tokens=args.max_new_tokens,
    sampling=Sampling(args.temperature, args.top_k, args.top_p),
    chat=args.chat,
    seed=args.seed,
  )
  _tell(f"answered in {time.perf_counter() - loaded:.1f} s")
  print(answer)


def _tell(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
  cli.run(main)
