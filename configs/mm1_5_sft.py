# SPDX-License-Identifier: Apache-2.0
r"""MM1.5's fine-tuning (arXiv 2409.20566): 80% one picture, 10% several, 10% text; dynamic splits.

  python -m mm1_jax.main --config=configs/mm1_5_sft.py:3b --workdir=gs://BUCKET/mm1_5_3b_sft \
      --config.train.init_from=gs://BUCKET/mm1_3b

23k steps of 256 rows, Adafactor at 2e-5. A picture is cut into 4 to 9 sub-images of 672 pixels and
an overview after them, marked by their places; in conversations of more than two pictures none is
cut. The paper does not say how long its rows are: 4096 positions hold two pictures.
"""

from ml_collections import ConfigDict

from mm1_jax.configs import common, mm1_sft


def get_config(model: str = "3b") -> ConfigDict:
  if model not in mm1_sft.MODELS:
    raise ValueError(f"mm1_5_sft has no model '{model}'; choose one of {list(mm1_sft.MODELS)}.")
  config = common.sft(mm1_sft.MODELS[model].get_config())
  config.name = f"mm1_5_{model}_sft"
  config.data.sources = common.mixture("data", common.MM1_5_SFT)
  # One held-out file for each group.
  groups = dict.fromkeys(("single", "multi", "text"), 1.0)
  config.data.eval_sources = common.mixture("data", groups, part="heldout")
  common.high_resolution(config, marks="index")
  config.data.update(seq_len=4096, images_per_row=20)
  config.train.num_steps = 23_000
  config.optimizer.learning_rate = 2e-5
  return config
