# SPDX-License-Identifier: Apache-2.0
"""Config files: found by path or by name, run, overridden, and built once into a `RunConfig`.

A file is a Python program with a function `get_config` that returns an `ml_collections.ConfigDict`.
What follows a colon is its argument: `configs/mm1_proxy.py:85m`, or by name `mm1_proxy:85m`. A file
may have `SLICES`, the TPU slices that it has presets for, which it takes as argument.
"""

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import pathlib
import sys
import traceback
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mm1_jax.config import ConfigError, RunConfig
from mm1_jax.overrides import Override, merge

PACKAGE = "mm1_jax.configs"
USUAL_SLICE = "v5p-128"  # for a plan of a config without presets
SHARED = ("__init__", "common")  # files of the package that are no configs


@dataclasses.dataclass(frozen=True)
class ConfigFile:
  """A config file that was run, and what is to be asked of it."""

  spec: str  # as it was given
  module: types.ModuleType
  argument: str | None = None

  @classmethod
  def find(cls, spec: str) -> "ConfigFile":
    """Returns the file that `PATH.py:ARGUMENT` or `NAME:ARGUMENT` means.

    `configs/NAME.py` is the shipped file where there is no such folder.

    Raises:
      ConfigError: there is none, or it cannot be run.
    """
    path, colon, argument = spec.partition(":")
    return cls(spec, _load(path), argument if colon else None)

  @property
  def slices(self) -> Sequence[str]:
    """TPU slices that the file has presets for."""
    return tuple(getattr(self.module, "SLICES", ()))

  @property
  def planned_slice(self) -> str:
    """The TPU slice that a plan is best made for: the argument's, else that of a preset."""
    if self.argument in self.slices:
      return str(self.argument)
    return next((name for name in self.slices if name.startswith("v5p")), USUAL_SLICE)

  def on_slice(self, name: str) -> "ConfigFile":
    """Returns this file with its preset for a slice, if it has one and no other argument."""
    if self.argument is not None or name not in self.slices:
      return self
    return dataclasses.replace(self, argument=name)

  def build(self, overrides: Iterable[Override] = ()) -> RunConfig:
    """Returns the run that the file describes, with overrides.

    Raises:
      ConfigError: `get_config` fails, a key is unknown, or values do not fit.
    """
    return RunConfig.from_dict(merge(self._values(), overrides))

  def _values(self) -> Mapping[str, Any]:
    get_config = getattr(self.module, "get_config", None)
    if get_config is None:
      raise ConfigError(f"--config={self.spec}: the file has no function get_config.")
    args = () if self.argument is None else (self.argument,)
    try:
      inspect.signature(get_config).bind(*args)
    except TypeError as e:
      takes = "what follows the colon is wrong" if args else "an argument after a colon is needed"
      raise ConfigError(f"--config={self.spec}: {takes}: get_config: {e}.") from e
    try:
      config = get_config(*args)
      values = config.to_dict() if hasattr(config, "to_dict") else config
    except Exception as e:  # a config file is a program, and may raise anything
      raise ConfigError(f"--config={self.spec}: {_reason(e)}") from e
    if not isinstance(values, Mapping):
      raise ConfigError(
        f"--config={self.spec}: get_config returned {type(config).__name__}; it must return an "
        "ml_collections.ConfigDict."
      )
    return values


def shipped() -> list[str]:
  """Returns the names of the configs that come with the package."""
  return sorted(p.stem for p in _folder().glob("*.py") if p.stem not in SHARED)


def _folder() -> pathlib.Path:
  return pathlib.Path(next(iter(importlib.import_module(PACKAGE).__path__)))


def _load(given: str) -> types.ModuleType:
  """Runs a config file and returns its module."""
  path = pathlib.Path(given)
  if path.is_file():
    ours = path.resolve().parent == _folder().resolve() and path.stem.isidentifier()
    load = f"{PACKAGE}.{path.stem}" if ours and path.suffix == ".py" else path
  elif path.stem in shipped() and given in (path.stem, f"configs/{path.stem}.py"):
    load = f"{PACKAGE}.{path.stem}"
  else:
    raise ConfigError(f"--config={given}: {_nothing(given)}")
  try:
    return importlib.import_module(load) if isinstance(load, str) else _run(load)
  except Exception as e:
    raise ConfigError(f"--config={given}: {_reason(e)}") from e


def _nothing(given: str) -> str:
  """Returns what to say where no file has a name."""
  if given.endswith(".py"):
    reason = "there is no such file."
  elif pathlib.Path(f"{given}.py").is_file():
    return f"there is no such file; did you mean '{given}.py'?"
  else:
    reason = "no config has this name."
  near = difflib.get_close_matches(pathlib.Path(given).stem, shipped(), n=1)
  hint = f" Did you mean '{near[0]}'?" if near else ""
  return f"{reason}{hint} Shipped are {', '.join(shipped())}."


def _run(path: pathlib.Path) -> types.ModuleType:
  spec = importlib.util.spec_from_file_location(f"config_file_{path.stem}", path)
  if spec is None or spec.loader is None:
    raise ConfigError("a config is a Python file, NAME.py.")
  sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses ask for it
  spec.loader.exec_module(module)
  return module


def _reason(error: Exception) -> str:
  """Returns what an exception of a config file says; where it is unexpected, also from where."""
  reason = " ".join(str(error).split())
  if isinstance(error, ValueError | OSError):  # what config files raise for their users
    return reason
  if isinstance(error, SyntaxError):
    return f"SyntaxError: {reason}."  # names the file and the line
  frame = traceback.extract_tb(error.__traceback__)[-1]
  return f"{type(error).__name__}: {reason} ({frame.filename}, line {frame.lineno})."
