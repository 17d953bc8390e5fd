# SPDX-License-Identifier: Apache-2.0
"""What contrasts start from, as MM1's: decoders that have read, encoders that have seen captions.

Findings share them: each is trained once a seed.
"""

from collections.abc import Mapping

from lab.documents import Named, Prose
from lab.runs import Run

NO_PICTURES = {"data.images_per_row": "0", "optimizer.learning_rate": "2e-3"}
ONE_TOKEN = {"model.connector.token_grid": "(1,1)", "data.images_per_row": "18"}  # a picture


def text() -> Run:
  """A decoder that has read textbooks."""
  return Run(((1.0, Prose()),), 400, NO_PICTURES)


def captions(config: Mapping[str, str] | None = None, *, part: float = 1.0) -> Run:
  """An encoder, a connector and that decoder, trained on names of pictures of 32 pixels.

  Args:
    config: overrides, for instance of the encoder's shape.
    part: share of the sprites that it sees.
  """
  # The text's run has those of the base shape, untrained.
  fresh = ("vit", "connector") if config else ()
  return Run(((1.0, Named(part=part)),), 900, config or {}, text(), fresh)


def pixels(side: int) -> dict[str, str]:
  """Returns overrides for pictures of so many pixels a side, in patches of 8."""
  grid = side // 8
  return {
    "model.vision.image_size": f"({side},{side})",
    "model.vision.position_grid": f"({grid},{grid})",
  }
