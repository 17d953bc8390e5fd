# SPDX-License-Identifier: Apache-2.0
"""MM1-7B: a dense decoder of 6.7B params under ViT-H/14 at 378 pixels.

python -m mm1_jax.main --config=configs/mm1_7b.py --workdir=gs://BUCKET/mm1_7b
"""

from ml_collections import ConfigDict

from mm1_jax.configs import common

SLICES = {
  "v5e-256": common.preset(fsdp=256, steps=2),
  "v5p-256": common.preset(fsdp=128, steps=1, remat=common.KEEP_DECODER),
  "v6e-256": common.preset(fsdp=256, steps=2, remat=common.KEEP_PRODUCTS),
  "tpu7x-256": common.preset(fsdp=256, steps=1, remat=common.KEEP_PRODUCTS),
}


def get_config(slice_name: str = "") -> ConfigDict:
  config = common.pretrain("mm1_7b")
  common.decoder(config, depth=32, width=4096, heads=32, kv_heads=8, mlp_dim=13056)
  config.optimizer.learning_rate = 4e-5
  config.optimizer.connector_learning_rate = 8e-5
  return common.on_slice(config, SLICES, slice_name)
