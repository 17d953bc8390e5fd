# SPDX-License-Identifier: Apache-2.0
"""The range of each number in a config; numbers outside make no sense in any run.

A field's type names its range, such as `b1: Annotated[float, Range(at_least=0, below=1)]`, also
inside a tuple or beside None. `outside` compares the fields of an object with their types.
"""

import ctypes
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers between two bounds. NaN and infinity lie in no range.

  Floats are compared in float32, as they are computed with: 1e39 is infinite, 0.99999999 is 1.
  """

  at_least: float = -math.inf
  above: float = -math.inf
  at_most: float = math.inf
  below: float = math.inf
  none: str = ""  # of a field that may be None: what that does

  def holds(self, value: float, kind: type) -> bool:
    """Returns whether a value of a field of type `kind` lies between the bounds."""
    number = _float32 if kind is float else int
    bounds = (self.at_least, self.above, self.at_most, self.below)
    least, above, most, below = (b if math.isinf(b) else number(b) for b in bounds)
    # NaN is neither below nor above infinity.
    return least <= number(value) <= most and above < number(value) < below

  def __str__(self) -> str:
    low = f"({self.above}" if math.isinf(self.at_least) else f"[{self.at_least}"
    high = f"{self.below})" if math.isinf(self.at_most) else f"{self.at_most}]"
    return f"{low}, {high}"


Count = Annotated[int, Range(at_least=1, below=2**31)]  # what devices count in int32
CountOrZero = Annotated[int, Range(at_least=0, below=2**31)]
Seed = Annotated[int, Range(at_least=0, below=2**32)]  # JAX's keys keep the low 32 bits of a seed
Positive = Annotated[float, Range(above=0)]
PositiveOrZero = Annotated[float, Range(at_least=0)]
Fraction = Annotated[float, Range(at_least=0, at_most=1)]
Decay = Annotated[float, Range(at_least=0, below=1)]  # of a running mean
# The gradient of x / sqrt(mean(x^2) + eps) has eps^-1.5 at 0, which must be finite.
NormEps = Annotated[float, Range(at_least=1e-12, below=1)]


def outside(group: Any, where: str) -> Iterator[str]:
  """Yields what is wrong with each number of dataclass `group` that has a range and is not in it.

  Args:
    group: its fields may be numbers, None beside them, and tuples; other values are passed over.
    where: prefix of a field's name in the message, such as "optimizer.".
  """
  for name, hint in _hints(type(group)).items():
    yield from _outside(hint, getattr(group, name), f"{where}{name}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls, include_extras=True)


def _outside(hint: Any, value: Any, path: str, *, optional: bool = False) -> Iterator[str]:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    if value is not None:
      for arg in args:
        yield from _outside(arg, value, path, optional=True)
  elif origin is tuple and isinstance(value, tuple | list):
    args = (args[0],) * len(value) if args[-1] is Ellipsis else args
    named = args[:1] == (str,)  # with a number
    for i, (arg, entry) in enumerate(zip(args, value, strict=False)):
      yield from _outside(arg, entry, f"{path}.{value[0]}" if named else f"{path}[{i}]")
  elif origin is Annotated:
    kind, bounds = args
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
      yield f"{path} is {value!r}; it must be of type {kind.__name__}."
    elif not bounds.holds(value, kind):
      none = f", or be None{bounds.none and f', which {bounds.none}'}" if optional else ""
      yield f"{path} {value} must lie in {bounds}{none}."


def _float32(value: float) -> float:
  try:
    return ctypes.c_float(value).value
  except OverflowError:  # of an int
    return math.inf
