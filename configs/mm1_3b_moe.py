# SPDX-License-Identifier: Apache-2.0
"""MM1-3B-MoE: MM1-3B with 64 experts in every 2nd layer, two of them active; 63.6B params in all.

python -m mm1_jax.main --config=configs/mm1_3b_moe.py --workdir=gs://BUCKET/mm1_3b_moe
"""

from ml_collections import ConfigDict

from mm1_jax.configs import common, mm1_3b

SLICES = {
  "v5e-256": common.preset(fsdp=16, expert=16, steps=2),
  "v5p-256": common.preset(fsdp=2, expert=64, steps=2, remat=common.KEEP_EXPERTS),
  "v6e-256": common.preset(fsdp=16, expert=16, steps=2, remat=common.KEEP_ATTENTION),
  "tpu7x-256": common.preset(fsdp=16, expert=16, remat=common.KEEP_ATTENTION),
}


def get_config(slice_name: str = "") -> ConfigDict:
  return common.on_slice(
    common.moe(mm1_3b.get_config(), num_experts=64, every=2), SLICES, slice_name
  )
