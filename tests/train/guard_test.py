# SPDX-License-Identifier: Apache-2.0
"""The guard by itself: sequences of norms that must not end a run, and those that must be refused.

And what it says of checkpoints: which one is good, and what happens to one that is not.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm1_jax.checkpoint import Checkpointer, find_step
from mm1_jax.config import CheckpointConfig, RunConfig, TrainConfig
from mm1_jax.train.guard import (
  HALF_LIFE,
  LOSS_LIMIT,
  NORM_STEPS,
  PATIENCE,
  Guard,
  TrainingDiverged,
  Verdicts,
  judge,
  new_guard,
)
from tests.helpers import tiny

pytestmark = pytest.mark.compiles

RUN = RunConfig()
SANE = 3.0  # nats per target


@functools.partial(jax.jit, static_argnames="run")
def scan(guard: Guard, norms, losses, run: RunConfig):
  def step(guard, norm_and_loss):
    norm, loss = norm_and_loss
    accept, guard = judge(guard, norm=norm, loss=loss, run=run)
    return guard, (accept, guard.in_a_row)

  return jax.lax.scan(step, guard, (norms, losses))


def simulate(*norms, losses=None, run=RUN, guard=None) -> tuple[Guard, list[int], int]:
  """Returns the last guard, the steps that were refused, and the most of them in a row."""
  every = jnp.asarray(np.concatenate([np.atleast_1d(x) for x in norms]), jnp.float32)
  losses = jnp.full(every.shape, SANE) if losses is None else jnp.asarray(losses, jnp.float32)
  guard, (accepted, in_a_row) = scan(guard or new_guard(run), every, losses, run)
  return guard, np.flatnonzero(~np.asarray(accepted)).tolist(), int(in_a_row.max())


def usual(num: int, norm: float) -> np.ndarray:
  noise = np.random.default_rng(num).standard_normal(num)
  return norm * np.exp(0.2 * noise)


@pytest.mark.parametrize("times", [25, 30, 50, 100, 1e3, 1e6])
def test_a_jump_to_another_level_does_not_end_a_run(times):
  _, refused, in_a_row = simulate(usual(200, 0.3), usual(300, 0.3 * times))
  assert refused[0] == 200
  assert in_a_row <= PATIENCE < RUN.train.max_skipped / 2
  assert len(refused) <= 2 * PATIENCE


@pytest.mark.parametrize("nothing", [0.0, 1e-7])
@pytest.mark.parametrize("steps", [25, 300])
def test_steps_of_nothing_do_not_make_normal_ones_spikes(nothing, steps):
  """At the start, and after normal ones."""
  _, refused, _ = simulate(np.full(steps, nothing), usual(50, 0.5))
  assert len(refused) <= (PATIENCE if nothing else 0)
  _, refused, _ = simulate(usual(100, 0.5), np.full(steps, nothing), usual(50, 0.5))
  assert len(refused) <= (1 if nothing else 0)


def test_a_norm_that_fell_does_not_make_a_normal_one_a_spike():
  """As when a small set is learned by heart; and after long, not for good."""
  _, refused, _ = simulate(usual(100, 0.5), usual(300, 0.01), np.full(12, 0.5))
  assert not refused
  _, refused, in_a_row = simulate(usual(100, 0.5), usual(9 * HALF_LIFE, 0.01), np.full(12, 0.5))
  assert len(refused) == in_a_row == PATIENCE


@pytest.mark.parametrize("times", [25, 100, 1e6])
@pytest.mark.parametrize("burst", [1, 3])
def test_spikes_are_refused(times, burst):
  """Every time, also soon after another, and one after a burst that was taken for a level."""
  spikes = np.full(burst, 0.5 * times)
  *_, refused, in_a_row = simulate(usual(50, 0.5), spikes, usual(30, 0.5))
  assert refused == list(range(50, 50 + burst))
  assert in_a_row == burst
  if times > 25:
    _, refused, _ = simulate(usual(50, 0.5), spikes, usual(10, 0.5), spikes, usual(30, 0.5))
    assert refused == [*range(50, 50 + burst), *range(60 + burst, 60 + 2 * burst)]
    level = np.full(PATIENCE + 1, 5e3)
    _, refused, _ = simulate(usual(100, 0.5), level, usual(60, 0.5), 50.0, usual(30, 0.5))
    assert refused == [*range(100, 100 + PATIENCE), 160 + PATIENCE + 1]


def test_a_high_first_norm_does_not_hide_spikes():
  _, refused, _ = simulate(1000.0, usual(199, 1.0), 100.0, usual(10, 1.0))
  assert refused == [200]


def test_what_often_spikes_is_usual_in_the_end():
  """Every third batch has a norm 40 times the others'."""
  norms = usual(600, 0.3) * np.where(np.arange(600) % 3, 1, 40)
  _, refused, in_a_row = simulate(usual(100, 0.3), norms)
  assert in_a_row == 1
  assert len(refused) < 20


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("seen", [0, 100])
def test_what_is_not_finite_is_always_refused(value, seen):
  bad = np.full(12, value)
  guard, refused, in_a_row = simulate(usual(seen, 0.5), bad)
  assert refused == list(range(seen, seen + 12))
  assert in_a_row >= RUN.train.max_skipped
  assert np.isfinite(guard.norm)
  losses = np.concatenate([np.full(seen, SANE), bad])
  _, refused, _ = simulate(usual(seen + 12, 0.5), losses=losses)
  assert refused == list(range(seen, seen + 12))


def test_a_destroyed_model_ends_the_run():
  """Its norms are as finite and as steady as can be."""
  limit = LOSS_LIMIT * np.log(RUN.model.decoder.vocab_size)
  for loss, num in ((0.99 * limit, 0), (1.01 * limit, 12)):
    losses = np.concatenate([np.full(5, SANE), np.full(12, loss)])
    _, refused, _ = simulate(usual(17, 0.5), losses=losses)
    assert len(refused) == num


def test_another_spike_factor_begins_anew():
  """A wrong reference in a checkpoint can be reset."""
  guard, *_ = simulate(usual(100, 0.01))
  _, refused, _ = simulate(usual(30, 50.0), guard=guard)
  assert refused
  other = RunConfig(train=TrainConfig(spike_factor=21.0))
  guard, refused, _ = simulate(usual(30, 50.0), guard=guard, run=other)
  assert not refused
  assert int(guard.seen) == 30
  assert float(guard.norm) == pytest.approx(50, rel=0.1)


@pytest.mark.parametrize("max_skipped", [2, 3, 5])
def test_spikes_alone_end_no_run_of_little_patience(max_skipped):
  run = RunConfig(train=TrainConfig(max_skipped=max_skipped))
  _, _, in_a_row = simulate(usual(50, 0.5), usual(50, 500.0), run=run)
  assert 1 <= in_a_row < max_skipped


def test_counters():
  guard, refused, _ = simulate(usual(NORM_STEPS, 0.5), 50.0, np.nan, 0.5, np.nan)
  assert refused == [NORM_STEPS, NORM_STEPS + 1, NORM_STEPS + 3]
  assert int(guard.accepted) == NORM_STEPS + 1
  assert (int(guard.skipped), int(guard.in_a_row), int(guard.spikes)) == (3, 1, 0)


def save(checkpointer: Checkpointer, *steps: int) -> None:
  arrays = {"x": jax.device_put(np.arange(3.0), tiny.mesh().devices.flat[0])}
  for step in steps:
    checkpointer.save(step, params=arrays, train=arrays, data={})
  checkpointer.wait()


def diverge(verdicts: Verdicts, step: int) -> str:
  """Refuses steps from `step` on until the run ends; returns what it says."""
  last = RUN.train.max_skipped - 1
  for i in range(last):
    verdicts.read(step + i, i + 1)
  with pytest.raises(TrainingDiverged) as error:
    verdicts.read(step + last, last + 1)
  return str(error.value)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_good_checkpoint_is_kept_and_named(tmp_path, keep):
  """That of step 20 was saved, but every step from it was refused."""
  cfg = CheckpointConfig(keep=keep)
  with Checkpointer(tmp_path, cfg) as checkpointer:
    verdicts = Verdicts(RUN, checkpointer)
    save(checkpointer, 10)
    assert checkpointer.good_step is None
    verdicts.read(11, 0)
    assert checkpointer.good_step == 10
    save(checkpointer, 20)
    assert checkpointer.good_step == 10
    message = diverge(verdicts, 21)
  assert "last good checkpoint is that of step 10;" in message
  assert f"No step from the newest, that of step 20, was accepted: it is now {tmp_path}" in message
  assert find_step(tmp_path).name == "10"
  # The next start begins there, and may save step 20 again.
  with Checkpointer(tmp_path, cfg) as checkpointer:
    assert checkpointer.latest_step == checkpointer.good_step == 10
    verdicts = Verdicts(RUN, checkpointer)
    save(checkpointer, 20)
    verdicts.read(21, 0)
    assert checkpointer.good_step == 20
    assert "last good checkpoint is that of step 20;" in diverge(verdicts, 22)
  assert find_step(tmp_path).name == "20"


def test_a_checkpoint_that_was_good_once_is_never_set_aside(tmp_path):
  """A fault of the data or of a new setting would else remove one checkpoint at each start."""
  with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
    save(checkpointer, 10, 20)
    Verdicts(RUN, checkpointer).read(21, 0)
  for _ in range(2):
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
      assert "last good checkpoint is that of step 20;" in diverge(Verdicts(RUN, checkpointer), 21)
      assert checkpointer.latest_step == 20


def test_the_only_checkpoint_is_left_where_it_is(tmp_path):
  with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
    save(checkpointer, 10)
    message = diverge(Verdicts(RUN, checkpointer), 11)
  assert "Of the only checkpoint, step 10, no step was accepted" in message
  assert find_step(tmp_path).name == "10"


@pytest.mark.parametrize("content", ["", "{", '{"step": 20}'])
def test_what_was_said_of_a_checkpoint_that_is_gone_is_not_believed(tmp_path, content):
  """A crash may leave a mark without its checkpoint, or half a mark."""
  with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
    save(checkpointer, 10)
  (tmp_path / "good.json").write_text(content)
  with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
    save(checkpointer, 20)
    assert checkpointer.good_step == 10
    checkpointer.prove(20)
  assert json.loads((tmp_path / "good.json").read_text()) == {"step": 20}
