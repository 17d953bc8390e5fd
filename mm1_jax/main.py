# SPDX-License-Identifier: Apache-2.0
r"""Trains a model.

  python -m mm1_jax.main --config=configs/mm1_debug.py
  python -m mm1_jax.main --config=mm1_30b_moe:v5p-512 --workdir=gs://BUCKET/mm1_30b_moe
  python -m mm1_jax.main --config=mm1_3b --config.train.num_steps=20 --config.mesh.tensor=2
  python -m mm1_jax.main --config=mm1_3b --sample

Any value of the config can be overridden. Run the same command again to continue from the newest
checkpoint. On several hosts, run it on each: on TPUs and under Slurm the processes find each other,
elsewhere give --coordinator, --num-processes and --process-id.
"""

import argparse
import functools
import os
import sys

from absl import logging

from mm1_jax import cli
from mm1_jax.train import stop


def main(argv: list[str] | None = None) -> None:
  args = _parse(argv)
  code = args.stopped_code
  with stop.Stop(functools.partial(stop.leave, code=code)) as stopping:
    # Only now: --help needs none of these, and importing them takes seconds.
    import psutil

    from mm1_jax import distributed, inputs
    from mm1_jax.eval.in_training import make_evaluators
    from mm1_jax.train.loop import train

    cluster = distributed.find_cluster(args.coordinator, args.num_processes, args.process_id)
    with distributed.joined(
      cluster, start_timeout=args.start_timeout, peer_timeout=args.peer_timeout
    ):
      stopping.leave = functools.partial(distributed.leave, code=code)
      run = cli.load_config(args)
      if args.sample:
        args.config = inputs.sample_config(run)
        run = cli.load_config(args)
      workdir = args.workdir or f"runs/{run.name}"
      logging.info("training %s in %s", args.config, workdir)
      distributed.check_same("code and config", distributed.code_version() | run.to_dict())
      inputs.check(run, workdir, **cli.ways_on(args))
      launched = psutil.Process().create_time()  # so that imports and waiting for hosts count
      evaluators = make_evaluators(run)
      train(run, workdir, launched=launched, evaluators=evaluators, stop=stopping)
  if stopping.stuck:  # a thread that Python would wait for
    logging.warning("%s cannot be closed; ending without", stopping.stuck)
    os._exit(code if stopping.left_out else 0)
  if stopping.left_out:
    sys.exit(code)


def _parse(argv: list[str] | None) -> argparse.Namespace:
  parser = cli.make_parser("mm1_jax.main", __doc__)
  parser.add_config()
  add = parser.add_argument
  add(
    "--workdir",
    metavar="FOLDER",
    help="(or gs:// path) of checkpoints and metrics; an existing one is resumed (runs/NAME, by "
    "the config's name)",
  )
  add(
    "--sample",
    action="store_true",
    help="instead: a tiny model of the config's kind on the shipped sample, in minutes on a CPU",
  )
  add("--coordinator", metavar="HOST:PORT", help="of process 0; or $JAX_COORDINATOR_ADDRESS")
  add("--num-processes", type=int, metavar="N", help="one on each host; or $JAX_NUM_PROCESSES")
  add("--process-id", type=int, metavar="I", help="this one, from 0; or $JAX_PROCESS_ID")
  add(
    "--start-timeout",
    type=cli.at_least(1),
    default=300,
    metavar="S",
    help="seconds in which all processes must come (300)",
  )
  add(
    "--peer-timeout",
    type=cli.at_least(5),
    default=60,
    metavar="S",
    help="seconds of silence after which a process counts as dead (60)",
  )
  add(
    "--stopped-code",
    type=int,
    default=0,
    metavar="CODE",
    help="exit code if a signal stops the run early; a scheduler may start it again (0)",
  )
  return parser.parse_args(argv)


if __name__ == "__main__":
  cli.run(main)
