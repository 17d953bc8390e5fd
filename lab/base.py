# SPDX-License-Identifier: Apache-2.0
"""The model that every contrast of the lab starts from: about a million params, 32 pixels.

The decoder is dense and has two layers.
"""

from collections.abc import Iterable

from lab.documents import TOKENIZER
from mm1_jax.config import RunConfig
from mm1_jax.configs import common
from mm1_jax.overrides import Override, merge

POSITIONS = 128  # of a row
SLOTS = 12  # pictures of a row
ROWS = 6  # of a batch


def config(num_steps: int, overrides: Iterable[Override] = ()) -> RunConfig:
  """Returns a run of the lab's model; `overrides` are as on the command line.

  Raises:
    ConfigError: an override that does not exist, or settings that do not fit together.
  """
  base = common.base("lab")
  base.model.vision.update(
    image_size=(32, 32),
    patch_size=8,
    width=96,
    depth=3,
    num_heads=3,
    mlp_dim=288,
    position_grid=(4, 4),
  )
  base.model.connector.update(token_grid=(2, 2), hidden=96, depth=1, num_heads=3)
  common.decoder(base, depth=2, width=128, heads=4, kv_heads=4, mlp_dim=192)
  base.model.decoder.update(vocab_size=1024, rope_theta=100.0, qkv_bias=True)
  base.model.update(dtype="float32", remat="none", scan=False)
  base.data.tokenizer = TOKENIZER
  base.data.update(seq_len=POSITIONS, batch_size=ROWS, images_per_row=SLOTS)
  base.data.image_delimiters = False
  # One rate for all parts: at MM1's law, which is for decoders beside a trained encoder, pictures
  # would not be read (`python -m bench.train.encoder_rates`).
  base.optimizer.update(learning_rate=6e-4, warmup_steps=50)
  base.train.num_steps = num_steps
  base.checkpoint.every = 10**6  # the lab saves by the clock
  return RunConfig.from_dict(merge(base.to_dict(), overrides))
