# SPDX-License-Identifier: Apache-2.0
"""Beam's own options: passed on unchanged, with defaults for the machine we are on."""

import argparse
import dataclasses
import difflib
import os

from apache_beam.options import pipeline_options
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions

from mm1_jax.config import ConfigError
from mm1_jax.data.build.options import BuildOptions

# Beam's DirectRunner would first look for Prism, a program that it downloads.
LOCAL_RUNNER = "FnApiRunner"
_LOCAL = ("fnapirunner", "directrunner", "bundlebaseddirectrunner", "switchingdirectrunner")
# Starting a worker process takes seconds: worth it above this much input.
MIN_PARALLEL_BYTES = 64_000_000


def beam_options(args: list[str], *, num_units: int, num_bytes: int) -> PipelineOptions:
  """Returns Beam's options of `args`; without a runner, all cores of this machine.

  Raises:
    ConfigError: an argument is neither ours nor Beam's.
  """
  options = PipelineOptions(args)
  standard, direct = options.view_as(StandardOptions), options.view_as(DirectOptions)
  standard.runner = standard.runner or LOCAL_RUNNER
  if standard.runner.rsplit(".")[-1].lower() not in _LOCAL:
    return options  # other runners have options of their own
  _refuse_unknown(args)
  if not any(arg.startswith("--direct_") for arg in args) and num_bytes > MIN_PARALLEL_BYTES:
    direct.direct_num_workers = min(num_units, os.cpu_count() or 1)
    direct.direct_running_mode = (
      "multi_processing" if direct.direct_num_workers > 1 else "in_memory"
    )
  if direct.direct_running_mode == "multi_processing":
    # The workers' log lines come to our terminal.
    log = options.view_as(pipeline_options.WorkerOptions)
    log.default_sdk_harness_log_level = log.default_sdk_harness_log_level or "ERROR"
  return options


def _refuse_unknown(args: list[str]) -> None:
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  for group in PipelineOptions.__subclasses__():
    if hasattr(group, "_add_argparse_args"):
      group._add_argparse_args(parser)  # pyright: ignore[reportArgumentType]
  unknown = parser.parse_known_args(args)[1]
  if unknown:
    flag = unknown[0].partition("=")[0].replace("_", "-")
    ours = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(BuildOptions)]
    near = difflib.get_close_matches(flag, ours, n=1)
    hint = f"did you mean {near[0]}? See" if near else "see"
    raise ConfigError(f"{unknown[0]} is a flag neither of this format nor of Beam; {hint} --help.")
