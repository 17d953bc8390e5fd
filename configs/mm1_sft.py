# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning of any model of the family; its argument is the pre-training config.

  python -m mm1_jax.main --config=configs/mm1_sft.py:30b_moe --workdir=gs://BUCKET/mm1_30b_moe_sft \
      --config.train.init_from=gs://BUCKET/mm1_30b_moe
"""

from ml_collections import ConfigDict

from configs import common, mm1_3b, mm1_3b_moe, mm1_7b, mm1_7b_moe, mm1_30b, mm1_30b_moe

MODELS = {
  "3b": mm1_3b,
  "7b": mm1_7b,
  "30b": mm1_30b,
  "3b_moe": mm1_3b_moe,
  "7b_moe": mm1_7b_moe,
  "30b_moe": mm1_30b_moe,
}


def get_config(model: str = "3b") -> ConfigDict:
  if model not in MODELS:
    raise ValueError(f"mm1_sft has no model '{model}'; choose one of {list(MODELS)}.")
  return common.sft(MODELS[model].get_config())
