# SPDX-License-Identifier: Apache-2.0
"""Held-out loss is the mean over all targets of a source, however its batches are filled."""

import dataclasses

import jax
import numpy as np
import pytest
from mm1_jax.configs.common import SAMPLE

from mm1_jax.config import DataConfig, MoEConfig, RunConfig, SourceConfig, TrainConfig
from mm1_jax.sharding import device_batch
from mm1_jax.train.feed import held_out_batches
from mm1_jax.train.heldout import held_out_loss
from tests.helpers import tiny, tiny_step

pytestmark = pytest.mark.compiles

CAPTIONS = SourceConfig("captions", str(SAMPLE / "captions-heldout-*.arrayrecord"))
TEXT = SourceConfig("text", str(SAMPLE / "text-heldout-*.arrayrecord"))


def run_config(*eval_sources: SourceConfig, moe: MoEConfig | None = None) -> RunConfig:
  run = tiny_step.run_config(moe, train=TrainConfig(eval_batches=2))
  decoder = dataclasses.replace(run.model.decoder, vocab_size=4096)
  data = DataConfig(
    sources=(CAPTIONS,),
    eval_sources=eval_sources,
    tokenizer=str(SAMPLE / "tokenizer.model"),
    seq_len=64,
    batch_size=8,
    images_per_row=2,
  )
  return dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=decoder), data=data)


def test_every_target_counts_once_and_alike():
  run = run_config(CAPTIONS, TEXT)
  mesh = tiny.mesh()
  with jax.set_mesh(mesh):
    model = tiny.make_model(run.model, mesh)
    losses = held_out_loss(model, run, mesh)
    logits = tiny.jit(lambda m, b: m.decoder.logits(m(b).hidden))
    for source in run.data.eval_sources:
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


def test_experts_drop_no_token_in_evaluation():
  """A capacity of one slot a row, which in training drops most choices, changes nothing here."""
  mesh = tiny.mesh()
  tight = dataclasses.replace(tiny.SPARSE, capacity_factor=0.01)
  runs = [run_config(TEXT, moe=moe) for moe in (tiny.SPARSE, tight)]
  with jax.set_mesh(mesh):
    dropless, bounded = (held_out_loss(tiny.make_model(r.model, mesh), r, mesh) for r in runs)
    (batch, *_) = held_out_batches(runs[1], TEXT, mesh)
    trained = tiny.jit(lambda m, b: m(b).moe.dropped)
    dropped = trained(tiny.make_model(runs[1].model, mesh), device_batch(batch, mesh))
  assert float(dropped.max()) > 0.5
  assert bounded == dropless
