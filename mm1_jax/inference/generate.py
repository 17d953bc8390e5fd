# SPDX-License-Identifier: Apache-2.0
r"""Asks a trained model about pictures; prints its answer on stdout and nothing else there.

  python -m mm1_jax.inference.generate --checkpoint=runs/debug_sft \
      --image=a.jpg --prompt="What is this?"

--image and --prompt may be repeated; their order is the content's. Two examples, then a question:

  python -m mm1_jax.inference.generate --checkpoint=runs/debug --raw \
      --image=a.jpg --prompt="A cat." --image=b.jpg --prompt="A dog." --image=c.jpg

Thousands of questions, {"prompt": "<image>What is this?", "images": ["a.jpg"]} a line; the same
command continues where it was stopped:

  python -m mm1_jax.inference.generate --checkpoint=runs/debug_sft \
      --input=questions.jsonl --output=answers.jsonl
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from mm1_jax import cli, untrusted
from mm1_jax.config import UserError
from mm1_jax.inference import QUANTIZED

if TYPE_CHECKING:
  from mm1_jax.inference.model import Model
  from mm1_jax.inference.prompts import Item

# The model's code is imported where it is used: --help does not need it, and it takes seconds.


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = cli.make_parser("mm1_jax.inference.generate", __doc__)
  add = parser.add_argument
  # Both fill one list: a text is a str, a picture a path.
  add("--image", dest="content", action="append", type=epath.Path, metavar="FILE", help="a picture")
  add("--prompt", dest="content", action="append", metavar="TEXT", help="a text")
  add("--input", metavar="FILE", help="JSON lines of questions")
  add("--output", metavar="FILE", help="JSON lines of answers, or why there is none")
  add("--images", metavar="FOLDER", help="of the pictures that --input names (its own folder)")
  add("--batch-size", type=int, default=8, metavar="N", help="questions read at once (8)")
  add_model_flags(parser)
  add_answer_flags(parser)
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
    help="the content is the beginning of a document to continue (default otherwise)",
  )
  return parser.parse_args(argv)


def add_model_flags(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
  """Adds which model is asked, and the devices that it is spread over."""
  add = parser.add_argument
  add("--checkpoint", required=required, metavar="RUN", help="a run's workdir, or one of its steps")
  add("--replicas", type=int, default=1, metavar="N", help="of all params, to split rows over (1)")
  add("--fsdp", type=int, default=1, metavar="N", help="to split rows and params over (1)")
  add("--expert", type=int, default=1, metavar="N", help="the same, and experts (1)")
  add("--tensor", type=int, default=1, metavar="N", help="to split heads and mlp over (1)")
  add("--quantize", choices=QUANTIZED, help="keeps matrices in fewer bits; needs qwix")
  add("--max-tiles", type=int, metavar="N", help="sub-images of a picture (as in training)")
  add("--cut-last", type=int, metavar="N", help="cut the last N pictures alone: mixed resolution")


def add_answer_flags(parser: argparse.ArgumentParser, *, max_new_tokens: int | None = None) -> None:
  """Adds how answers are drawn, and what ends them; None leaves their length to the model."""
  add = parser.add_argument
  add(
    "--max-new-tokens",
    type=int,
    default=max_new_tokens,
    metavar="N",
    help=f"longest answer ({max_new_tokens or '128, half of a row, or what room is left'})",
  )
  add("--temperature", type=float, default=0.0, metavar="T", help="0, the default: the likeliest")
  add("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest tokens")
  add("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest P of all")
  add(
    "--num-beams", type=int, default=1, metavar="K", help="search with K beams; draws nothing (1)"
  )
  add("--length-penalty", type=float, metavar="P", help="of beams: larger for longer answers (1)")
  add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be repeated")
  add("--seed", type=int, default=0, help="of what is drawn (0)")


def load(args: argparse.Namespace) -> "Model":
  """Loads what `add_model_flags` names, and says how long it took."""
  from mm1_jax.inference.model import Model

  start = time.perf_counter()
  axes = {axis: getattr(args, axis) for axis in ("fsdp", "expert", "tensor")}
  tiling = {"max_tiles": args.max_tiles, "last": args.cut_last}
  tiling = {key: value for key, value in tiling.items() if value is not None}
  model = Model.load(
    args.checkpoint, data=args.replicas, **axes, tiling=tiling, quantize=args.quantize
  )
  tell(f"loaded '{args.checkpoint}' in {time.perf_counter() - start:.1f} s")
  return model


def main(argv: list[str] | None = None) -> None:
  args = parse(argv)
  if (args.input is None) != (args.output is None):
    raise UserError("--input and --output go together: questions and where the answers go.")
  if args.input is not None and args.content:
    raise UserError("give either --input, or --prompt and --image.")
  if args.input is None and not args.content:
    raise UserError("there is nothing to answer; give --prompt=TEXT, --image=FILE, or both.")
  answer = _answer_one if args.input is None else _answer_all
  try:
    answer(args)
  except KeyboardInterrupt:
    tell("stopped" if args.input is None else "stopped; the same command continues from here")
    sys.exit(130)


def _answer_one(args: argparse.Namespace) -> None:
  content, settings = content_of(args.content), how(args)
  model = load(args)
  start = time.perf_counter()
  (answer,) = model.generate([content], chat=args.chat, seed=args.seed, **settings)
  tell(f"compiled and answered in {time.perf_counter() - start:.1f} s")
  print(untrusted.visible(answer))


def _answer_all(args: argparse.Namespace) -> None:
  from mm1_jax.inference.questions import answer_file

  settings = how(args)
  tally = answer_file(
    load(args),
    args.input,
    args.output,
    images=args.images,
    chat=args.chat,
    seed=args.seed,
    batch_size=args.batch_size,
    tell=tell,
    **settings,
  )
  if tally.failed:
    raise UserError(
      f"{tally.failed} of {sum(tally)} questions could not be answered; '{args.output}' says why. "
      f"Mend them, and the same command asks those again."
    )


def how(args: argparse.Namespace) -> dict[str, Any]:
  """Returns what `add_answer_flags` say, the seed aside, as `Model.generate` takes it.

  Raises:
    PromptError: flags that do not go together, or are out of range.
  """
  from mm1_jax.inference import settings
  from mm1_jax.inference.beam import BeamSearch
  from mm1_jax.inference.prompts import PromptError
  from mm1_jax.inference.sampler import GREEDY, Sampling

  sampling = Sampling(args.temperature, args.top_k, args.top_p)
  penalty = args.length_penalty
  if args.num_beams == 1 and penalty is not None:
    raise PromptError("--length-penalty is of beams; give --num-beams=K, too.")
  if args.num_beams != 1:
    if sampling != GREEDY:
      raise PromptError("--num-beams searches and draws nothing; leave out --temperature, --top-*.")
    sampling = BeamSearch(args.num_beams, 1.0 if penalty is None else penalty)
  if args.max_new_tokens is not None:
    settings.whole("max_new_tokens", args.max_new_tokens, 1)
  return {
    "max_new_tokens": args.max_new_tokens,
    "sampling": settings.sampling(sampling),
    "stop": settings.stop(args.stop),
  }


def content_of(items: "Sequence[Item]") -> "Sequence[Item]":
  """Returns texts and pictures in their order, or by the `<image>` slots of the text.

  Raises:
    PromptError: there are slots, but not as many as pictures, or in one of several texts.
  """
  from mm1_jax.data.tokenizer import IMAGE
  from mm1_jax.inference.prompts import PromptError, fill_slots

  texts = [item for item in items if isinstance(item, str)]
  if not any(IMAGE in text for text in texts):
    return items
  if len(texts) > 1:
    raise PromptError(f"{IMAGE} slots need all of the text in one --prompt.")
  return fill_slots(texts[0], [item for item in items if not isinstance(item, str)])


def tell(line: str) -> None:
  print(untrusted.visible(line), file=sys.stderr, flush=True)


if __name__ == "__main__":
  cli.run(main)
