# SPDX-License-Identifier: Apache-2.0
"""Packages that a base install leaves out: which extra has them, and what is said without them."""

import importlib.util

from mm1_jax.config import UserError

# By extra of setup.py: what needs it, and the packages that are imported for that.
EXTRAS = {
  "convert": (
    "converting weights or reading a tokenizer.json",
    ("jinja2", "safetensors", "tokenizers"),
  ),
  "data": ("building shards", ("apache_beam", "pyarrow", "zstandard")),
  "draw": ("drawing", ("matplotlib",)),
  "eval": ("reading Parquet files", ("pyarrow",)),
  "lm-eval": ("lm-evaluation-harness", ("lm_eval",)),
  "lmms-eval": ("lmms-eval", ("lmms_eval",)),
  "quant": ("quantizing", ("qwix",)),
  "serve": ("the web page", ("gradio", "starlette")),
}


def lacking(extra: str) -> str:
  """Returns which packages of an extra are not installed, and how to install them; "" if none."""
  needed_by, packages = EXTRAS[extra]
  missing = [package for package in packages if importlib.util.find_spec(package) is None]
  if not missing:
    return ""
  return f"{needed_by} needs {' and '.join(missing)}: pip install 'mm1_jax[{extra}]'"


def require(extra: str) -> None:
  """Checks that an extra is installed; called before the modules are imported that need it.

  Raises:
    UserError: it is not; the message has the command that installs it.
  """
  if message := lacking(extra):
    raise UserError(f"{message}.")
