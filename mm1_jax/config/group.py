# SPDX-License-Identifier: Apache-2.0
"""The base of all groups of settings."""

from typing import ClassVar

from mm1_jax import ranges
from mm1_jax.config.errors import ConfigError


class Group:
  """Settings that belong together, checked however they are made: by number, then `_check`."""

  made_by_name: ClassVar[bool] = False  # an override of a new name makes an entry of a list
  _where: str  # prefix of a field's name in messages; names fields in braces

  def __init_subclass__(cls, *, where: str):
    cls._where = where

  def __post_init__(self):
    for message in ranges.outside(self, self._where.format(**vars(self))):
      raise ConfigError(message)
    self._check()

  def _check(self) -> None:
    """Raises a ConfigError if fields do not fit together."""


def require(condition: bool, message: str) -> None:
  """Raises a ConfigError with this message where the condition does not hold."""
  if not condition:
    raise ConfigError(message)
