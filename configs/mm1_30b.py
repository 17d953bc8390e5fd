# SPDX-License-Identifier: Apache-2.0
"""MM1-30B: a dense decoder of 29.8B params under ViT-H/14 at 378 pixels.

python -m mm1_jax.main --config=configs/mm1_30b.py --workdir=gs://BUCKET/mm1_30b
"""

from ml_collections import ConfigDict

from mm1_jax.configs import common

SLICES = {
  "v5e-256": common.preset(fsdp=256, steps=2),
  "v5p-512": common.preset(data=2, fsdp=128, remat=common.KEEP_DECODER),
  "v6e-256": common.preset(fsdp=256, steps=2, remat=common.KEEP_ATTENTION),
  "tpu7x-256": common.preset(fsdp=256, steps=2, remat=common.KEEP_PRODUCTS),
}


def get_config(slice_name: str = "") -> ConfigDict:
  config = common.pretrain("mm1_30b")
  common.decoder(config, depth=48, width=7168, heads=56, kv_heads=8, mlp_dim=23040)
  config.optimizer.learning_rate = 2e-5
  config.optimizer.connector_learning_rate = 8e-5
  return common.on_slice(config, SLICES, slice_name)
