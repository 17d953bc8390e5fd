# SPDX-License-Identifier: Apache-2.0
"""Open weights in, trained params out; `python -m mm1_jax.convert --help`."""

from mm1_jax.config import UserError

# Of an export; each has its module in `export.exporter`.
FORMATS = ("safetensors", "huggingface", "llava", "stablehlo", "orbax")


class ConvertError(UserError):
  """Weights that cannot be read or written; the message names the tensor, file or setting."""
