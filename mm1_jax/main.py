# SPDX-License-Identifier: Apache-2.0
"""Trains a model: `python -m mm1_jax.main --config=configs/mm1_debug.py --workdir=runs/debug`.

Any value of the config can be overridden, such as `--config.train.num_steps=20`. Run the same
command again to go on from the newest checkpoint. This file only connects: see `train/loop.py`.
"""

from absl import app, flags

from mm1_jax import cli
from mm1_jax.config import ConfigError
from mm1_jax.train.loop import train

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder (or gs:// path) of checkpoints and metrics; an existing one is resumed."
)


def main(argv: list[str]) -> None:
  cli.refuse_arguments(argv)
  if _CONFIG.value is None or _WORKDIR.value is None:
    raise ConfigError("both --config=FILE and --workdir=FOLDER are needed; see --help.")
  train(cli.load_config(_CONFIG), _WORKDIR.value)


if __name__ == "__main__":
  cli.run(app.run, main, flags_parser=cli.parse)
