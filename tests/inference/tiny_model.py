# SPDX-License-Identifier: Apache-2.0
"""A model of width 32 with random params, and runs of it on disk as training writes them."""

import pathlib

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

import mm1_jax.data
from mm1_jax import checkpoint
from mm1_jax.config import (
  MESH_AXES,
  ConnectorConfig,
  DataConfig,
  DecoderConfig,
  ModelConfig,
  MoEConfig,
  RunConfig,
  VisionConfig,
)
from mm1_jax.models.mm1 import MM1

TOKENIZER = pathlib.Path(mm1_jax.data.__file__).parent / "sample" / "tokenizer.model"
TOKENS_PER_IMAGE = 4
SEQ_LEN = 192


def run_config(*, moe: bool = False, num_kv_heads: int = 2) -> RunConfig:
  """Returns a tiny run; its vocabulary is larger than the tokenizer's 4096."""
  decoder = DecoderConfig(
    vocab_size=4160,
    width=32,
    depth=2,
    num_heads=4,
    num_kv_heads=num_kv_heads,
    head_dim=8,
    mlp_dim=64,
    tie_embeddings=False,
    # The full forward that the cache is compared with must not drop tokens either.
    moe=MoEConfig(num_experts=4, every=2, capacity_factor=None) if moe else None,
  )
  vision = VisionConfig(
    image_size=(16, 16),
    patch_size=4,
    width=32,
    depth=1,
    num_heads=2,
    mlp_dim=64,
    position_grid=(4, 4),
  )
  connector = ConnectorConfig("average_pool", token_grid=(2, 2))  # quick to compile
  return RunConfig(
    name="tiny",
    model=ModelConfig(vision, connector, decoder, dtype="float32", remat="none"),
    data=DataConfig(tokenizer=str(TOKENIZER), seq_len=SEQ_LEN, batch_size=8, images_per_row=2),
  )


def one_device() -> Mesh:
  return jax.make_mesh(
    (1,) * 5, MESH_AXES, axis_types=(AxisType.Explicit,) * 5, devices=jax.devices()[:1]
  )


def make_params(run: RunConfig) -> MM1:
  """Returns random params on one device; large ones, so that logits differ from token to token."""
  options = {"xla_backend_optimization_level": 0}
  with jax.set_mesh(one_device()):
    model = jax.jit(lambda: MM1(jax.random.key(0), run.model), compiler_options=options)()
    return jax.tree.map(lambda x: 1.5 * x, model)


def save_run(workdir: pathlib.Path, run: RunConfig, params: MM1, steps: tuple[int, ...]) -> None:
  """Writes a run's files and checkpoints; of an earlier step than the last, negated params."""
  checkpoint.write_run_files(workdir, run)
  with checkpoint.Checkpointer(workdir, run.checkpoint) as checkpointer:
    for step in steps:
      saved = params if step == steps[-1] else jax.tree.map(lambda x: -x, params)
      checkpointer.save(step, params=saved, train={"step": np.array(step)}, data={})
    checkpointer.wait()
