# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes mm1_debug on the sample's conversations.

  python -m mm1_jax.main --config=configs/mm1_debug_sft.py:moe --workdir=runs/debug_moe_sft \
      --config.train.init_from=runs/debug_moe

`:dense,lora` and `:moe,lora` train adapters of the decoder, and the connector.
"""

from ml_collections import ConfigDict

from mm1_jax.configs import common, mm1_debug


def get_config(spec: str = "dense") -> ConfigDict:
  kind, *options = spec.split(",")
  if set(options) - {"lora"}:
    raise ValueError(
      f"mm1_debug_sft is 'dense' or 'moe', with or without ',lora' after it, not '{spec}'."
    )
  config = mm1_debug.get_config(kind)
  data = config.data.copy_and_resolve_references()
  config = common.sft(config, data=str(common.SAMPLE))
  config.data.update(seq_len=data.seq_len, batch_size=data.batch_size)
  config.data.images_per_row = 2
  config.train.update(num_steps=100, eval_every=50)
  if options:
    common.lora(config, rank=8, alpha=16.0)
  config.optimizer.update(learning_rate=1e-3, warmup_steps=10)
  config.checkpoint.every = 50
  return config
