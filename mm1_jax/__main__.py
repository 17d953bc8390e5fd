# SPDX-License-Identifier: Apache-2.0
"""The console command `mm1`, which runs all programs; `python -m mm1_jax` is the same.

  mm1 train --config=mm1_debug
  mm1 plan --config=mm1_30b_moe --topology=v5p-512
  mm1 data webdataset --input='laion/*.tar' --output=data/captions-train
  mm1 inspect --config=mm1_debug
  mm1 ask --checkpoint=runs/mm1_debug --image=photo.jpg
  mm1 convert export --checkpoint=runs/mm1_debug --format=huggingface --out=exports/mm1

`mm1 COMMAND --help` lists the flags of a command. A flag may be spelled with - or _ between its
words. Exit codes: 0 done, or help; 1 a mistake in what was asked, told in one message; 130 Ctrl-C.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable

import mm1_jax
from mm1_jax import cli
from mm1_jax.config import ConfigError


def main(argv: list[str] | None = None) -> None:
  """Runs the command that the first argument names.

  Raises:
    ConfigError: there is no such command; UserError: what the command says.
  """
  command, *args = (sys.argv[1:] if argv is None else argv) or [""]
  if command in ("--help", "-h"):
    commands = "\n".join(f"  {name:<9}{about}" for name, (_, about) in cli.PROGRAMS.items())
    print(f"{__doc__}\nCommands:\n{commands}")
  elif command == "--version":
    print(f"mm1_jax {mm1_jax.__version__}")
  else:
    sys.argv[0] = cli.COMMAND  # how programs spell themselves in what they say
    sys.path.insert(0, os.getcwd())  # as with `python -m`: a config file may import what is here
    _find(command)(args)


def _find(command: str) -> Callable[[list[str]], None]:
  """Returns the `main` of a command; only this imports what the command needs."""
  if command not in cli.PROGRAMS:
    near = difflib.get_close_matches(command, cli.PROGRAMS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"the commands are {', '.join(cli.PROGRAMS)}."
    raise ConfigError(f"mm1 has no command '{command}'; {hint} See mm1 --help.")
  module, _ = cli.PROGRAMS[command]
  program = importlib.import_module(module)
  if hasattr(program, "__path__"):
    program = importlib.import_module(f"{module}.__main__")
  return program.main


def door() -> None:
  """Entry point of the console command."""
  cli.run(main)


if __name__ == "__main__":
  door()
