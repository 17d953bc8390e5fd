# SPDX-License-Identifier: Apache-2.0
"""Runs of tiny models that between them have all that an export must express.

Params are NumPy's, the same on every machine, so that goldens can be of them.
"""

import dataclasses
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mm1_jax import checkpoint
from mm1_jax.config import (
  ConnectorConfig,
  DataConfig,
  DecoderConfig,
  ModelConfig,
  MoEConfig,
  RopeScaling,
  RunConfig,
  SourceConfig,
  TilingConfig,
  VisionConfig,
)
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import abstract_state
from tests.helpers import tiny
from tests.helpers.records import SAMPLE, TOKENIZER

STEP = 7
VISION = VisionConfig(
  image_size=(24, 32),
  patch_size=4,
  width=16,
  depth=3,
  num_heads=2,
  mlp_dim=24,
  position_grid=(5, 7),
  feature_layer=-2,
)
DECODER = DecoderConfig(
  vocab_size=4160,
  width=16,
  depth=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=24,
  rope_scaling=RopeScaling(original_positions=64),
  qk_norm=True,
)
# Name: model, and what differs in how pictures and turns are read.
MODELS = {
  # Sparse, a C-Abstractor on another grid than the positions', chosen grids, a border.
  "moe": (
    ModelConfig(
      VISION,
      ConnectorConfig(token_grid=(4, 5), hidden=12, depth=1),
      dataclasses.replace(
        DECODER,
        depth=4,
        tie_embeddings=False,
        moe=MoEConfig(num_experts=3, every=2, capacity_factor=None),
      ),
      dtype="float32",
      remat="none",
    ),
    {"tiling": TilingConfig(min_tiles=2, max_tiles=4, marks="index"), "image_fit": "pad"},
  ),
  # Dense with tied embeddings, SigLIP's kind of encoder, biases, a fixed grid, no bos.
  "dense": (
    ModelConfig(
      dataclasses.replace(
        VISION, class_token=False, pre_norm=False, activation="gelu_tanh", position_grid=(6, 8)
      ),
      ConnectorConfig("attention_pool", token_grid=(2, 3), hidden=12, num_heads=2),
      dataclasses.replace(DECODER, qk_norm=False, qkv_bias=True, rope_scaling=None),
      dtype="float32",
      remat="none",
    ),
    {
      "tiling": TilingConfig(grid=(2, 1), overview="first", marks="separators"),
      "chat_template": "vicuna",
    },
  ),
}


# Exactly LLaVA: CLIP's encoder, two layers, Llama.
LLAVA = ModelConfig(
  dataclasses.replace(VISION, image_size=(24, 24), position_grid=(6, 6), feature_layer=-1),
  ConnectorConfig("mlp", token_grid=(6, 6)),
  dataclasses.replace(DECODER, qk_norm=False),
  dtype="float32",
  remat="none",
)
MODELS["llava"] = LLAVA, {}

# One key-value head, which LLaVA's Llama may have; and one expert a token beside it.
ONE_KV_HEAD = dataclasses.replace(LLAVA.decoder, num_kv_heads=1)
MODELS["llava_one_kv_head"] = dataclasses.replace(LLAVA, decoder=ONE_KV_HEAD), {}
SWITCH = dataclasses.replace(
  ONE_KV_HEAD, moe=MoEConfig(num_experts=3, every=2, top_k=1, capacity_factor=None)
)
MODELS["switch"] = dataclasses.replace(LLAVA, decoder=SWITCH), {}


def run_config(name: str = "moe") -> RunConfig:
  model, reading = MODELS[name]
  sources = (SourceConfig("captions", str(SAMPLE / "captions-train-*")),)
  data = DataConfig(
    sources=sources,
    tokenizer=str(TOKENIZER),
    seq_len=512,
    batch_size=8,
    images_per_row=10,
    chat=True,
    **reading,
  )
  return RunConfig(name=f"small_{name}", model=model, data=data)


def make_params(run: RunConfig) -> dict[str, np.ndarray]:
  """Returns params by name, large enough that logits differ from token to token."""
  model = abstract_state(lambda: MM1(jax.random.key(0), run.model), tiny.mesh())
  params = {}
  for name, x in checkpoint.to_names(model).items():
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    noise, last = rng.standard_normal(x.shape, np.float32), name.split(".")[-1]
    if last == "scale":
      params[name] = 1 + 0.1 * noise
    elif x.ndim < 2 or "bias" in last:
      params[name] = 0.3 * noise
    else:
      params[name] = 0.4 * noise
  return params


def save_run(workdir: pathlib.Path, run: RunConfig, params: dict[str, np.ndarray]) -> None:
  """Writes a run as training leaves it: config, tokenizer, a step's params, held-out figures."""
  checkpoint.write_run_files(workdir, run)
  checkpoint.save_params(workdir, STEP, {name: jnp.asarray(x) for name, x in params.items()})
  line = {"step": STEP, "time": 0.0, "values": {"loss": 3.0, "eval/loss/captions": 2.5}}
  (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
