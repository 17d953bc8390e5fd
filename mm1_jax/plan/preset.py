# SPDX-License-Identifier: Apache-2.0
"""The preset that a config file has for a slice."""

import re
import runpy

from absl import logging

from mm1_jax.plan.topology import slice_names


def with_preset(argv: list[str]) -> list[str]:
  """Returns the arguments with `:SLICE` behind a config file that has a preset for --topology."""
  given = {name.lstrip("-"): value for name, _, value in (arg.partition("=") for arg in argv)}
  config, topology = given.get("config", ""), given.get("topology", "")
  if not config.endswith(".py") or topology not in slice_names():
    return argv
  try:
    presets = runpy.run_path(config).get("SLICES", {})
  except Exception:  # is said when the flag is read
    return argv
  if topology not in presets:
    return argv
  logging.info("With the preset of %s for %s.", config, topology)
  return [f"{a}:{topology}" if re.match("--?config=", a) else a for a in argv]
