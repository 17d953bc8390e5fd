# SPDX-License-Identifier: Apache-2.0
"""Held-out loss is the mean over all targets of a source, however its batches are filled."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
import tiny_step

from configs.common import SAMPLE
from mm1_jax.config import DataConfig, SourceConfig, TrainConfig
from mm1_jax.sharding import device_batch
from mm1_jax.train.feed import held_out_batches
from mm1_jax.train.heldout import held_out_loss

CAPTIONS = SourceConfig("captions", str(SAMPLE / "captions-heldout-*.arrayrecord"))
TEXT = SourceConfig("text", str(SAMPLE / "text-heldout-*.arrayrecord"))


def test_every_target_counts_once_and_alike():
  run = tiny_step.run_config(train=TrainConfig(eval_batches=2))
  decoder = dataclasses.replace(run.model.decoder, vocab_size=4096)
  data = DataConfig(
    sources=(CAPTIONS,),
    eval_sources=(CAPTIONS, TEXT),
    tokenizer=str(SAMPLE / "tokenizer.model"),
    seq_len=64,
    batch_size=8,
    images_per_row=2,
  )
  model_config = dataclasses.replace(run.model, decoder=decoder)
  run = dataclasses.replace(run, model=model_config, data=data)
  mesh = tiny.mesh()
  with jax.set_mesh(mesh):
    model = tiny.make_model(run.model, mesh)
    losses = held_out_loss(model, run, mesh)
    logits = tiny.jit(lambda m, b: m.decoder.logits(m(b).hidden))
    for source in data.eval_sources:
      total, count = 0.0, 0.0
      for batch in held_out_batches(run, source, mesh):
        x = np.asarray(logits(model, device_batch(batch, mesh)), np.float64)
        nll = (
          np.log(np.exp(x).sum(-1)) - np.take_along_axis(x, batch.targets[..., None], -1)[..., 0]
        )
        total += (nll * batch.loss_mask).sum()
        count += batch.loss_mask.sum()
      assert count > 0
      assert losses.pop(f"eval/loss/{source.name}") == pytest.approx(total / count, rel=1e-5)
  assert not losses
