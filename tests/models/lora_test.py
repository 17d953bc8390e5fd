# SPDX-License-Identifier: Apache-2.0
"""Adapters: the sum of W and their product, which params they train, and that nothing is lost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm1_jax import checkpoint
from mm1_jax.checkpoint import CheckpointError, to_names
from mm1_jax.config import CheckpointConfig, ConfigError, LoRAConfig, RunConfig
from mm1_jax.convert.merge_lora import merge, merge_run
from mm1_jax.models.decoder import Decoder
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import abstract_state
from mm1_jax.train.loss import loss_fn
from mm1_jax.train.optimizer import split_frozen
from mm1_jax.train.step import init_state
from tests.helpers import tiny

pytestmark = pytest.mark.compiles

LORA = LoRAConfig(rank=3, alpha=5.0)
ONE = (1, 1, 1, 1)


def with_lora(lora: LoRAConfig | None = LORA) -> RunConfig:
  """Returns a run of a dense and a sparse layer."""
  run = tiny.run_config(tiny.SPARSE)
  decoder = dataclasses.replace(run.model.decoder, lora=lora)
  return dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=decoder))


@functools.cache
def adapted() -> MM1:
  """Returns a model with adapters far from zero."""
  return tiny.make_model(with_lora().model, tiny.mesh(*ONE))


def summed() -> MM1:
  """Returns the model of W + alpha / rank * A B, written out in float64 with numpy."""
  names = {name: np.asarray(x, np.float64) for name, x in to_names(adapted()).items()}
  products = {  # U units, E experts; D width, H heads, K dims of a head, F mlp, r rank
    "query": "udr,urhk->udhk",
    "key": "udr,urhk->udhk",
    "value": "udr,urhk->udhk",
    "out": "uhkr,urd->uhkd",
  }
  for layer, mlp in ((0, "uir,uro->uio"), (1, "ueir,uero->ueio")):
    for name in LORA.matrices:
      where = f"decoder.units.layers.{layer}"
      a, b = (names.pop(f"{where}.lora.{name}.{side}") for side in "ab")
      part = "attention" if name in products else "mlp"
      assert np.any(a)
      assert np.any(b)
      names[f"{where}.{part}.{name}"] += 5 / 3 * np.einsum(products.get(name, mlp), a, b)
  assert not any("lora" in name for name in names)
  mesh = tiny.mesh(*ONE)
  return tiny.place(
    lambda: MM1(jax.random.key(0), with_lora(None).model), mesh, lambda name, _: names[name]
  )


@functools.cache
def results(on: tuple[int, ...]):
  """Returns loss and gradient of the model with adapters on a mesh."""
  mesh = tiny.mesh(*on)
  model = tiny.make_model(with_lora().model, mesh)
  with jax.set_mesh(mesh):
    return tiny.loss_and_gradients(with_lora())(model, tiny.put(tiny.BATCH, mesh))


@functools.cache
def loss_of(run: RunConfig):
  """Returns the compiled function from model and batch to the loss alone."""
  return tiny.jit(
    lambda model, batch: loss_fn(model, batch, run, num_targets=jnp.sum(batch.loss_mask)).total
  )


def test_applied_is_merged_is_the_sum():
  mesh = tiny.mesh(*ONE)
  with jax.set_mesh(mesh):
    merged = tiny.jit(merge)(adapted())
    batch = tiny.put(tiny.BATCH, mesh)
    loss = loss_of(with_lora())(adapted(), batch)
    expected = loss_of(with_lora(None))(summed(), batch)
    plain = loss_of(with_lora(None))(tiny.make_model(with_lora(None).model, mesh), batch)
  for name, x in to_names(summed()).items():
    assert tiny.largest_difference(to_names(merged)[name], x) < 1e-5, name
  assert float(loss) == pytest.approx(float(expected), rel=1e-5)
  assert abs(float(plain) - float(loss)) > 0.01  # the adapters do something


@pytest.mark.slow
def test_eight_devices_give_the_loss_and_gradients_of_one():
  (loss, grads), (expected, reference) = results((1, 2, 2, 2)), results(ONE)
  assert float(loss) == pytest.approx(float(expected), rel=1e-5)
  reference = to_names(reference)
  for name, grad in to_names(grads).items():
    if ".lora." in name:
      assert np.any(grad), name
      assert tiny.largest_difference(grad, reference[name]) < 1e-4, name


def test_adapters_are_split_like_their_matrices():
  mesh = tiny.mesh(1, 2, 2, 2)
  model = abstract_state(lambda: MM1(jax.random.key(0), with_lora().model), mesh)
  specs = {name: tuple(x.sharding.spec) for name, x in to_names(model).items()}
  fsdp = ("fsdp", "expert", "sequence")
  sparse = "decoder.units.layers.1"
  assert specs[f"{sparse}.lora.query.a"] == (None, fsdp, None)
  assert specs[f"{sparse}.lora.query.b"] == (None, None, "tensor", None)
  assert specs[f"{sparse}.lora.out.a"] == (None, "tensor", None, None)
  assert specs[f"{sparse}.lora.out.b"] == (None, None, fsdp)
  assert specs[f"{sparse}.lora.gate.a"] == (None, "expert", ("fsdp", "sequence"), None)
  assert specs[f"{sparse}.lora.gate.b"] == (None, "expert", None, "tensor")


def test_only_adapters_of_the_decoder_are_trained():
  model = adapted()
  trainable, frozen = split_frozen(model, ("vit",))
  parts = {
    name if not name.startswith("decoder.") else ".".join(name.split(".")[:5])
    for name in to_names(trainable)
    if not name.startswith("connector.")
  }
  assert parts == {f"decoder.units.layers.{i}.lora" for i in (0, 1)}
  assert len(to_names(trainable)) + len(to_names(frozen)) == len(to_names(model))
  assert "decoder.embedding" in to_names(frozen)


def test_the_optimizer_has_state_for_adapters_only():
  run = with_lora()
  run = dataclasses.replace(
    run, optimizer=dataclasses.replace(run.optimizer, frozen=("vit", "connector"))
  )
  state = abstract_state(
    lambda: init_state(MM1(jax.random.key(0), run.model), run), tiny.mesh(1, 2, 2, 2)
  )
  moments = {name.split(".mu.")[1] for name in to_names(state.opt_state) if ".mu." in name}
  assert moments == {name for name in to_names(state.model) if ".lora." in name}
  assert len(moments) == 2 * 2 * len(LORA.matrices)  # A and B, in two layers


def test_a_new_adapter_changes_nothing():
  """B is zero, and the other params are those of the model without adapters, bit for bit."""
  lora = LoRAConfig(rank=2, matrices=("query", "down"))
  with jax.set_mesh(tiny.mesh(*ONE)):
    make = tiny.jit(Decoder, static_argnums=1)
    new, plain = (to_names(make(jax.random.key(0), with_lora(kind).model)) for kind in (lora, None))
  added = {name for name in new if name not in plain}
  sides = {f"{name}.{side}" for name in ("query", "down") for side in "ab"}
  assert added == {f"units.layers.{i}.lora.{side}" for i in (0, 1) for side in sides}
  for name in added:
    assert np.any(new[name]) == name.endswith(".a"), name
  for name, x in plain.items():
    np.testing.assert_array_equal(new[name], x, err_msg=name)


@pytest.mark.slow
def test_a_run_is_merged_and_nothing_is_lost_by_mistake(tmp_path):
  """Orbax, the command's function, and both ways to read the result."""
  tokenizer = tmp_path / "tokenizer.model"
  tokenizer.write_bytes(b"any")
  run = with_lora()
  run = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=str(tokenizer)))
  mesh = tiny.mesh(8)
  model = tiny.make_model(run.model, mesh)
  old, new = tmp_path / "lora", tmp_path / "merged"
  with jax.set_mesh(mesh), checkpoint.Checkpointer(old, CheckpointConfig()) as checkpointer:
    checkpointer.save(7, params=model, train={"step": np.zeros(())}, data={})
  checkpoint.write_run_files(old, run)
  plain = tiny.make_model(with_lora(None).model, tiny.mesh(*ONE))
  with pytest.raises(CheckpointError, match=r"LoRA adapters .* would be lost\. Merge"):
    checkpoint.init_from(old, plain)
  merge_run(old, new)
  assert checkpoint.read_run(new).model.decoder.lora is None
  assert checkpoint.find_step(new).name == "7"
  restored = checkpoint.restore_params(new, plain)
  for name, x in to_names(summed()).items():
    assert tiny.largest_difference(to_names(restored)[name], x) < 1e-5, name
  with pytest.raises(CheckpointError, match="is a run already"):
    merge_run(old, new)
  with pytest.raises(CheckpointError, match="has no adapters"):
    merge_run(new, tmp_path / "again")


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: LoRAConfig(rank=0), r"lora\.rank 0 must lie in \[1, "),
    (lambda: LoRAConfig(matrices=()), "matrices is empty"),
    (lambda: LoRAConfig(matrices=("q_proj",)), r"must be some of \('query', 'key'"),
    (lambda: LoRAConfig(matrices=("up", "up")), "each once"),
  ],
)
def test_what_makes_no_sense_is_refused(make, message):
  with pytest.raises(ConfigError, match=message):
    make()


def test_a_frozen_decoder_has_no_adapters():
  run = with_lora()
  with pytest.raises(ConfigError, match=r"optimizer\.frozen names the decoder"):
    dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, frozen=("decoder",)))
