# SPDX-License-Identifier: Apache-2.0
"""MM1-3B: a dense decoder of 2.7B params under ViT-H/14 at 378 pixels.

python -m mm1_jax.main --config=configs/mm1_3b.py --workdir=gs://BUCKET/mm1_3b
"""

from ml_collections import ConfigDict

from mm1_jax.configs import common

SLICES = {
  "v5e-256": common.preset(fsdp=256, steps=2, remat=common.KEEP_ATTENTION),
  "v5p-128": common.preset(fsdp=64, steps=2, remat=common.KEEP_PRODUCTS),
  "v6e-64": common.preset(fsdp=64, steps=8, remat=common.KEEP_PRODUCTS),
  "tpu7x-128": common.preset(fsdp=128, steps=2, remat=common.KEEP_PRODUCTS),
}


def get_config(slice_name: str = "") -> ConfigDict:
  config = common.pretrain("mm1_3b")
  common.decoder(config, depth=26, width=3072, heads=24, kv_heads=8, mlp_dim=8064)
  config.optimizer.learning_rate = 6e-5
  config.optimizer.connector_learning_rate = 8e-5
  return common.on_slice(config, SLICES, slice_name)
