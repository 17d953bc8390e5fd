# SPDX-License-Identifier: Apache-2.0
"""One step: its numbers, what it refuses to take, and what must not change it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from mm1_jax import chips
from mm1_jax.batch import Batch
from mm1_jax.checkpoint import Checkpointer, to_names
from mm1_jax.config import CheckpointConfig, OptimizerConfig, RunConfig, TrainConfig
from mm1_jax.data.drops import Drops
from mm1_jax.data.pipeline import BatchStats
from mm1_jax.metrics import MetricWriter, read_metrics
from mm1_jax.train.guard import NORM_DECAY, NORM_STEPS, RISE, TrainingDiverged, Verdicts
from mm1_jax.train.log import StepLog
from mm1_jax.train.loop import Results
from mm1_jax.train.step import eval_step, train_step, train_step_on
from mm1_jax.train.stop import Stop
from mm1_jax.train.tally import Tally
from mm1_jax.train.watchdog import Watchdog
from tests.helpers import tiny, tiny_step

pytestmark = pytest.mark.compiles

DENSE = tiny_step.run_config()
GOLDEN = OptimizerConfig(learning_rate=1e-3, warmup_steps=0)
# Golden steps, too: one program does for both.
MOE = tiny_step.run_config(tiny.BOUNDED, optimizer=GOLDEN, c_abstractor=True)
STATS = BatchStats(0.0, 0.0, num_positions=10, num_images=2, num_examples=3, drops={})


def first_steps(run: RunConfig, num: int) -> list:
  """Returns the states and metrics of the first steps on the same batch."""
  state, steps = tiny_step.make_state(run), []
  for _ in range(num):
    state, metrics = tiny_step.step(state, tiny.BATCH, run)
    steps.append((state, metrics))
  return steps


@functools.cache
def one_step(run: RunConfig):
  return first_steps(run, 1)[0]


# Computed by the code itself; the model's outputs are held to other implementations elsewhere.
REFERENCE = {
  "dense": {
    "grad_norm": 10.286,
    "grad_norm/connector": 4.1917,
    "grad_norm/decoder": 6.2244,
    "grad_norm/vit": 7.0353,
    "loss": 8.5186,
    "loss/captions": 9.2337,
    "loss/text": 8.2962,
    "z_loss": 0.0064598,
    "update_rms/vit": 0.0009974,
    "update_rms/connector": 0.0009892,
    "update_rms/decoder": 0.0010014,
  },
  "moe": {
    "grad_norm": 7.2055,
    "grad_norm/connector": 2.4947,
    "grad_norm/decoder": 6.2786,
    "grad_norm/vit": 2.5048,
    "loss": 7.9891,
    "loss/captions": 8.4702,
    "loss/text": 7.8395,
    "z_loss": 0.006089,
    "moe/balance_loss": 1.0263,
    "moe/dropped": 0.016304,
    "moe/router_z_loss": 2.4971,
    "update_rms/vit": 0.00099699,
    "update_rms/connector": 0.00099035,
    "update_rms/decoder": 0.0010009,
  },
}
GOLDEN_RUNS = {
  "dense": tiny_step.run_config(optimizer=GOLDEN, c_abstractor=True),
  "moe": MOE,
}


@pytest.mark.parametrize("kind", REFERENCE)
def test_golden_step(kind):
  """Loss, gradient norms, and how far each part moves in a step."""
  run = GOLDEN_RUNS[kind]
  before = tiny_step.make_state(run)
  after, metrics = one_step(run)
  found = {k: v for k, v in metrics.items() if k.split("/")[0] in ("loss", "z_loss", "grad_norm")}
  found |= {k: v for k, v in metrics.items() if k.startswith("moe/") and "load" not in k}
  for part in ("vit", "connector", "decoder"):
    pairs = zip(
      *(jax.tree.leaves(getattr(state.model, part)) for state in (after, before)), strict=True
    )
    squares = [np.square(np.asarray(a, np.float64) - np.asarray(b)) for a, b in pairs]
    mean = sum(s.sum() for s in squares) / sum(s.size for s in squares)
    found[f"update_rms/{part}"] = float(np.sqrt(mean))
  assert found == pytest.approx(REFERENCE[kind], rel=1e-3), (
    "A step of training gives other numbers than before. If you did not mean to change the model, "
    "the loss or the optimizer, this is a bug. If you did, check that the change is the one you "
    f"meant and set REFERENCE['{kind}'] to:\n"
    + "\n".join(f'    "{name}": {value:.5g},' for name, value in found.items())
  )


def test_loss_falls_on_one_batch():
  losses = [metrics["loss"] for _, metrics in first_steps(DENSE, 4)]
  assert losses == sorted(losses, reverse=True)
  assert losses[3] < 0.97 * losses[0]


def test_metrics_are_of_this_step():
  state, metrics = one_step(DENSE)
  assert int(state.step) == 1
  assert metrics["lr"] == pytest.approx(DENSE.optimizer.learning_rate)
  parts = [metrics[f"grad_norm/{part}"] for part in ("vit", "connector", "decoder")]
  assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(parts), rel=1e-5)
  mask, sources = tiny.BATCH.loss_mask, tiny.BATCH.source_ids
  counts = [float((mask * (sources == m)).sum()) for m in range(2)]
  of_sources = [metrics[f"loss/{source.name}"] for source in DENSE.data.leaves]
  assert metrics["loss"] == pytest.approx(np.average(of_sources, weights=counts), rel=1e-5)
  assert of_sources[0] != pytest.approx(of_sources[1], rel=1e-3)


def test_moe_metrics():
  _, metrics = one_step(MOE)
  assert metrics["moe/load"].shape == (1, tiny.BOUNDED.num_experts)
  assert metrics["moe/load"].sum() == pytest.approx(1, rel=1e-5)
  assert 0 < metrics["moe/dropped"] < 1
  assert metrics["moe/balance_loss"] >= 1


def test_eval_step_is_the_loss():
  mesh = tiny.mesh()
  with jax.set_mesh(mesh):
    evaluate = tiny.jit(eval_step, static_argnames="run")
    average = evaluate(tiny_step.make_state(DENSE).model, tiny.put(tiny.BATCH, mesh), run=DENSE)
  _, metrics = one_step(DENSE)
  assert float(average.compute()) == pytest.approx(metrics["loss"], rel=1e-5)
  assert float(average.count) == tiny.BATCH.loss_mask.sum()


def assert_skipped(before, after, metrics) -> None:
  tiny_step.assert_same_bits(after.model, before.model)
  tiny_step.assert_same_bits(after.opt_state, before.opt_state)
  assert int(after.step) == int(before.step) + 1
  assert int(after.guard.skipped) == int(before.guard.skipped) + 1
  assert int(after.guard.in_a_row) == int(before.guard.in_a_row) + 1
  assert int(after.guard.accepted) == int(before.guard.accepted)
  assert metrics["skipped"] == int(after.guard.skipped)
  assert metrics["skipped_in_a_row"] == int(after.guard.in_a_row)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30], ids=str)
def test_a_step_that_is_not_finite_changes_nothing(value):
  """1e30: the loss is finite no more, or its gradient."""
  before, _ = one_step(DENSE)

  def poison(x):
    x[0, 0] = value
    return x

  before = tiny_step.change(before, model__decoder__embedding=poison)
  after, metrics = tiny_step.step(before, tiny.BATCH, DENSE)
  assert not np.isfinite(metrics["grad_norm"]) or not np.isfinite(metrics["loss"])
  assert_skipped(before, after, metrics)
  assert float(after.guard.norm) == float(before.guard.norm)
  twice, metrics = tiny_step.step(after, tiny.BATCH, DENSE)
  assert_skipped(after, twice, metrics)
  assert metrics["skipped_in_a_row"] == 2


def with_guard(norm: float, seen: int):
  state, _ = one_step(DENSE)
  return tiny_step.change(
    state,
    guard__norm=lambda x: np.full_like(x, norm),
    guard__seen=lambda x: np.full_like(x, seen),
    guard__in_a_row=lambda x: np.full_like(x, 4),
    guard__skipped=lambda x: np.full_like(x, 7),
  )


def test_a_spike_is_skipped_and_a_large_step_is_not():
  factor = DENSE.train.spike_factor
  state, _ = one_step(DENSE)
  _, metrics = tiny_step.step(state, tiny.BATCH, DENSE)
  norm = metrics["grad_norm"]
  before = with_guard(norm / (1.01 * factor), NORM_STEPS)
  after, metrics = tiny_step.step(before, tiny.BATCH, DENSE)
  assert_skipped(before, after, metrics)
  assert float(after.guard.norm) == pytest.approx(RISE * float(before.guard.norm), rel=1e-5)
  assert int(after.guard.in_a_row) == 5
  # Just below the threshold, or before the running norm means anything.
  for before in (with_guard(norm / (0.99 * factor), NORM_STEPS), with_guard(1e-9, NORM_STEPS - 1)):
    after, metrics = tiny_step.step(before, tiny.BATCH, DENSE)
    assert int(after.guard.accepted) == int(before.guard.accepted) + 1
    assert (int(after.guard.skipped), int(after.guard.in_a_row)) == (7, 0)
    with pytest.raises(AssertionError):
      tiny_step.assert_same_bits(after.model, before.model)


def test_the_reference_is_a_geometric_mean_and_then_forgets():
  steps = first_steps(DENSE, 3)
  norms = [metrics["grad_norm"] for _, metrics in steps]
  for n, (state, _) in enumerate(steps, start=1):
    assert float(state.guard.norm) == pytest.approx(np.exp(np.mean(np.log(norms[:n]))), rel=1e-5)
  after, metrics = tiny_step.step(with_guard(norms[1], 1000), tiny.BATCH, DENSE)
  expected = norms[1] ** NORM_DECAY * metrics["grad_norm"] ** (1 - NORM_DECAY)
  assert float(after.guard.norm) == pytest.approx(expected, rel=1e-5)


def test_a_step_of_a_destroyed_model_is_refused():
  """Its norm is that of the reference, and finite; but its loss is that of no sane model."""
  state, _ = one_step(DENSE)
  worse = tiny_step.change(state, model__decoder__norm__scale=lambda x: 100 * x)
  _, metrics = tiny_step.step(worse, tiny.BATCH, DENSE)
  assert np.isfinite(metrics["grad_norm"])
  assert metrics["loss"] > 8 * np.log(DENSE.model.decoder.vocab_size)
  assert metrics["skipped_in_a_row"] == 1


def test_the_rate_does_not_move_in_a_skipped_step():
  """The schedule counts accepted steps; what is logged as `lr` is what was applied."""
  state, _ = one_step(DENSE)
  nan = tiny_step.change(state, model__decoder__norm__scale=lambda x: np.full_like(x, np.nan))
  after, metrics = tiny_step.step(nan, tiny.BATCH, DENSE)
  healed = after._replace(model=state.model)
  _, again = tiny_step.step(healed, tiny.BATCH, DENSE)
  _, without = tiny_step.step(state, tiny.BATCH, DENSE)
  assert without["lr"] < DENSE.optimizer.learning_rate
  assert again["lr"] == without["lr"] == metrics["lr"]


def test_too_many_skipped_in_a_row_stop_the_run(tmp_path):
  """And a run of fewer does not."""
  run = dataclasses.replace(DENSE, train=TrainConfig(num_steps=100, max_skipped=3, log_every=1))
  good = tiny_step.make_state(run)
  bad = tiny_step.change(good, model__decoder__norm__scale=lambda x: np.full_like(x, np.inf))
  mesh = tiny.mesh()
  state, step = good, 0
  with (
    jax.set_mesh(mesh),
    MetricWriter(tmp_path) as writer,
    Checkpointer(tmp_path, CheckpointConfig()) as checkpointer,
  ):
    log, drops = StepLog(run, writer, launched=0.0), Drops(run.data.max_drop_fraction)
    watch = Watchdog(Stop(), stall_seconds=240, stop_seconds=20)
    results = Results(log, Verdicts(run, checkpointer), drops, watch)

    def advance(model):
      nonlocal state, step
      state, metrics = tiny_step._step(
        state._replace(model=model), tiny.put(tiny.BATCH, mesh), run=DENSE
      )
      step += 1
      results.put(step, metrics, Tally.of(STATS, False))

    for model in (good, bad, bad, good, bad, bad, bad):
      advance(model.model)
    with pytest.raises(TrainingDiverged) as error:
      results.flush()
  message = str(error.value)
  assert "3 steps in a row, up to step 7, were skipped" in message
  assert "optimizer.learning_rate" in message
  assert "No checkpoint was saved" in message
  written = read_metrics(tmp_path)
  assert list(written["skipped_in_a_row"].values()) == [0, 1, 2, 0, 1, 2, 3]
  assert written["skipped"][7] == 5
  assert "speed/mfu" not in written


def linear_adam(num: int) -> RunConfig:
  """Returns a run with updates nearly linear in the gradient, so that noise stays small."""
  optimizer = dataclasses.replace(tiny_step.ADAMW, eps=1.0)
  return tiny_step.run_config(
    optimizer=optimizer, train=TrainConfig(num_steps=10, accumulation_steps=num)
  )


@pytest.mark.slow
@pytest.mark.parametrize("num", [2, 4])
def test_accumulation_takes_the_same_step(num):
  expected, expected_metrics = one_step(linear_adam(1))
  actual, metrics = one_step(linear_adam(num))
  names = ["loss", "z_loss", "grad_norm", "loss/captions", "loss/text", "lr", "skipped"]
  assert [metrics[n] for n in names] == pytest.approx([expected_metrics[n] for n in names], 1e-5)
  before = to_names(tiny_step.make_state(linear_adam(1)).model)
  actual = to_names(actual.model)
  for name, value in to_names(expected.model).items():
    # The gradient of a key's bias is zero but for rounding.
    if not name.endswith("key_bias"):
      moved = np.asarray(value, np.float64) - before[name]
      # The params' own rounding is 1e-7 of their size, and they move by about 1e-3 of it.
      np.testing.assert_allclose(
        np.asarray(actual[name], np.float64) - before[name],
        moved,
        atol=1e-5 * np.abs(moved).max() + 3e-7 * np.abs(before[name]).max(),
        rtol=0,
        err_msg=name,
      )


def assert_close(actual: dict, expected: dict) -> None:
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(actual[name], value, rtol=1e-4, atol=1e-7, err_msg=name)


def take(*rows: int | None) -> Batch:
  """Returns a batch of the rows given; None is a row without any example."""
  kept = [0 if row is None else row for row in rows]
  empty = np.array([row is None for row in rows])

  def pick(x):
    return np.where(empty.reshape(-1, *(1,) * (x.ndim - 1)), np.zeros_like(x), x[kept])

  return Batch(*map(pick, tiny.BATCH))


@pytest.mark.parametrize("run", [DENSE, MOE], ids=["dense", "moe"])
def test_empty_rows_change_nothing(run):
  """A batch of rows, half of them empty, takes the step of the same rows twice over."""
  state = tiny_step.make_state(run)
  expected, expected_metrics = tiny_step.step(state, take(0, 1, 2, 3, 0, 1, 2, 3), run)
  actual, metrics = tiny_step.step(state, take(0, None, 1, None, None, 2, 3, None), run)
  assert_close(metrics, expected_metrics)
  moments = to_names(expected.opt_state)
  for name, value in to_names(actual.opt_state).items():
    if not name.endswith("key_bias"):
      assert tiny.largest_difference(value, moments[name]) < 1e-4, name


@pytest.mark.parametrize("run", [DENSE, MOE], ids=["dense", "moe"])
def test_a_batch_of_nothing_is_harmless(run):
  state = tiny_step.make_state(run)
  after, metrics = tiny_step.step(state, take(*[None] * 8), run)
  assert metrics["skipped"] == 0
  assert metrics["grad_norm"] < 1e-6
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))


def test_a_run_without_image_slots():
  """It is the run with empty slots, without the encoder's work."""
  rows = [tiny.row("ttttt", "tttttttt", seed=s) for s in range(8)]
  with_slots = tiny.stack(rows)
  without = with_slots._replace(
    images=with_slots.images[:, :0], image_mask=with_slots.image_mask[:, :0]
  )
  run = dataclasses.replace(DENSE, data=dataclasses.replace(DENSE.data, images_per_row=0))
  state = tiny_step.make_state(run)
  expected, expected_metrics = tiny_step.step(state, with_slots, DENSE)
  actual, metrics = tiny_step.step(state, without, run)
  assert_close(metrics, expected_metrics)
  assert metrics["grad_norm/vit"] == 0
  assert metrics["grad_norm/connector"] == 0
  assert metrics["grad_norm/decoder"] > 0
  expected, actual = to_names(expected.opt_state), to_names(actual.opt_state)
  for name, value in actual.items():
    assert tiny.largest_difference(value, expected[name]) < 1e-4, name


@pytest.mark.parametrize(("frozen", "products"), [((), 6), (("vit",), 2)], ids=str)
def test_a_frozen_encoder_has_no_backward_pass(frozen, products):
  """Of its MLP's two matrix products, which alone have 40 numbers, there is no gradient."""
  run = tiny_step.run_config()
  vision = dataclasses.replace(run.model.vision, mlp_dim=40)
  run = dataclasses.replace(
    run,
    model=dataclasses.replace(run.model, vision=vision),
    optimizer=dataclasses.replace(run.optimizer, frozen=frozen),
  )
  mesh = tiny.mesh(*tiny_step.ONE)
  with jax.set_mesh(mesh):
    state = tiny_step.make_state(run)
    traced = jax.make_jaxpr(functools.partial(train_step, run=run))(
      state, tiny.put(tiny.BATCH, mesh)
    )
  found = [
    e
    for e in equations(traced.jaxpr)
    if e.primitive.name == "dot_general"
    and any(40 in v.aval.shape for v in (*e.invars, *e.outvars))
  ]
  assert len(found) == products


def equations(jaxpr):
  """Yields every equation, those of loops and calls as well."""
  for equation in jaxpr.eqns:
    yield equation
    for sub in jaxprs_in_params(equation.params):
      yield from equations(sub)


@pytest.mark.slow
def test_micro_batches_without_two_pictures_do_not_lower_the_spread():
  """Half of these have none: the mean is over the others, which have the same pictures twice."""
  rows = [tiny.row("tit", "ti", seed=3), tiny.row("tttt", seed=6)]
  batch = tiny.stack([rows[i % 2] for i in range(8)])
  spreads = []
  for num in (1, 2):  # micro-batches take every second row
    run = tiny_step.run_config(train=TrainConfig(num_steps=10, accumulation_steps=num))
    _, metrics = tiny_step.step(tiny_step.make_state(run), batch, run)
    spreads.append(metrics["image_spread"])
  assert spreads[1] == pytest.approx(spreads[0], rel=1e-5)
  assert spreads[0] > 0.1


def test_collapsed_image_tokens_are_warned_of_once(tmp_path, caplog):
  """With last weights of 0, a connector's tokens are its bias, the same for every picture."""
  run = dataclasses.replace(DENSE, train=dataclasses.replace(DENSE.train, log_every=1))
  healthy = tiny_step.make_state(run)
  dead = tiny_step.change(healthy, model__connector__readout__layers__0__weight=np.zeros_like)
  with (
    caplog.at_level("WARNING"),
    MetricWriter(tmp_path) as writer,
    jax.set_mesh(mesh := tiny.mesh(*tiny_step.ONE)),
  ):
    log, said = StepLog(run, writer, launched=0.0), []
    for step, state in enumerate([healthy, dead, dead, healthy], start=1):
      _, metrics = tiny_step._step(state, tiny.put(tiny.BATCH, mesh), run=run)
      log.add(step, jax.device_get(metrics), Tally.of(STATS, False))
      said.append([r.getMessage() for r in caplog.records if "image tokens" in r.getMessage()])
  assert said[0] == []
  assert said[1] == said[3]
  (message,) = said[3]
  assert message.startswith("step 2: image tokens of different pictures differ by ")
  assert "optimizer.vit_learning_rate" in message
  spread = read_metrics(tmp_path)["image_spread"]
  assert spread[1] > 0.1
  assert spread[2] < 1e-3


def test_step_is_compiled_with_the_options_of_the_meshs_chips(monkeypatch):
  """A wrong one shows that they reach the compiler."""
  mesh = tiny.mesh(*tiny_step.ONE)
  kind = mesh.devices.flat[0].device_kind
  monkeypatch.setattr(chips, "COMPILER_OPTIONS", {kind: {"xla_no_such_option": True}})
  run = tiny_step.run_config()
  with jax.set_mesh(mesh):
    batch = tiny.put(tiny.BATCH, mesh)
    train_step_on.cache_clear()
    lowered = train_step_on(mesh).trace(tiny_step.make_state(run), batch, run=run).lower()
  with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
    lowered.compile()
  train_step_on.cache_clear()
