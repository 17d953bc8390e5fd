# SPDX-License-Identifier: Apache-2.0
r"""MM1.5's continual pre-training (arXiv 2409.20566), between pre-training and fine-tuning.

  python -m mm1_jax.main --config=configs/mm1_5_continual.py:3b --workdir=gs://BUCKET/mm1_5_3b_ocr \
      --config.train.init_from=gs://BUCKET/mm1_3b

30k steps of 256 rows, Adafactor at 1e-5, on documents with much text, each read at 1344 x 1344
pixels: 2 x 2 sub-images of 672 and an overview. As many pages are drawn of each of its four sets:
PDFA, IDL, RenderedText and DocStruct-4M, 45M pages in all. The paper does not say how long its rows
are: 4096 positions hold four pages of 730 and about 1,200 tokens of text.
"""

from ml_collections import ConfigDict

from mm1_jax.configs import common, mm1_sft

SETS = dict.fromkeys(("pdfa", "idl", "renderedtext", "docstruct"), 1.0)


def get_config(model: str = "3b") -> ConfigDict:
  if model not in mm1_sft.MODELS:
    raise ValueError(
      f"mm1_5_continual has no model '{model}'; choose one of {list(mm1_sft.MODELS)}."
    )
  config = mm1_sft.MODELS[model].get_config()
  config.name = f"mm1_5_{model}_continual"
  common.high_resolution(config, grid=(2, 2), overview="first")
  config.data.sources = common.mixture("data", SETS)
  config.data.eval_sources = common.mixture("data", SETS, part="heldout")
  config.data.update(batch_size=256, images_per_row=20, weight_by="examples")
  config.train.num_steps = 30_000
  common.adafactor(config, learning_rate=1e-5)
  return config
