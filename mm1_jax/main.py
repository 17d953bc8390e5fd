# SPDX-License-Identifier: Apache-2.0
"""Trains a model: `python -m mm1_jax.main --config=configs/mm1_debug.py --workdir=runs/debug`.

Any value of the config can be overridden, such as `--config.train.num_steps=20`. Run the same
command again to go on from the newest checkpoint. On several hosts, run it on each: on TPUs and
under Slurm the processes find each other, elsewhere give --coordinator, --num_processes and
--process_id. This file only connects: see `train/loop.py`.
"""

import sys

import psutil
from absl import app, flags

from mm1_jax import cli, distributed
from mm1_jax.config import ConfigError
from mm1_jax.train.loop import train

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder (or gs:// path) of checkpoints and metrics; an existing one is resumed."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of process 0, any free port; or $JAX_COORDINATOR_ADDRESS."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Processes, one on each host; or $JAX_NUM_PROCESSES."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "This process, counted from 0; or $JAX_PROCESS_ID."
)
_START_TIMEOUT = flags.DEFINE_integer(
  "start_timeout", 300, "Seconds in which all processes must come.", lower_bound=1
)
_PEER_TIMEOUT = flags.DEFINE_integer(
  "peer_timeout", 60, "Seconds after which a process that is silent counts as dead.", lower_bound=5
)
_STOPPED_CODE = flags.DEFINE_integer(
  "stopped_code", 0, "Exit code if a signal stops the run early; a scheduler may start it again."
)


def main(argv: list[str]) -> None:
  cli.refuse_arguments(argv)
  if _CONFIG.value is None or _WORKDIR.value is None:
    raise ConfigError("both --config=FILE and --workdir=FOLDER are needed; see --help.")
  cluster = distributed.find_cluster(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  with distributed.joined(
    cluster, start_timeout=_START_TIMEOUT.value, peer_timeout=_PEER_TIMEOUT.value
  ):
    run = cli.load_config(_CONFIG)
    distributed.check_same("code and config", distributed.code_version() | run.to_dict())
    launched = psutil.Process().create_time()  # so that imports and waiting for hosts count
    state = train(run, _WORKDIR.value, launched=launched)
    stopped = int(state.step) < run.train.num_steps
  if stopped:
    sys.exit(_STOPPED_CODE.value)


if __name__ == "__main__":
  cli.run(app.run, main, flags_parser=cli.parse)
