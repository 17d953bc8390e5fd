# SPDX-License-Identifier: Apache-2.0
"""The tiny model with the sample's vocabulary, and runs of it on disk as training writes them."""

import dataclasses
import pathlib

import jax
import numpy as np

from mm1_jax import checkpoint
from mm1_jax.config import DataConfig, RunConfig
from mm1_jax.models.mm1 import MM1
from tests.helpers import tiny
from tests.helpers.records import TOKENIZER

TOKENS_PER_IMAGE = 4
SEQ_LEN = 192


def run_config(*, moe: bool = False, num_kv_heads: int = 2) -> RunConfig:
  """Returns a run of the tiny model with square pictures.

  Its vocabulary is larger than the tokenizer's 4096.
  """
  # The full forward that the cache is compared with must not drop tokens either.
  model = tiny.model_config(tiny.SPARSE if moe else None)
  vision = dataclasses.replace(model.vision, image_size=(16, 16), position_grid=(4, 4))
  connector = dataclasses.replace(tiny.POOLED, token_grid=(2, 2))
  decoder = dataclasses.replace(
    model.decoder, vocab_size=4160, num_kv_heads=num_kv_heads, tie_embeddings=False
  )
  return RunConfig(
    name="tiny",
    model=dataclasses.replace(model, vision=vision, connector=connector, decoder=decoder),
    data=DataConfig(tokenizer=str(TOKENIZER), seq_len=SEQ_LEN, batch_size=8, images_per_row=2),
  )


def make_params(run: RunConfig) -> MM1:
  """Returns random params on one device; large ones, so that logits differ from token to token."""
  options = {"xla_backend_optimization_level": 0}
  with jax.set_mesh(tiny.mesh()):
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
