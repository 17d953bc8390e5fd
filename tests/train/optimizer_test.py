# SPDX-License-Identifier: Apache-2.0
"""Rates against the paper, updates against optax.adamw, and what is sharded, frozen or decayed."""

import dataclasses
import functools
import importlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mm1_jax.checkpoint import to_names
from mm1_jax.config import ConfigError, OptimizerConfig, RunConfig, TrainConfig
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import abstract_state
from mm1_jax.train import step as step_module
from mm1_jax.train.optimizer import (
  backbone_params,
  decay_mask,
  join_frozen,
  learning_rate_law,
  make_optimizer,
  make_schedule,
  peak_learning_rate,
  split_frozen,
)
from tests.helpers import tiny, tiny_step

pytestmark = pytest.mark.compiles

DECAYED = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.1)


@pytest.mark.parametrize(
  ("num_params", "rate"),
  [
    (9e6, 6.7e-4),
    (85e6, 2.6e-4),
    (302e6, 1.5e-4),
    (1.2e9, 8.6e-5),
    (2.9e9, 5.9e-5),
    (6.4e9, 4.2e-5),
    (30e9, 2.2e-5),
  ],
)
def test_the_law_gives_the_papers_rates(num_params, rate):
  assert float(f"{learning_rate_law(num_params):.1e}") == rate


@pytest.mark.parametrize(
  ("kind", "num_params", "rate"),
  [("9m", 9e6, 6.7e-4), ("85m", 85e6, 2.6e-4), ("302m", 302e6, 1.5e-4), ("1b", 1.2e9, 8.6e-5)],
)
def test_the_proxies_are_what_the_law_was_fitted_on(kind, num_params, rate):
  run = load("mm1_proxy", kind)
  assert backbone_params(run.model.decoder) == pytest.approx(num_params, rel=0.06)
  assert run.optimizer.learning_rate is None
  assert peak_learning_rate(run) == pytest.approx(rate, rel=0.03)


@pytest.mark.parametrize("size", ["3b", "7b", "30b"])
def test_a_sparse_model_takes_its_backbones_rate(size):
  dense, sparse = load(f"mm1_{size}"), load(f"mm1_{size}_moe")
  assert peak_learning_rate(sparse) == peak_learning_rate(dense)
  cfg = dataclasses.replace(sparse.model.decoder, moe=None)
  assert backbone_params(sparse.model.decoder) == backbone_params(cfg)


def load(module: str, *args: str) -> RunConfig:
  config = importlib.import_module(f"configs.{module}").get_config(*args)
  return RunConfig.from_dict(config.to_dict())


def test_backbone_params_are_the_decoders_matrices():
  model = abstract_state(lambda: MM1(jax.random.key(0), tiny.model_config()), tiny.mesh())
  matrices = {n: x.size for n, x in to_names(model.decoder.units).items() if "norm" not in n}
  assert backbone_params(tiny.model_config().decoder) == sum(matrices.values())


@pytest.mark.parametrize(
  ("warmup", "num_steps", "final", "expected"),
  [
    # By step: the start, half of the warm-up, its end, half of the cosine, the end, and after.
    (20, 100, 0.1, {0: 0, 10: 0.5, 20: 1, 60: 0.55, 100: 0.1, 150: 0.1}),
    (20, 100, 0.0, {0: 0, 20: 1, 60: 0.5, 100: 0, 150: 0}),
    (0, 100, 0.1, {0: 1, 50: 0.55, 100: 0.1}),
    (20, 10, 0.1, {0: 0, 5: 0.25, 10: 0.5}),  # ends inside its warm-up
    (20, 20, 0.1, {0: 0, 20: 1, 21: 0.1}),
  ],
)
def test_the_rate_by_step(warmup, num_steps, final, expected):
  cfg = OptimizerConfig(learning_rate=2e-4, warmup_steps=warmup, final_fraction=final)
  run = RunConfig(optimizer=cfg, train=TrainConfig(num_steps=num_steps))
  rates = {step: float(make_schedule(run)(step)) / 2e-4 for step in expected}
  assert rates == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("stage", "peak", "final"), [("3b", 6e-5, 6e-6), ("sft", 1e-5, 0.0)])
def test_the_stages_schedules(stage, peak, final):
  run = load(f"mm1_{stage}")
  schedule, cfg = make_schedule(run), run.optimizer
  assert cfg.name == {"3b": "adamw", "sft": "adafactor"}[stage]
  middle = (run.train.num_steps + cfg.warmup_steps) // 2
  steps = [0, cfg.warmup_steps // 2, cfg.warmup_steps, middle, run.train.num_steps]
  expected = [0, peak / 2, peak, (peak + final) / 2, final]
  rates = [float(schedule(s)) for s in steps]
  np.testing.assert_allclose(rates, expected, rtol=1e-4, atol=1e-6 * peak)


KEPT = {  # one param of each kind is enough, and compiles fast
  "connector.readout.layers.0.bias",
  "connector.readout.layers.0.weight",
  "decoder.embedding",
  "decoder.norm.scale",
  "decoder.units.layers.1.mlp.gate",
  "vit.blocks.attention.query",
  "vit.blocks.attention.query_bias",
  "vit.positions",
}


@pytest.fixture(scope="module")
def params() -> MM1:
  model = tiny.make_model(tiny_step.run_config(tiny.SPARSE).model, tiny.mesh())
  assert to_names(model).keys() >= KEPT
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x if tiny.name(path) in KEPT else None, model
  )


def gradients(like: MM1, seed: int, size: float = 1.0):
  def draw(path, x):
    grad = size * tiny.draw(f"{seed}{tiny.name(path)}", x.shape).astype(np.float32)
    return jax.device_put(grad, x.sharding)

  return jax.tree_util.tree_map_with_path(draw, like)


def updates_of(optimizer: optax.GradientTransformation, params: MM1, *, num: int = 3, size=1.0):
  """Returns the updates and the state after `num` random gradients; params are not changed."""

  @tiny.jit
  def update(params, grads):
    state = optimizer.init(params)
    for grad in grads:
      updates, state = optimizer.update(grad, state, params)
    return updates, state

  with jax.set_mesh(tiny.mesh()):
    return update(params, [gradients(params, seed, size) for seed in range(num)])


def with_optimizer(cfg: OptimizerConfig) -> RunConfig:
  return tiny_step.run_config(tiny.SPARSE, optimizer=cfg, train=TrainConfig(num_steps=10))


def test_adamw_is_optaxs(params):
  """With its warm-up, its clipping, and its decay on everything but norms and biases."""
  run = with_optimizer(dataclasses.replace(DECAYED, clip_norm=2.0))
  reference = optax.chain(
    optax.clip_by_global_norm(2.0),
    optax.adamw(make_schedule(run), 0.9, 0.95, 1e-8, weight_decay=0.1, mask=decay_mask),
  )
  updates, _ = updates_of(make_optimizer(run), params)
  expected, _ = updates_of(reference, params)
  for name, update in to_names(expected).items():
    assert np.any(update), name
    assert tiny.largest_difference(to_names(updates)[name], update) < 1e-6, name


def test_vit_and_connector_have_rates_of_their_own(params):
  """Also for their decay; twice and half are exact in binary."""
  base, _ = updates_of(make_optimizer(with_optimizer(DECAYED)), params)
  rate = DECAYED.learning_rate
  own = dataclasses.replace(DECAYED, connector_learning_rate=2 * rate, vit_learning_rate=0.5 * rate)
  updates, _ = updates_of(make_optimizer(with_optimizer(own)), params)
  base, updates = to_names(base), to_names(updates)
  for name, update in base.items():
    factor = {"vit": 0.5, "connector": 2}.get(name.split(".")[0], 1)
    np.testing.assert_array_equal(updates[name], factor * np.asarray(update), err_msg=name)


def test_a_connectors_rate_of_zero_is_zero(params):
  own = dataclasses.replace(DECAYED, connector_learning_rate=0.0)
  updates, _ = updates_of(make_optimizer(with_optimizer(own)), params)
  assert not any(np.any(x) for x in jax.tree.leaves(updates.connector))
  assert all(np.any(x) for x in jax.tree.leaves(updates.decoder))


def test_a_part_learns_beside_a_base_rate_of_zero(params):
  """And at any other: a part's rate is no multiple of the decoder's."""
  own = dataclasses.replace(DECAYED, connector_learning_rate=1e-3)
  base, _ = updates_of(make_optimizer(with_optimizer(own)), params)
  for rate in (0.0, 1e-30):
    cfg = dataclasses.replace(own, learning_rate=rate, vit_learning_rate=2e-3)
    updates, _ = updates_of(make_optimizer(with_optimizer(cfg)), params)
    assert all(np.max(np.abs(x)) < 1e-20 for x in jax.tree.leaves(updates.decoder))
    assert all(np.any(x) for x in jax.tree.leaves(updates.vit))
    tiny_step.assert_same_bits(updates.connector, base.connector)


def test_each_part_that_is_trained_has_a_rate_in_the_metrics():
  """`lr` is the decoder's, and the law's where no rate is given."""
  cfg = OptimizerConfig(warmup_steps=0, connector_learning_rate=0.5, frozen=("vit",))
  run = tiny_step.run_config(optimizer=cfg)
  law = learning_rate_law(backbone_params(run.model.decoder))
  _, metrics = tiny_step.step(tiny_step.make_state(run), tiny.BATCH, run)
  rates = {name: value for name, value in metrics.items() if name.startswith("lr")}
  assert rates == pytest.approx({"lr": law, "lr/connector": 0.5, "lr/decoder": law})


ATTENTION_POOL_NOT_DECAYED = {
  "connector.body.key.bias",
  "connector.body.norm.bias",
  "connector.body.norm.scale",
  "connector.body.out.bias",
  "connector.body.value.bias",
  "connector.readout.layers.0.bias",
}
NOT_DECAYED = {
  *(
    f"connector.body.stage{stage}.0.norm{i}.{kind}"
    for stage in (1, 2)
    for i in (1, 2, 3)
    for kind in ("scale", "bias")
  ),
  "connector.body.stage1.0.shortcut_norm.bias",
  "connector.body.stage1.0.shortcut_norm.scale",
  "connector.body.stage1.0.squeeze_excite.down.bias",
  "connector.body.stage1.0.squeeze_excite.up.bias",
  "connector.body.stage2.0.squeeze_excite.down.bias",
  "connector.body.stage2.0.squeeze_excite.up.bias",
  "connector.readout.layers.0.bias",
  "connector.readout.layers.1.bias",
  "decoder.norm.scale",
  "decoder.units.layers.0.attention.key_norm.scale",
  "decoder.units.layers.0.attention.query_norm.scale",
  "decoder.units.layers.0.attention_norm.scale",
  "decoder.units.layers.0.mlp_norm.scale",
  "decoder.units.layers.1.attention.key_norm.scale",
  "decoder.units.layers.1.attention.query_norm.scale",
  "decoder.units.layers.1.attention_norm.scale",
  "decoder.units.layers.1.mlp_norm.scale",
  "vit.blocks.attention.key_bias",
  "vit.blocks.attention.out_bias",
  "vit.blocks.attention.query_bias",
  "vit.blocks.attention.value_bias",
  "vit.blocks.attention_norm.bias",
  "vit.blocks.attention_norm.scale",
  "vit.blocks.mlp.down_bias",
  "vit.blocks.mlp.up_bias",
  "vit.blocks.mlp_norm.bias",
  "vit.blocks.mlp_norm.scale",
  "vit.pre_norm.bias",
  "vit.pre_norm.scale",
}


@pytest.mark.parametrize("connector", ["c_abstractor", "attention_pool"])
def test_what_does_not_decay(connector):
  """A param that is new here: is it a norm or a bias? Then add it; else rename it."""
  cfg = tiny.model_config(tiny.SPARSE)
  cfg = dataclasses.replace(
    cfg,
    connector=dataclasses.replace(cfg.connector, kind=connector),
    decoder=dataclasses.replace(cfg.decoder, qk_norm=True, tie_embeddings=False),
  )
  model = abstract_state(lambda: MM1(jax.random.key(0), cfg), tiny.mesh())
  fixed = {name for name, decays in to_names(decay_mask(model)).items() if not decays}
  expected = NOT_DECAYED
  if connector == "attention_pool":
    expected = {n for n in NOT_DECAYED if "connector" not in n} | ATTENTION_POOL_NOT_DECAYED
  assert fixed == expected


def test_gradients_are_clipped_by_their_global_norm(params):
  """Adam's updates do not depend on a gradient's size, its first moment does."""
  cfg = dataclasses.replace(DECAYED, clip_norm=0.5)
  optimizer = make_optimizer(with_optimizer(cfg))
  size = float(optax.tree.norm(gradients(params, 0)))
  for factor, expected in ((1.0, 0.5), (0.1 / size, 0.1)):
    _, state = updates_of(optimizer, params, num=1, size=factor)
    mu = next(s.mu for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s))
    assert float(optax.tree.norm(mu)) / (1 - cfg.b1) == pytest.approx(expected, rel=1e-5)


def test_without_a_clip_norm_gradients_keep_their_size(params):
  cfg = dataclasses.replace(DECAYED, clip_norm=None)
  size = float(optax.tree.norm(gradients(params, 0)))
  _, state = updates_of(make_optimizer(with_optimizer(cfg)), params, num=1, size=1e6 / size)
  mu = next(s.mu for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s))
  assert float(optax.tree.norm(mu)) / (1 - cfg.b1) == pytest.approx(1e6, rel=1e-5)


def is_adam(x) -> bool:
  return isinstance(x, optax.ScaleByAdamState)


@pytest.mark.parametrize("frozen", [(), ("vit",), ("vit", "decoder"), ("connector",)])
def test_frozen_parts_come_apart_and_together(params, frozen):
  trainable, rest = split_frozen(params, frozen)
  parts = {name.split(".")[0] for name in to_names(rest)}
  assert parts == set(frozen)
  assert {name.split(".")[0] for name in to_names(trainable)}.isdisjoint(frozen)
  tiny_step.assert_same_bits(join_frozen(trainable, rest), params)


@pytest.mark.parametrize("name", [pytest.param("adamw", marks=pytest.mark.slow), "adafactor"])
def test_frozen_parts_do_not_change(name):
  """They have no optimizer state, and the others' gradients are what they were."""
  cfg = dataclasses.replace(tiny_step.ADAMW, name=name)
  run = tiny_step.run_config(optimizer=dataclasses.replace(cfg, frozen=("vit",)))
  first = tiny_step.make_state(run)
  names = to_names(first.opt_state)
  assert any(".decoder." in n for n in names)
  assert not any(".vit." in n for n in names)
  whole = make_state_names(tiny_step.run_config(optimizer=cfg))
  assert set(names) == {n for n in whole if ".vit." not in n}
  if name == "adafactor":
    return  # the step is the same; not worth another program
  after, metrics = tiny_step.step(first, tiny.BATCH, run)
  after, metrics = tiny_step.step(after, tiny.BATCH, run)
  assert metrics["grad_norm/vit"] == 0
  tiny_step.assert_same_bits(after.model.vit, first.model.vit)
  for part in ("connector", "decoder"):
    still = to_names(getattr(first.model, part))
    for n, x in to_names(getattr(after.model, part)).items():
      assert np.any(np.asarray(x) != np.asarray(still[n])), n
  all_trained = tiny_step.run_config(optimizer=cfg)
  expected, _ = tiny_step.step(tiny_step.make_state(all_trained), tiny.BATCH, all_trained)
  actual, _ = tiny_step.step(first, tiny.BATCH, run)
  expected, actual = to_names(expected.opt_state), to_names(actual.opt_state)
  for n, value in actual.items():
    assert tiny.largest_difference(value, expected[n]) < 1e-5, n


def make_state_names(run: RunConfig) -> set[str]:
  return set(to_names(tiny_step.make_state(run).opt_state))


def adafactor_updates(params, grads, **settings) -> dict[str, np.ndarray]:
  """Returns Adafactor's last updates at a rate of 1 after gradients that are all alike."""
  cfg = OptimizerConfig(
    name="adafactor",
    learning_rate=1.0,
    warmup_steps=0,
    weight_decay=0.0,
    clip_norm=None,
    **settings,
  )
  run = RunConfig(
    optimizer=cfg,
    train=TrainConfig(num_steps=10**9),  # the rate stays 1
  )
  optimizer = make_optimizer(run)

  @tiny.jit
  def update(params, grads):
    state = optimizer.init(params)
    for grad in grads:
      updates, state = optimizer.update(grad, state, params)
    return updates

  with jax.set_mesh(tiny.mesh()):
    return {name: np.asarray(x) for name, x in to_names(update(params, grads)).items()}


def rms(x, axis=None) -> np.ndarray:
  return np.sqrt(np.mean(np.square(np.asarray(x, np.float64)), axis=axis))


def test_adafactors_steps_are_as_large_as_the_rate(params):
  """Whatever the size of param or gradient."""
  for name, update in adafactor_updates(params, [gradients(params, 0, 1e-4)]).items():
    assert rms(update) == pytest.approx(1.0, rel=1e-3), name


def test_adafactors_parameter_scale_is_a_setting(params):
  """Then an update's RMS is the param's, layer by layer and expert by expert."""
  updates = adafactor_updates(params, [gradients(params, 0)], multiply_by_parameter_scale=True)
  values = {name: np.asarray(x) for name, x in to_names(params).items()}
  assert values["decoder.units.layers.1.mlp.gate"].ndim == 4  # [U, E, D, F]
  assert values["vit.blocks.attention.query_bias"].ndim == 3  # [U, H, h]
  for name, update in updates.items():
    stacked = {"decoder.units.layers.1.mlp.gate": 2}.get(name, int(".blocks." in name))
    one = tuple(range(stacked, update.ndim))
    np.testing.assert_allclose(rms(update, one), rms(values[name], one), rtol=2e-3, err_msg=name)


@pytest.mark.parametrize("side", [8, 130])  # 128 and more are factored
def test_a_layers_gradient_does_not_change_another_layers_step(side):
  """Layers are stacked: an RMS over the stack had cut all other layers' steps 2.7-fold."""
  rng = np.random.default_rng(0)
  shape = (2, 3, side, side)  # layers, experts
  param = 0.1 * rng.standard_normal(shape).astype(np.float32)
  grads = [1e-4 * rng.standard_normal(shape).astype(np.float32) for _ in range(5)]
  jumped = [*grads[:-1], grads[-1].copy()]
  jumped[-1][0, 1] *= 100
  for scale in (False, True):
    calm, spiked = (
      adafactor_updates(
        stacked(param), [stacked(g) for g in gs], multiply_by_parameter_scale=scale
      )["decoder.units.gate"]
      for gs in (grads, jumped)
    )
    others = np.ones(shape[:2], bool)
    others[0, 1] = False
    np.testing.assert_allclose(spiked[others], calm[others], rtol=1e-5)
    assert rms(spiked[0, 1]) == pytest.approx(rms(param[0, 1]) if scale else 1, rel=1e-3)


class Decoder(NamedTuple):
  decoder: Any


class Units(NamedTuple):
  units: Any


class MLP(NamedTuple):
  gate: jax.Array


def stacked(gate: np.ndarray) -> Decoder:
  """Returns experts' matrices where a decoder has them."""
  return Decoder(Units(MLP(jnp.asarray(gate))))


@pytest.mark.parametrize(
  ("name", "setting"),
  [
    ("adafactor", {"b1": 0.8}),
    ("adafactor", {"moment_dtype": "bfloat16"}),
    ("adamw", {"multiply_by_parameter_scale": True}),
    ("adamw", {"clipping_threshold": 5.0}),
  ],
)
def test_a_setting_of_the_other_optimizer_is_refused(name, setting):
  (field,) = setting
  with pytest.raises(ConfigError, match=f"optimizer.{field} .* optimizer.name is {name}"):
    OptimizerConfig(name=name, **setting)


def on_eight_devices(name: str) -> RunConfig:
  """Returns a run with params large enough for Adafactor to factor (128 on two sides)."""
  run = with_optimizer(OptimizerConfig(name=name, learning_rate=1e-3, warmup_steps=0))
  decoder = dataclasses.replace(run.model.decoder, width=128, mlp_dim=128, vocab_size=128)
  return dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=decoder))


def specs(tree) -> dict[str, tuple]:
  """Returns each leaf's PartitionSpec, with an entry for each of its dims."""

  def spec(x):
    found = () if x.sharding is None else tuple(x.sharding.spec)
    return found + (None,) * (len(x.shape) - len(found))

  return {name: spec(x) for name, x in to_names(tree).items()}


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_optimizer_state_is_sharded_like_the_params_and_stays_so(name):
  run, mesh = on_eight_devices(name), tiny.mesh(1, 2, 2, 2)
  state = abstract_state(
    lambda: step_module.init_state(MM1(jax.random.key(0), run.model), run), mesh
  )
  batch = abstract_state(lambda: tiny.put(tiny.BATCH, mesh), mesh)
  with jax.set_mesh(mesh):
    step = functools.partial(step_module.train_step, run=run)
    after, _ = jax.eval_shape(step, state, batch)
  assert specs(after) == specs(state)
  model = specs(state.model)
  slots = specs(state.opt_state)
  if name == "adamw":
    for moment in ("mu", "nu"):
      found = {n.split(f"{moment}.")[1]: s for n, s in slots.items() if f"{moment}." in n}
      assert found == model
  else:
    # A factor keeps the spec of the dims that it keeps.
    gate = "decoder.units.layers.1.mlp.gate"
    fsdp = ("fsdp", "sequence")
    assert model[gate] == (None, "expert", fsdp, "tensor")
    (rows,) = (s for n, s in slots.items() if n.endswith(f"{gate}.value.0.v_row"))
    (columns,) = (s for n, s in slots.items() if n.endswith(f"{gate}.value.0.v_col"))
    assert {rows, columns} == {(None, "expert", fsdp), (None, "expert", "tensor")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_three_steps_on_eight_devices_compile_once(name):
  """The state goes into the second step as it went into the first: same shapes, same shardings."""
  run, mesh = on_eight_devices(name), tiny.mesh(1, 2, 2, 2)
  with jax.set_mesh(mesh):
    make = tiny.jit(lambda: step_module.init_state(MM1(jax.random.key(0), run.model), run))
    state = make()
    take_step, losses = step_module.train_step_on(mesh), []
    before = take_step._cache_size()
    for _ in range(3):
      state, metrics = take_step(state, tiny.put(tiny.BATCH, mesh), run=run)
      losses.append(float(metrics["loss"].compute()))
  assert take_step._cache_size() == before + 1
  assert losses[2] < losses[1] < losses[0]
  assert all(map(math.isfinite, losses))


def test_first_moment_in_bfloat16_takes_half_the_memory_and_next_to_the_same_steps():
  params = Decoder(jnp.linspace(-1.0, 1.0, 64))
  ends = {}
  for dtype in ("float32", "bfloat16"):
    cfg = dataclasses.replace(DECAYED, warmup_steps=0, moment_dtype=dtype)
    optimizer = make_optimizer(tiny_step.run_config(optimizer=cfg))
    ends[dtype], state = params, optimizer.init(params)
    for _ in range(5):
      updates, state = optimizer.update(jax.tree.map(jnp.sin, ends[dtype]), state, ends[dtype])
      ends[dtype] = optax.apply_updates(ends[dtype], updates)
    moments = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape == (64,)]
    assert moments == [dtype, "float32"]
  start, narrow, wide = params.decoder, ends["bfloat16"].decoder, ends["float32"].decoder
  np.testing.assert_allclose(narrow - start, wide - start, rtol=0.01)
  assert (narrow != wide).any()
