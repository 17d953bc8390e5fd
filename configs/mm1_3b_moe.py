# SPDX-License-Identifier: Apache-2.0
"""MM1-3B-MoE: MM1-3B with 64 experts in every 2nd layer, two of them active; 63.6B params in all.

python -m mm1_jax.main --config=configs/mm1_3b_moe.py --workdir=gs://BUCKET/mm1_3b_moe
"""

from ml_collections import ConfigDict

from configs import common, mm1_3b


def get_config() -> ConfigDict:
  return common.moe(mm1_3b.get_config(), num_experts=64, every=2)
