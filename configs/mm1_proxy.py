# SPDX-License-Identifier: Apache-2.0
"""The small models that MM1 fits its learning-rate law on (section 3.3), and MM1.5's 1B.

Their decoders take the law's rate and fit on one chip. Sizes are of the decoder, without its
embedding. ViT and connector start from random weights, unless `train.init_from` names trained ones;
then give their rates the decoder's: `--config.optimizer.vit_learning_rate=None`, and the
connector's.

  python -m mm1_jax.main --config=configs/mm1_proxy.py:85m --workdir=runs/proxy_85m
"""

from ml_collections import ConfigDict

from mm1_jax.configs import common

SIZES = {
  "9m": {"depth": 12, "width": 256, "heads": 4, "kv_heads": 4, "mlp_dim": 640},
  "85m": {"depth": 12, "width": 768, "heads": 12, "kv_heads": 12, "mlp_dim": 2048},
  "302m": {"depth": 24, "width": 1024, "heads": 16, "kv_heads": 16, "mlp_dim": 2816},
  "1b": {"depth": 24, "width": 2048, "heads": 16, "kv_heads": 16, "mlp_dim": 5632},
}


def get_config(size: str = "85m") -> ConfigDict:
  if size not in SIZES:
    raise ValueError(f"mm1_proxy has no size '{size}'; choose one of {list(SIZES)}.")
  config = common.pretrain(f"mm1_proxy_{size}")
  common.decoder(config, **SIZES[size])
  common.encoder_from_random(config)
  # ViT-L/14 at 336 pixels, the encoder of the paper's ablations.
  config.model.vision.update(
    image_size=(336, 336), width=1024, depth=24, num_heads=16, mlp_dim=4096, position_grid=(24, 24)
  )
  return config
