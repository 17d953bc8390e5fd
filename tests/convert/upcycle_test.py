# SPDX-License-Identifier: Apache-2.0
"""A sparse model begins where the dense one ended, and what does not fit is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from mm1_jax import checkpoint
from mm1_jax.checkpoint import CheckpointError
from mm1_jax.config import CheckpointConfig, MoEConfig, RunConfig
from mm1_jax.convert import ConvertError
from mm1_jax.convert.__main__ import main
from mm1_jax.convert.upcycle import check_upcycling, upcycle_run
from mm1_jax.train.loss import loss_fn
from tests.helpers import tiny


def run_config(moe: MoEConfig | None = None) -> RunConfig:
  """Returns a run of four layers, so that two units of two layers come out."""
  run = tiny.run_config(moe)
  decoder = dataclasses.replace(run.model.decoder, depth=4)
  return dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=decoder))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
  """A dense run at step 7 on disk."""
  path = tmp_path_factory.mktemp("upcycle") / "dense"
  (path.parent / "tokenizer.model").write_bytes(b"any")
  run = run_config()
  data = dataclasses.replace(run.data, tokenizer=str(path.parent / "tokenizer.model"))
  checkpoint.write_run_files(path, dataclasses.replace(run, data=data))
  mesh = tiny.mesh(1)
  model = tiny.make_model(run.model, mesh)
  with jax.set_mesh(mesh), checkpoint.Checkpointer(path, CheckpointConfig()) as checkpointer:
    checkpointer.save(7, params=model, train={"step": np.zeros(())}, data={})
  return path


def token_loss(run: RunConfig, model) -> float:
  """Returns the nats per target of texts, without the router's losses."""
  mesh = tiny.mesh(1)
  batch = tiny.BATCH._replace(images=tiny.BATCH.images[:, :0])
  with jax.set_mesh(mesh):
    losses = tiny.jit(lambda m, b: loss_fn(m, b, run, num_targets=b.loss_mask.sum()).tokens)(
      model, tiny.put(batch, mesh)
    )
  return float(losses.nll.sum() / losses.count.sum())


@pytest.mark.slow
def test_first_loss_is_the_dense_one(dense, tmp_path):
  """Fails if layers are exchanged, gates do not sum to 1, or an expert is no copy."""
  run = run_config(tiny.SPARSE)
  out = tmp_path / "upcycled"
  upcycle_run(dense, run, out, fsdp=2)
  assert checkpoint.find_step(out).name == "7"
  assert checkpoint.read_run(out).model == run.model
  fresh = tiny.make_model(run.model, tiny.mesh(1))
  started = checkpoint.init_from(out, fresh)
  for name, x in checkpoint.to_names(started).items():
    if "units.layers.1.mlp" in name:  # the others' fresh values depend on their names alone
      assert not np.array_equal(x, checkpoint.to_names(fresh)[name]), f"{name} was not taken"
  ours = token_loss(run, started)
  theirs = token_loss(run_config(), tiny.make_model(run_config().model, tiny.mesh(1)))
  assert ours == pytest.approx(theirs, rel=1e-5)
  assert token_loss(run, fresh) != pytest.approx(theirs, rel=1e-3)
  routers = checkpoint.to_names(started)["decoder.units.layers.1.mlp.router"]
  assert np.std(routers) == pytest.approx(32**-0.5, rel=0.2)
  with pytest.raises(CheckpointError, match="is a run already"):
    upcycle_run(dense, run, out)


@pytest.mark.slow
def test_too_little_room_drops_tokens_and_is_told(dense, tmp_path, caplog):
  run = run_config(dataclasses.replace(tiny.SPARSE, capacity_factor=0.5))
  with caplog.at_level("INFO"):
    upcycle_run(dense, run, tmp_path / "bounded", fsdp=1)
  assert "capacity_factor 0.5" in caplog.text
  fresh = tiny.make_model(run.model, tiny.mesh(1))
  started = checkpoint.init_from(tmp_path / "bounded", fresh)
  theirs = token_loss(run_config(), tiny.make_model(run_config().model, tiny.mesh(1)))
  assert token_loss(run, started) != pytest.approx(theirs, rel=1e-4)


def test_what_does_not_fit_is_refused():
  dense, sparse = run_config().model, run_config(tiny.SPARSE).model
  with pytest.raises(ConvertError, match="has experts already"):
    check_upcycling(sparse, sparse)
  with pytest.raises(ConvertError, match="has no experts"):
    check_upcycling(dense, dense)
  decoder = dataclasses.replace(sparse.decoder, mlp_dim=32)
  with pytest.raises(ConvertError, match=r"model\.decoder\.mlp_dim is 24 in the run and 32 in"):
    check_upcycling(dense, dataclasses.replace(sparse, decoder=decoder))
  single = run_config(dataclasses.replace(tiny.SPARSE, top_k=1)).model
  with pytest.raises(ConvertError, match=r"top_k 1 weighs a token's expert with its probability"):
    check_upcycling(dense, single)
  check_upcycling(dense, dataclasses.replace(sparse, dtype="bfloat16", remat="full"))


def test_a_run_to_upcycle_is_needed(tmp_path):
  with pytest.raises(CheckpointError, match="is not a run"):
    main(["upcycle", f"--checkpoint={tmp_path}", "--config=configs/mm1_debug.py:moe", "--out=x"])
