# SPDX-License-Identifier: Apache-2.0
r"""Supervised fine-tuning of any model of the family; it begins from a run of pre-training.

  python -m mm1_jax.main --config=configs/mm1_sft.py:30b_moe --workdir=gs://BUCKET/mm1_30b_moe_sft \
      --config.train.init_from=gs://BUCKET/mm1_30b_moe

`:3b` is trained on one source, `sft`; `:3b,mm1` on MM1's mixture of 1.46M conversations;
`high_res`, as in `:3b,high_res` or `:3b,mm1,high_res`, cuts pictures of 1344 x 1344 pixels into 2 x
2 and an overview; `lora` trains adapters of the decoder, and the connector.
"""

from ml_collections import ConfigDict

from mm1_jax.configs import common, mm1_3b, mm1_3b_moe, mm1_7b, mm1_7b_moe, mm1_30b, mm1_30b_moe

MODELS = {
  "3b": mm1_3b,
  "7b": mm1_7b,
  "30b": mm1_30b,
  "3b_moe": mm1_3b_moe,
  "7b_moe": mm1_7b_moe,
  "30b_moe": mm1_30b_moe,
}


def get_config(spec: str = "3b") -> ConfigDict:
  model, *options = spec.split(",")
  if model not in MODELS or set(options) - {"mm1", "high_res", "lora"}:
    raise ValueError(
      f"mm1_sft has no '{spec}'; choose one of {list(MODELS)}, with ',mm1', ',high_res' or ',lora' "
      "after it."
    )
  config = common.sft(MODELS[model].get_config())
  if "mm1" in options:
    config.data.sources = common.mixture("data", common.MM1_SFT)
    config.data.eval_sources = common.mixture(
      "data", dict.fromkeys(common.MM1_SFT, 1.0), part="heldout"
    )
  if "high_res" in options:
    common.high_resolution(config, grid=(2, 2), overview="first")
    config.data.images_per_row = 12  # two pictures of five sub-images, and a little more
  return common.lora(config) if "lora" in options else config
