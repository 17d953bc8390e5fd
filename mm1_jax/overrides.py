# SPDX-License-Identifier: Apache-2.0
"""Overrides of a config, such as `model.decoder.moe.capacity_factor=None`.

A text is parsed by the type of its field in the dataclasses of `config/`. Overrides are put into
the plain values that a config file returned; `RunConfig.from_dict` then builds and checks the run.
"""

import ast
import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from mm1_jax.config import ConfigError, RunConfig, field_types, unknown_key

Override = tuple[str, str]  # a key, such as "train.num_steps", and the text of its value

_BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def merge(values: Mapping[str, Any], overrides: Iterable[Override]) -> dict[str, Any]:
  """Returns a config's plain values with overrides put in, the last of equal keys.

  The keys of a group that is None make it, at its defaults; so do those of a new entry of
  `eval_tasks`. An entry of a list is named by its name
  (`data.sources.captions.weight`), or by its number where it has none (`data.reweight.0.step`).

  Raises:
    ConfigError: a key that does not exist; the message names those of its group.
  """
  for key, text in overrides:
    values = _put(RunConfig, values, key.split("."), text, "")
  return dict(values)


def is_switch(key: str) -> bool:
  """Returns whether a key's field is a bool, which a flag without a value sets to True."""
  return dict(_paths(RunConfig)).get(key) is bool


def _put(
  cls: type, values: Mapping[str, Any], keys: list[str], text: str, at: str
) -> dict[str, Any]:
  """Returns the values of group `cls`, whose path is `at`, with one of them or in them set."""
  key, *rest = keys
  hints = field_types(cls)
  if key not in hints:
    whole = ".".join([f"{at}{key}", *rest])
    near = difflib.get_close_matches(whole, dict(_paths(RunConfig)), n=1, cutoff=0.7)
    raise ConfigError(unknown_key(cls, f"{at}{key}", text, near[0] if near else None))
  hint, where = hints[key], f"{at}{key}"
  if not rest:
    return {**values, key: _parse(hint, text)}
  return {**values, key: _put_inside(_present(hint), values.get(key), rest, text, where)}


def _put_inside(hint: Any, value: Any, keys: list[str], text: str, where: str) -> Any:
  """Returns `value`, of the field `where` of type `hint`, with a value in it set."""
  if dataclasses.is_dataclass(hint) and (value is None or isinstance(value, Mapping)):
    return _put(typing.cast(type, hint), value or {}, keys, text, f"{where}.")
  entry = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
  if dataclasses.is_dataclass(entry) or typing.get_origin(entry) is tuple:
    return _put_in_list(entry, value, keys, text, where)
  raise ConfigError(
    f"'{where}.{'.'.join(keys)}' is no key: {where} is a single value; set it whole, "
    f"--config.{where}=..."
  )


def _put_in_list(entry: Any, value: Any, keys: list[str], text: str, where: str) -> Any:
  """Returns a list of groups, or of (name, number), with a value in one of them set."""
  name, *rest = keys
  pairs = not dataclasses.is_dataclass(entry)
  if isinstance(value, Mapping) or pairs:
    named = dict(value or ())
  else:
    named = {_name(one, i): one for i, one in enumerate(value or ())}
  if name not in named and getattr(entry, "made_by_name", False):
    named = {**named, name: {} if isinstance(value, Mapping) else {"name": name}}
  if name not in named:
    near = difflib.get_close_matches(name, named, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise ConfigError(f"{where} has no '{name}'; {hint}It has {list(named)}.")
  if pairs:
    if rest:
      raise ConfigError(f"'{where}.{'.'.join(keys)}' is no key: {where}.{name} is a number.")
    named[name] = _parse(typing.get_args(entry)[1], text)
  elif rest:
    named[name] = _put_inside(entry, named[name], rest, text, f"{where}.{name}")
  else:
    named[name] = _parse(entry, text)
  return named if isinstance(value, Mapping) or pairs else list(named.values())


def _name(entry: Any, number: int) -> str:
  return entry.get("name", str(number)) if isinstance(entry, Mapping) else str(number)


def _parse(hint: Any, text: str) -> Any:
  """Returns the value of a text for a field of type `hint`.

  What is of another type is returned as it is: `RunConfig.from_dict` says what the field wants.
  """
  hint = _present(hint)
  if text == "None":
    return None
  if hint is bool:
    return _BOOLS.get(text.lower(), text)
  if hint in (int, float):
    try:
      return hint(text)
    except ValueError:
      return text
  if typing.get_origin(hint) is tuple:
    return _parse_list(typing.get_args(hint), text)
  if dataclasses.is_dataclass(hint):
    return _literal(text)
  if typing.get_origin(hint) is Literal:
    return next((arg for arg in typing.get_args(hint) if str(arg) == text), text)
  return text


def _parse_list(args: tuple[Any, ...], text: str) -> Any:
  """Returns the entries of `(1, 2)`, `[1, 2]`, `1,2`, `vit,connector`, or what a dict names."""
  value = _literal(text)
  if isinstance(value, tuple | list | Mapping):
    return value
  items = [item.strip(" \"'") for item in text.strip("()[] ").split(",")]
  return tuple(_parse(args[0], item) for item in items if item)


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return text


def _present(hint: Any) -> Any:
  """Returns a field's type without None."""
  if typing.get_origin(hint) in (types.UnionType, typing.Union):
    return next(arg for arg in typing.get_args(hint) if arg is not type(None))
  return hint


@functools.cache
def _paths(cls: type, at: str = "") -> tuple[tuple[str, Any], ...]:
  """Returns the paths and types of all fields, those of entries of lists aside."""
  return tuple(_walk(cls, at))


def _walk(cls: type, at: str) -> Iterator[tuple[str, Any]]:
  for name, hint in field_types(cls).items():
    group = _present(hint)
    if dataclasses.is_dataclass(group):
      yield from _paths(typing.cast(type, group), f"{at}{name}.")
    else:
      yield f"{at}{name}", group
