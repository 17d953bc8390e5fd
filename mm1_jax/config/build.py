# SPDX-License-Identifier: Apache-2.0
"""Dataclasses from nested plain values: keys and types are checked, with their paths."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from mm1_jax.config.errors import ConfigError


def build(cls: type, values: Mapping[str, Any], path: str) -> Any:
  """Builds dataclass `cls`, refusing keys it does not have, and the lack of one without default."""
  if not isinstance(values, Mapping):
    raise ConfigError(f"{path or 'config'} is {values!r}; it must be a group of settings.")
  hints = field_types(cls)
  for key in values:
    if key not in hints:
      raise ConfigError(unknown_key(cls, f"{path}{key}", values[key]))
  for field in dataclasses.fields(cls):
    defaults = field.default, field.default_factory
    if field.name not in values and defaults == (dataclasses.MISSING, dataclasses.MISSING):
      raise ConfigError(f"{path}{field.name} is not given; it has no default.")
  return cls(**{k: _convert(hints[k], v, f"{path}{k}") for k, v in values.items()})


def field_types(cls: type) -> dict[str, Any]:
  """Returns the types of a dataclass's fields, without their ranges."""
  hints = typing.get_type_hints(cls)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def unknown_key(cls: type, path: str, value: Any, near: str | None = None) -> str:
  """Returns the message on a key that dataclass `cls` does not have, with the keys it has.

  Args:
    path: of the key, from the config's root.
    near: what was probably meant; None looks for it among the keys of `cls`.
  """
  names, name = sorted(field_types(cls)), path.rpartition(".")[2]
  near = next(iter(difflib.get_close_matches(name, names, n=1)), near)
  keys = f"did you mean '{near}'? The" if near else "the"
  return f"unknown key '{path}' = {value!r}; {keys} keys here are {names}."


def _convert(hint: Any, value: Any, path: str) -> Any:
  """Returns `value` as the type `hint` asks for, or raises a ConfigError that says so."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    if value is None:
      return None
    return _convert(next(a for a in args if a is not type(None)), value, path)
  if isinstance(hint, type) and dataclasses.is_dataclass(hint):
    return build(hint, value, f"{path}.")
  if origin is tuple:
    if isinstance(value, Mapping):
      # Named entries, so that one of them can be overridden: sources.captions.weight.
      value = [_named(args[0], name, entry, path) for name, entry in value.items()]
    if not isinstance(value, list | tuple):
      raise ConfigError(f"{path} is {value!r}; it must be a list.")
    if args[-1] is Ellipsis:
      args = (args[0],) * len(value)
    if len(args) != len(value):
      raise ConfigError(f"{path} is {value!r}; it must have {len(args)} entries.")
    return tuple(
      _convert(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))
    )
  if origin is Literal:
    if value not in args:
      raise ConfigError(f"{path} is {value!r}; it must be one of {list(args)}.")
    return value
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value) if abs(value) < 2**1023 else math.inf  # which no range holds
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise ConfigError(f"{path} is {value!r}; it must be of type {hint.__name__}.")
  return value


def _named(hint: Any, name: str, entry: Any, path: str) -> Any:
  if not dataclasses.is_dataclass(hint):
    return name, entry
  if not isinstance(entry, Mapping):
    raise ConfigError(f"{path}.{name} is {entry!r}; it must be a group of settings.")
  return {"name": name, **entry}
