# SPDX-License-Identifier: Apache-2.0
"""What the command lines share: a user's mistake is one line, and libraries keep quiet."""

import logging as std_logging
import os
import sys
from collections.abc import Callable
from typing import Any

from absl import flags, logging

from mm1_jax.config import UserError


def run(program: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
  """Runs a program; a UserError ends it with exit code 1, one line, and no traceback."""
  show_story()
  try:
    program(*args, **kwargs)
  except UserError as e:
    sys.exit(f"error: {e}")


def show_story() -> None:
  """Logs what this package says, bare; of the libraries, errors only."""
  flags.FLAGS.mark_as_parsed()  # absl logs before that with a warning; app.run parses all the same
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(None)
  handler.addFilter(_is_ours)


def _is_ours(record: std_logging.LogRecord) -> bool:
  ours = record.pathname.startswith(os.path.dirname(__file__))
  return ours or record.levelno >= std_logging.ERROR
