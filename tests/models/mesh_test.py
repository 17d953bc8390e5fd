# SPDX-License-Identifier: Apache-2.0
"""How a model is computed changes nothing: not the mesh, nor remat, scan, or accumulation.

Every comparison is of the loss and of every gradient, on packed rows with pictures and padding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm1_jax.config import LoRAConfig, RunConfig
from mm1_jax.sharding import LAYOUT
from mm1_jax.train.optimizer import split_frozen
from mm1_jax.train.step import _gradients
from tests.helpers import tiny

pytestmark = pytest.mark.compiles

MODELS = {
  "dense": tiny.run_config(),
  "dropless": tiny.run_config(tiny.SPARSE),
  "capacity": tiny.run_config(tiny.BOUNDED),
}
TINY = MODELS["dense"].model
ONE_KV_HEAD = dataclasses.replace(
  MODELS["dense"],
  model=dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, num_kv_heads=1)),
)
ONE = (1,)
LOSS_TOLERANCE = 1e-5  # relative
GRADIENT_TOLERANCE = 1e-4  # of a leaf's largest value


@functools.cache
def loss_and_gradients(run: RunConfig, sizes: tuple[int, ...]) -> tuple[float, dict]:
  """Returns the loss of the batch and the gradient of every param, computed on this mesh."""
  mesh = tiny.mesh(*sizes)
  with jax.set_mesh(mesh):
    model, batch = tiny.make_model(run.model, mesh), tiny.put(tiny.BATCH, mesh)
    loss, grads = tiny.loss_and_gradients(run)(model, batch)
  return float(loss), tiny.names(grads)


def assert_equal(actual: tuple[float, dict], expected: tuple[float, dict]) -> None:
  assert actual[0] == pytest.approx(expected[0], rel=LOSS_TOLERANCE)
  assert actual[1].keys() == expected[1].keys()
  for name, grad in expected[1].items():
    if name.endswith("key_bias"):
      # Zero in theory: it moves all of a query's logits alike.
      assert np.abs(actual[1][name]).max() < 1e-6
    else:
      difference = tiny.largest_difference(actual[1][name], grad)
      assert difference < GRADIENT_TOLERANCE, f"{name} differs by {difference:.1e}"


@pytest.mark.parametrize(
  ("model", "sizes"),
  [
    ("capacity", (1, 2, 2, 2)),
    pytest.param("capacity", (1, 1, 2, 2, 2), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_one_device_and_a_mesh_of_all_axes_compute_the_same(model, sizes):
  """A gradient counted once per shard, or a collective left out, shows here and nowhere else."""
  run = MODELS[model]
  assert_equal(loss_and_gradients(run, sizes), loss_and_gradients(run, ONE))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 2, 2), (1, 2, 1, 1, 2)], ids=str)
def test_one_kv_head_computes_the_same_on_a_mesh(sizes):
  assert_equal(loss_and_gradients(ONE_KV_HEAD, sizes), loss_and_gradients(ONE_KV_HEAD, ONE))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
  "sizes", [(1, 2, 2, 2), (8,), (2, 2, 2), (1, 2, 1, 2, 2), (1, 1, 2, 1, 4)], ids=str
)
def test_every_mesh_computes_the_same(model, sizes):
  run = MODELS[model]
  assert_equal(loss_and_gradients(run, sizes), loss_and_gradients(run, ONE))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", "dropless"])
@pytest.mark.parametrize(
  "changes",
  [{"remat": "full"}, {"remat": "dots"}, {"remat": "qkv+attention+host:mlp_up"}, {"scan": False}],
  ids=str,
)
def test_remat_and_scan_change_nothing(model, changes):
  run = MODELS[model]
  changed = dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))
  assert_equal(loss_and_gradients(changed, ONE), loss_and_gradients(run, ONE))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "sizes"), [(3, ONE), (1, (1, 2, 2, 2))], ids=str)
def test_pictures_in_groups_change_nothing(size, sizes):
  """Of 16 slots 6 are empty: some groups are encoded, and some are not."""
  run = MODELS["dense"]
  changed = dataclasses.replace(run, model=dataclasses.replace(run.model, image_group=size))
  assert_equal(loss_and_gradients(changed, sizes), loss_and_gradients(run, ONE))


@pytest.mark.parametrize(
  ("remat", "again"),
  [
    ("none", 0),
    ("full", 8),  # all but the one into the stream: q, k, v, two of attention, out, gate, up
    ("qkv+attention", 4),  # the logits, as their softmax is not kept; out, gate, up
    ("qkv+attention+residual+mlp_up", 2),
    ("qkv+attention+residual+host:mlp_gate+mlp_up", 1),
  ],
)
def test_backward_multiplies_again_only_what_was_not_kept(remat, again):
  """Matrix products of a decoder block: nine forward, and twice as many backward."""
  cfg = tiny.model_config(remat=remat)
  with jax.set_mesh(tiny.mesh()):
    decoder = tiny.make_model(cfg, tiny.mesh()).decoder
    x = jnp.ones((2, 8, cfg.decoder.width), out_sharding=LAYOUT.act_b)
    rows = jnp.ones((2, 8), jnp.int32, out_sharding=LAYOUT.act_b)
    gradient = jax.grad(lambda decoder: jnp.sum(decoder(x, rows, rows).hidden))
    products = str(jax.make_jaxpr(gradient)(decoder)).count("dot_general[")
  assert products == 9 + 18 + again


def without_router_losses(run: RunConfig) -> RunConfig:
  """Returns a run with a loss of tokens alone: the router's are means over a micro-batch."""
  decoder = run.model.decoder
  if decoder.moe is not None:
    moe = dataclasses.replace(decoder.moe, balance_loss=0.0, router_z_loss=0.0)
    decoder = dataclasses.replace(decoder, moe=moe)
  return dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=decoder))


def with_lora(run: RunConfig) -> RunConfig:
  decoder = dataclasses.replace(run.model.decoder, lora=LoRAConfig(rank=3, alpha=5.0))
  return dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=decoder))


ACCUMULATED = {name: without_router_losses(run) for name, run in MODELS.items()}
ACCUMULATED["lora"] = with_lora(ACCUMULATED["dropless"])
SLICES = (2, 2, 1, 1, 2)


@pytest.mark.parametrize(
  ("model", "sizes"),
  [
    ("dense", ONE),
    *(pytest.param(model, SLICES, marks=pytest.mark.slow) for model in ACCUMULATED),
    pytest.param("lora", (2, 1, 1, 2, 2), marks=pytest.mark.slow),
    pytest.param("dropless", (2, 1, 2, 2), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_accumulation_changes_nothing(model, sizes):
  """Rows hold unequal numbers of targets: a mean of the micro-batches' means would differ."""
  run = ACCUMULATED[model]
  halves = dataclasses.replace(run, train=dataclasses.replace(run.train, accumulation_steps=2))
  mesh = tiny.mesh(*sizes)
  with jax.set_mesh(mesh):
    trainable, frozen = split_frozen(tiny.make_model(run.model, mesh), ())
    step = tiny.jit(functools.partial(_gradients, run=halves))
    losses, grads = step(trainable, frozen, tiny.put(tiny.BATCH, mesh))
  loss, expected = loss_and_gradients(run, ONE)
  expected = {name: grad for name, grad in expected.items() if name in tiny.names(trainable)}
  assert_equal((float(losses.total), tiny.names(grads)), (loss, expected))
  assert float(jnp.sum(losses.tokens.count)) == tiny.BATCH.loss_mask.sum()


@pytest.mark.slow
def test_accumulation_changes_the_router_losses_alone():
  """Each micro-batch has its own: without them the gradient is the whole batch's, with them not."""
  alone = dataclasses.replace(tiny.SPARSE, balance_loss=0.0, router_z_loss=0.0)
  mesh, differences = tiny.mesh(*ONE), []
  for moe in (alone, tiny.SPARSE):
    run = tiny.run_config(moe)
    halves = dataclasses.replace(run, train=dataclasses.replace(run.train, accumulation_steps=2))
    with jax.set_mesh(mesh):
      trainable, frozen = split_frozen(tiny.make_model(run.model, mesh), ())
      step = tiny.jit(functools.partial(_gradients, run=halves))
      _, grads = step(trainable, frozen, tiny.put(tiny.BATCH, mesh))
    name = "decoder.units.layers.1.mlp.router"
    _, whole = loss_and_gradients(run, ONE)
    differences.append(tiny.largest_difference(tiny.names(grads)[name], whole[name]))
  assert differences[0] < GRADIENT_TOLERANCE
  assert 1e-3 < differences[1] < 0.1
