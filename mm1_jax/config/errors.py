# SPDX-License-Identifier: Apache-2.0
"""What a user can mend, as one kind of exception."""


class UserError(ValueError):
  """What a user can mend; the message says what is wrong and what to do."""


class ConfigError(UserError):
  """A mistake in a config; the message names the key, its value and what would fit."""
