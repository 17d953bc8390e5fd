# SPDX-License-Identifier: Apache-2.0
"""MM1-30B: a dense decoder of 29.8B params under ViT-H/14 at 378 pixels.

python -m mm1_jax.main --config=configs/mm1_30b.py --workdir=gs://BUCKET/mm1_30b
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
  config = common.pretrain("mm1_30b")
  common.decoder(config, depth=48, width=7168, heads=56, kv_heads=8, mlp_dim=23040)
  config.optimizer.learning_rate = 2e-5
  config.optimizer.connector_learning_rate = 8e-5
  return config
