# SPDX-License-Identifier: Apache-2.0
r"""Talks with a model in the terminal.

  python -m mm1_jax.inference.chat --checkpoint=runs/debug_sft

Type a question. /image FILE shows the model a picture with it, /help lists what else there is.
Ctrl-C stops an answer, Ctrl-D ends the program.
"""

import contextlib

from mm1_jax import cli
from mm1_jax.inference import generate


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser("mm1_jax.inference.chat", __doc__)
  generate.add_model_flags(parser)
  generate.add_answer_flags(parser, max_new_tokens=512)
  args = parser.parse_args(argv)
  # Only now: --help needs neither, and importing them takes seconds.
  from mm1_jax.inference.conversation import Conversation
  from mm1_jax.inference.terminal import Chat

  settings = generate.how(args)
  model = generate.load(args)
  if not model.chat:
    generate.tell("this run was not trained on conversations (data.chat): do not expect answers")
  generate.tell("type a question, or /help; the first answer of a length compiles for a while")
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401  # arrow keys and earlier lines, where Python has it
  chat = Chat(Conversation(model, seed=args.seed, **settings))
  while True:
    try:
      if not chat.read(input("> ")):
        return
    except KeyboardInterrupt:
      print("\n[Ctrl-D or /quit ends]")
    except EOFError:
      print()
      return


if __name__ == "__main__":
  cli.run(main)
