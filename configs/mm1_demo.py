# SPDX-License-Identifier: Apache-2.0
"""A small model that learns to see in minutes: digits, inks, kinds of things. `make run` trains it.

  python -m mm1_jax.main --config=configs/mm1_demo.py --workdir=runs/demo/pretrain

MM1's mixture, of the sample's small world for the most part; `:dense` is without experts.
`mm1_demo_sft.py` then teaches the model to answer questions.
"""

from ml_collections import ConfigDict

from mm1_jax.configs import common

WORLD = 0.85  # of captions and of documents; the rest are the sample's photographs and textbooks


def get_config(kind: str = "moe") -> ConfigDict:
  if kind not in ("dense", "moe"):
    raise ValueError(f"mm1_demo is 'dense' or 'moe', not '{kind}'.")
  sample = str(common.SAMPLE)
  config = common.pretrain("mm1_demo", data=sample)
  shares = {"world": WORLD, "sample": 1 - WORLD}
  weights = {"captions": (0.45, shares), "interleaved": (0.45, shares), "text": 0.10}
  config.data.sources = common.mixture(sample, weights)
  for name in ("captions", "interleaved"):
    path = f"{sample}/{name}-train-*.arrayrecord"
    config.data.sources[name].sources.sample.path = path
  config.model.vision.update(
    image_size=(32, 32),
    patch_size=8,
    width=128,
    depth=3,
    num_heads=4,
    mlp_dim=384,
    position_grid=(4, 4),
  )
  config.model.connector.update(token_grid=(2, 2), hidden=96, depth=1)
  # A small decoder, and few ids for the head to score: most of a step's time goes to the pictures.
  common.decoder(config, depth=2, width=128, heads=4, kv_heads=2, mlp_dim=192)
  config.data.tokenizer = f"{sample}/tokenizer_1024.model"
  config.model.decoder.vocab_size = 1024
  config.model.dtype, config.model.remat, config.model.scan = "float32", "none", False
  config.data.update(seq_len=128, batch_size=6, images_per_row=8, window_rows=512)
  config.train.update(num_steps=2300, eval_every=2300, eval_batches=4, log_every=50)
  # One rate for all parts: at the decoder's own, MM1's law, the pictures would not be read; see
  # `python -m bench.train.encoder_rates`.
  config.optimizer.update(learning_rate=4e-4, warmup_steps=50)
  config.checkpoint.update(every=500, keep_period=500)
  if kind == "moe":
    common.moe(config, num_experts=8, every=2)
    config.model.decoder.moe.capacity_factor = 1.25
  return config
