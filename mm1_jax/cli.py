# SPDX-License-Identifier: Apache-2.0
"""What the command lines share: the door for configs, one line for a user's mistake, quiet.

Here ends `ml_collections`: behind `load_config` there are only frozen dataclasses.
"""

import logging as std_logging
import operator
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from mm1_jax.config import ConfigError, RunConfig, UserError

# For --help, `--config` is a flag of the program that asks for it.
flags.disclaim_key_flags()


def define_config() -> flags.FlagHolder:
  """Defines the flag `--config`, for `load_config`; its values can be overridden."""
  return config_flags.DEFINE_config_file(
    "config", None, "Config file, such as configs/mm1_3b.py or configs/mm1_proxy.py:85m."
  )


def load_config(flag: flags.FlagHolder) -> RunConfig:
  """Returns the run that `--config` and its overrides describe.

  Raises:
    ConfigError: there is none, the file cannot be loaded, or its values do not fit.
  """
  if flag.value is None:
    raise ConfigError("--config=FILE is needed, such as configs/mm1_debug.py; see --help.")
  try:
    values = flag.value.to_dict()
  except OSError as e:  # the flag keeps a file it cannot load until it is asked for
    raise ConfigError(f"--config cannot be loaded: {_reason(e)}.") from e
  return RunConfig.from_dict(values)


def read_config(path: str) -> RunConfig:
  """Returns the run that a config file describes, such as "configs/mm1_proxy.py:85m".

  Raises:
    ConfigError: the file cannot be loaded, or its values do not fit.
  """
  values = flags.FlagValues()
  argv = ["", f"--config={path}"]
  flag = config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
  try:
    values(argv)
  except Exception as e:  # a config file is a program, and may raise anything
    raise ConfigError(f"--config={path}: {_reason(e)}") from e
  return load_config(flag)


def parse(argv: list[str]) -> list[str]:
  """Parses flags; a config file or an override that is wrong is a ConfigError like any other."""
  # `config_flags` would read "None" as a number or a string.
  overrides = [(arg, re.fullmatch(r"--?config\.([^=]+)=(.*)", arg)) for arg in argv]
  last = {match[1]: match[2] for _, match in overrides if match}
  rest = [arg for arg, match in overrides if not match or match[2] != "None"]
  try:
    left = flags.FLAGS(rest)
    for key in (key for key, value in last.items() if value == "None"):
      group, _, name = f"config.{key}".rpartition(".")
      setattr(operator.attrgetter(group)(flags.FLAGS), name, None)
    return left
  except Exception as e:  # a config file is a program, and may raise anything
    raise ConfigError(f"{_reason(e)} See --help.") from e


def refuse_arguments(argv: list[str]) -> None:
  """Raises a ConfigError if something is left that is no flag."""
  if len(argv) > 1:
    raise ConfigError(f"unexpected arguments {argv[1:]}; overrides look like --config.key=value.")


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


def _reason(error: BaseException) -> str:
  """Returns the last line of a message: a config file's own exception comes with its traceback."""
  while error.args and isinstance(error.args[0], Exception):  # a KeyError of a KeyError
    error = error.args[0]
  lines = str(error.args[0] if len(error.args) == 1 else error).splitlines()
  reason = next((line.strip() for line in reversed(lines) if line.strip()), "")
  if isinstance(error, flags.Error | OSError | AttributeError | KeyError | TypeError | ValueError):
    return reason
  frame = traceback.extract_tb(error.__traceback__)[-1]
  where = "" if isinstance(error, SyntaxError) else f" ({frame.filename}, line {frame.lineno})"
  return f"{type(error).__name__}: {reason}{where}."
