# SPDX-License-Identifier: Apache-2.0
"""Trains a model: `python -m mm1_jax.main --config=configs/mm1_debug.py --workdir=runs/debug`.

Any value of the config can be overridden, such as `--config.train.num_steps=20`. Run the same
command again to go on from the newest checkpoint. This file only connects: see `train/loop.py`.
"""

import traceback

from absl import app, flags
from ml_collections import config_flags

from mm1_jax import cli
from mm1_jax.config import ConfigError, RunConfig
from mm1_jax.train.loop import train

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, such as configs/mm1_3b.py or configs/mm1_proxy.py:85m."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder (or gs:// path) of checkpoints and metrics; an existing one is resumed."
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise ConfigError(f"unexpected arguments {argv[1:]}; overrides look like --config.key=value.")
  if _CONFIG.value is None or _WORKDIR.value is None:
    raise ConfigError("both --config=FILE and --workdir=FOLDER are needed; see --help.")
  try:
    values = _CONFIG.value.to_dict()
  except OSError as e:  # the flag keeps a file it cannot load until it is asked for
    raise ConfigError(f"--config cannot be loaded: {_reason(e)}.") from e
  train(RunConfig.from_dict(values), _WORKDIR.value)


def parse(argv: list[str]) -> list[str]:
  """Parses flags; a config file or an override that is wrong is a ConfigError like any other."""
  try:
    return flags.FLAGS(argv)
  except Exception as e:  # a config file is a program, and may raise anything
    raise ConfigError(f"{_reason(e)} See --help.") from e


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


if __name__ == "__main__":
  cli.run(app.run, main, flags_parser=parse)
