# SPDX-License-Identifier: Apache-2.0
r"""Talks with a model on a web page.

  python -m mm1_jax.inference.app --checkpoint=runs/debug_sft

Open http://127.0.0.1:7860: pictures and a question go in at the bottom, the answer grows above.
Only this machine reaches the page, unless --host or --share say otherwise; then it asks for a
password. It asks nothing of any other server. What is above one of the bounds is refused before
anything is done with it:

  python -m mm1_jax.inference.app --checkpoint=runs/debug_sft --host=0.0.0.0 \\
      --password-file=password.txt --max-megapixels=10 --max-disk-mb=500
"""

import argparse
import os
import pathlib
import tempfile
from typing import TYPE_CHECKING, Any

from mm1_jax import cli, extras
from mm1_jax.config import UserError
from mm1_jax.inference import generate

if TYPE_CHECKING:
  from mm1_jax.inference.door import DoorBounds
  from mm1_jax.inference.page import PageBounds

LOCAL = ("127.0.0.1", "localhost", "::1")
PASSWORD = "MM1_PASSWORD"
LEAST_PASSWORD = 8  # characters
UPLOADS = "GRADIO_TEMP_DIR"  # read by Gradio, for where it keeps them
# What is bounded: by flag the default, its unit, and what it is of.
BOUNDS = {
  "max-megapixels": (40.0, "N", "of a picture"),
  "max-total-megapixels": (80.0, "N", "of all pictures of a conversation"),
  "max-images": (32, "N", "pictures of a conversation"),
  "max-chars": (100_000, "N", "characters of a question, and of the instructions"),
  "max-waiting": (64, "N", "questions that wait; the next one is refused"),
  "max-upload-mb": (20.0, "N", "of a file"),
  "max-disk-mb": (2000.0, "N", "of all uploads; the oldest make room"),
  "max-upload-hours": (24.0, "N", "that an upload is kept"),
  "max-request-seconds": (120.0, "S", "in which a request must have come"),
  "max-sessions": (1000, "N", "visitors that are remembered"),
  "max-session-hours": (2.0, "N", "that a visitor is remembered after the last request"),
}


def main(argv: list[str] | None = None) -> None:
  args = _parse(argv)
  for name in BOUNDS:
    if not getattr(args, name.replace("-", "_")) > 0:
      raise UserError(f"--{name} is {getattr(args, name.replace('-', '_'))}; it must be above 0.")
  password = find_password(args)
  extras.require("serve")
  settings = generate.how(args)
  with tempfile.TemporaryDirectory(prefix="mm1-uploads-") as folder:
    os.environ[UPLOADS] = folder
    _serve(args, settings, password, pathlib.Path(folder))


def _serve(
  args: argparse.Namespace, settings: dict[str, Any], password: str, folder: pathlib.Path
) -> None:
  # Only now: --help does not need Gradio, and importing it takes seconds.
  from starlette.middleware import Middleware

  from mm1_jax.inference.door import Door, password_check
  from mm1_jax.inference.page import THEME, Page

  model = generate.load(args)
  if args.share or args.host not in LOCAL:
    generate.tell("whoever reaches this page can ask, and see nothing of what others asked")
  page = Page(model, seed=args.seed, bounds=page_bounds(args), **settings).build(model.run.name)
  door = Middleware(
    Door, bounds=door_bounds(args), folder=folder, sessions=lambda: page.state_holder
  )
  try:
    page.launch(
      server_name=args.host,
      server_port=args.port,
      share=args.share,
      max_file_size=int(args.max_upload_mb * 1e6),
      state_session_capacity=args.max_sessions,
      auth=password_check(password) if password else None,  # pyright: ignore[reportArgumentType]
      auth_message="Any name will do; the password is that of this page.",
      app_kwargs={"middleware": [door]},
      footer_links=[],
      ssr_mode=False,
      theme=THEME,
    )
  except OSError as e:
    raise UserError(f"the page cannot be served at {args.host}:{args.port or 7860}: {e}") from e


def find_password(args: argparse.Namespace) -> str:
  """Returns the page's password, "" for none.

  Raises:
    UserError: the network reaches the page, and there is none; or it is short, or cannot be read.
  """
  password = os.environ.get(PASSWORD, "")
  if args.password_file:
    try:
      password = pathlib.Path(args.password_file).read_text().strip()
    except (OSError, UnicodeDecodeError) as e:
      raise UserError(f"--password-file={args.password_file} cannot be read ({e}).") from e
  if (password or args.password_file) and len(password) < LEAST_PASSWORD:
    raise UserError(f"the password has {len(password)} characters; give it {LEAST_PASSWORD}.")
  if not password and not args.no_password and (args.share or args.host not in LOCAL):
    raise UserError(
      f"others reach the page with --share or --host={args.host}; give it a password, with "
      f"--password-file=FILE or in ${PASSWORD}, or say --no-password."
    )
  return "" if args.no_password else password


def page_bounds(args: argparse.Namespace) -> "PageBounds":
  from mm1_jax.inference.page import PageBounds

  pixels, total = int(args.max_megapixels * 1e6), int(args.max_total_megapixels * 1e6)
  return PageBounds(pixels, total, args.max_images, args.max_chars, args.max_waiting)


def door_bounds(args: argparse.Namespace) -> "DoorBounds":
  from mm1_jax.inference.door import BYTES_PER_CHARACTER, OTHER_BYTES, DoorBounds

  return DoorBounds(
    # A text above the bound comes as far as the page, which says so.
    request_bytes=4 * BYTES_PER_CHARACTER * args.max_chars + OTHER_BYTES,
    upload_bytes=int(args.max_upload_mb * 1e6) * args.max_images + OTHER_BYTES,
    disk_bytes=int(args.max_disk_mb * 1e6),
    upload_seconds=args.max_upload_hours * 3600,
    request_seconds=args.max_request_seconds,
    session_seconds=args.max_session_hours * 3600,
  )


def _parse(argv: list[str] | None) -> argparse.Namespace:
  parser = cli.make_parser("mm1_jax.inference.app", __doc__)
  add = parser.add_argument
  add("--host", default=LOCAL[0], metavar="ADDRESS", help="0.0.0.0 lets the network in (127.0.0.1)")
  add("--port", type=int, metavar="N", help="(the first free one from 7860)")
  add("--share", action="store_true", help="a public address, through Gradio's servers, for a week")
  add("--password-file", metavar="FILE", help=f"the page's password; or ${PASSWORD}")
  add("--no-password", action="store_true", help="lets in whoever reaches the page")
  for name, (default, unit, what) in BOUNDS.items():
    help = f"{what} ({default:,g})"
    add(f"--{name}", type=type(default), default=default, metavar=unit, help=help)
  generate.add_model_flags(parser)
  generate.add_answer_flags(parser, max_new_tokens=512)
  return parser.parse_args(argv)


if __name__ == "__main__":
  cli.run(main)
