# SPDX-License-Identifier: Apache-2.0
"""Everything tiny, on the shipped sample: minutes on a laptop's CPU.

python -m mm1_jax.main --config=configs/mm1_debug.py --workdir=runs/debug
python -m mm1_jax.main --config=configs/mm1_debug.py:moe --workdir=runs/debug_moe
"""

from ml_collections import ConfigDict

from mm1_jax.configs import common


def get_config(kind: str = "dense") -> ConfigDict:
  if kind not in ("dense", "moe"):
    raise ValueError(f"mm1_debug is 'dense' or 'moe', not '{kind}'.")
  config = common.pretrain("mm1_debug", data=str(common.SAMPLE))
  config.model.vision.update(
    image_size=(64, 64),
    patch_size=8,
    width=128,
    depth=3,
    num_heads=4,
    mlp_dim=384,
    position_grid=(8, 8),
  )
  config.model.connector.update(token_grid=(4, 4), hidden=96, depth=1)
  common.decoder(config, depth=4, width=128, heads=4, kv_heads=2, mlp_dim=384)
  config.model.decoder.vocab_size = 4096
  # A CPU has no bfloat16 units, and memory is no concern at this size. Few blocks compile as fast
  # unrolled as in a scan, which copies all that the backward pass needs.
  config.model.dtype, config.model.remat, config.model.scan = "float32", "none", False
  config.model.image_group = 8  # half of the sample's slots are empty
  config.data.update(seq_len=256, batch_size=16, images_per_row=3, window_rows=512)
  config.train.update(num_steps=300, eval_every=100, eval_batches=4)
  config.optimizer.warmup_steps = 30
  common.encoder_from_random(config)
  config.checkpoint.update(every=100, keep_period=None)
  if kind == "moe":
    common.moe(config, num_experts=8, every=2)
    config.model.decoder.moe.capacity_factor = 1.25
  return config
