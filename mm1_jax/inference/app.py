# SPDX-License-Identifier: Apache-2.0
r"""Talks with a model on a web page.

  python -m mm1_jax.inference.app --checkpoint=runs/debug_sft

Open http://127.0.0.1:7860: pictures and a question go in at the bottom, the answer grows above.
Only this machine reaches the page, unless --host or --share say otherwise. It asks nothing of any
other server.
"""

import argparse

from mm1_jax import cli, extras
from mm1_jax.config import UserError
from mm1_jax.inference import generate

LOCAL = ("127.0.0.1", "localhost", "::1")


def main(argv: list[str] | None = None) -> None:
  args = _parse(argv)
  for name in ("max_upload_mb", "max_megapixels"):
    if getattr(args, name) <= 0:
      raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0.")
  extras.require("serve")
  # Only now: --help does not need Gradio, and importing it takes seconds.
  from mm1_jax.inference.page import THEME, Page, bound_pixels

  settings = generate.how(args)
  model = generate.load(args)
  bound_pixels(model, int(args.max_megapixels * 1e6))
  if args.share or args.host not in LOCAL:
    generate.tell("whoever reaches this page can ask, and see nothing of what others asked")
  page = Page(model, seed=args.seed, **settings).build(model.run.name)
  try:
    page.launch(
      server_name=args.host,
      server_port=args.port,
      share=args.share,
      max_file_size=args.max_upload_mb * 1_000_000,
      footer_links=[],
      ssr_mode=False,
      theme=THEME,
    )
  except OSError as e:
    raise UserError(f"the page cannot be served at {args.host}:{args.port or 7860}: {e}") from e


def _parse(argv: list[str] | None) -> argparse.Namespace:
  parser = cli.make_parser("mm1_jax.inference.app", __doc__)
  add = parser.add_argument
  add("--host", default=LOCAL[0], metavar="ADDRESS", help="0.0.0.0 lets the network in (127.0.0.1)")
  add("--port", type=int, metavar="N", help="(the first free one from 7860)")
  add("--share", action="store_true", help="a public address, through Gradio's servers, for a week")
  add("--max-upload-mb", type=int, default=20, metavar="N", help="of a file (20)")
  add("--max-megapixels", type=float, default=40, metavar="N", help="of a picture (40)")
  generate.add_model_flags(parser)
  generate.add_answer_flags(parser, max_new_tokens=512)
  return parser.parse_args(argv)


if __name__ == "__main__":
  cli.run(main)
