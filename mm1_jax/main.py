# SPDX-License-Identifier: Apache-2.0
"""Trains a model: `python -m mm1_jax.main --config=configs/mm1_debug.py --workdir=runs/debug`.

Any value of the config can be overridden, such as `--config.train.num_steps=20`. Run the same
command again to go on from the newest checkpoint. This file only connects: see `train/loop.py`.
"""

import logging as std_logging
import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from mm1_jax.checkpoint import CheckpointError
from mm1_jax.config import ConfigError, RunConfig
from mm1_jax.data.sources import DataError
from mm1_jax.train.loop import TrainingDiverged, train

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, such as configs/mm1_3b.py or configs/mm1_proxy.py:85m."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder (or gs:// path) of checkpoints and metrics; an existing one is resumed."
)
USER_ERRORS = (ConfigError, DataError, CheckpointError, TrainingDiverged)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise ConfigError(f"unexpected arguments {argv[1:]}; overrides look like --config.key=value.")
  if _CONFIG.value is None or _WORKDIR.value is None:
    raise ConfigError("both --config=FILE and --workdir=FOLDER are needed; see --help.")
  train(RunConfig.from_dict(_CONFIG.value.to_dict()), _WORKDIR.value)


def parse(argv: list[str]) -> list[str]:
  """Parses flags; a config file or an override that is wrong is a ConfigError like any other."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError) as e:
    # A config file's own exception comes with its traceback; the last line says what is wrong.
    reason = [line.strip() for line in str(e).splitlines() if line.strip()][-1]
    raise ConfigError(f"{reason} See --help.") from e


def show_story() -> None:
  """Logs what this package says, bare; of the libraries, warnings only."""
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(None)
  package = os.path.dirname(__file__)
  handler.addFilter(lambda r: r.levelno > std_logging.INFO or r.pathname.startswith(package))


def run() -> None:
  """Runs the program; a user's mistake ends it with one line and no traceback."""
  show_story()
  try:
    app.run(main, flags_parser=parse)
  except USER_ERRORS as e:
    sys.exit(f"error: {e}")


if __name__ == "__main__":
  run()
