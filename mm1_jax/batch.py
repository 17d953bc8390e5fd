# SPDX-License-Identifier: Apache-2.0
"""`Batch`: the one contract between data, model, loss and evaluation.

Letters: B rows, S positions, N image slots a row, H and W pixels. Numpy on the host, jax.Array on
the mesh; a NamedTuple, so a pytree without importing JAX (data workers never do).
"""

from typing import Any, NamedTuple


class Batch(NamedTuple):
  """Packed rows. Everything at a padding position or in a padding slot must change nothing."""

  tokens: Any  # int32[B, S], inputs; the `<image>` id at each position an image token takes
  targets: Any  # int32[B, S], the next token
  loss_mask: Any  # float32[B, S], 0 on padding, on `<image>` targets, and on prompts (SFT)
  positions: Any  # int32[B, S], from 0 in each packed example
  segment_ids: Any  # int32[B, S], 1, 2, ... by packed example, 0 is padding
  source_ids: Any  # int32[B, S], index into `data.leaves`; 0 at padding, where loss_mask is 0
  images: Any  # uint8[B, N, H, W, 3], in order of appearance in the row
  image_mask: Any  # bool[B, N], which slots hold a picture
