# SPDX-License-Identifier: Apache-2.0
"""MM1-7B-MoE: MM1-7B with 32 experts in every 4th layer, two of them active; 46.4B params in all.

python -m mm1_jax.main --config=configs/mm1_7b_moe.py --workdir=gs://BUCKET/mm1_7b_moe
"""

from ml_collections import ConfigDict

from configs import common, mm1_7b


def get_config() -> ConfigDict:
  return common.moe(mm1_7b.get_config(), num_experts=32, every=4)
