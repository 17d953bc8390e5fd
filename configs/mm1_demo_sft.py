# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes mm1_demo on questions about pictures, with short answers.

  python -m mm1_jax.main --config=configs/mm1_demo_sft.py --workdir=runs/demo/sft \
      --config.train.init_from=runs/demo/pretrain
"""

from ml_collections import ConfigDict

from mm1_jax.configs import common, mm1_demo

# Shares of examples. Captions and documents keep showing more pictures than the questions have.
SETS = {"questions": 0.6, "captions_world": 0.3, "interleaved_world": 0.1}


def get_config(kind: str = "moe") -> ConfigDict:
  config = mm1_demo.get_config(kind)
  sample = str(common.SAMPLE)
  config.name += "_sft"
  config.data.sources = common.mixture(sample, SETS)
  config.data.eval_sources = common.mixture(sample, {"questions": 1.0}, part="heldout")
  config.data.update(weight_by="examples", chat=True, images_per_row=7)
  config.optimizer.learning_rate = 4e-4
  config.train.update(num_steps=3000, eval_every=3000)
  config.checkpoint.update(every=500, keep_period=500)
  return config
