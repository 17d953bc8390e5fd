# SPDX-License-Identifier: Apache-2.0
"""MM1-30B-MoE: MM1-30B with 16 experts in every 4th layer, two of them active; 119B params in all.

The paper has no 30B MoE: this one continues its family.
  python -m mm1_jax.main --config=configs/mm1_30b_moe.py --workdir=gs://BUCKET/mm1_30b_moe
"""

from ml_collections import ConfigDict

from mm1_jax.configs import common, mm1_30b

SLICES = {
  "v5p-512": common.preset(fsdp=32, expert=8, steps=2, remat=common.KEEP_EXPERTS),
  "v6e-256": common.preset(fsdp=16, expert=16, steps=2),
  "tpu7x-512": common.preset(data=2, fsdp=16, expert=16, remat=common.KEEP_ATTENTION),
}


def get_config(slice_name: str = "") -> ConfigDict:
  return common.on_slice(
    common.moe(mm1_30b.get_config(), num_experts=16, every=4), SLICES, slice_name
  )
