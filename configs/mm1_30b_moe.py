# SPDX-License-Identifier: Apache-2.0
"""MM1-30B-MoE: MM1-30B with 16 experts in every 4th layer, two of them active; 119B params in all.

The paper has no 30B MoE: this one continues its family.
  python -m mm1_jax.main --config=configs/mm1_30b_moe.py --workdir=gs://BUCKET/mm1_30b_moe
"""

from ml_collections import ConfigDict

from configs import common, mm1_30b


def get_config() -> ConfigDict:
  return common.moe(mm1_30b.get_config(), num_experts=16, every=4)
