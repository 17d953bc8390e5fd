# SPDX-License-Identifier: Apache-2.0
"""Shows the packed stream as it is trained on, or the records of one source.

`draw_stream` and `draw_source` write a page, a picture and the figures as JSON, and return a
`Drawing`, which a notebook shows as it is. The command is `python -m mm1_jax.data.inspect`.
"""

from typing import Any

from mm1_jax import extras

_DRAW = ("Drawing", "draw_source", "draw_stream")


def __getattr__(name: str) -> Any:
  """Imports what draws when it is first asked for: the command's --help needs none of it."""
  if name not in _DRAW:
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
  extras.require("draw")
  from mm1_jax.data.inspect import draw

  return getattr(draw, name)
