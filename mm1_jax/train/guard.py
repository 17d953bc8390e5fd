# SPDX-License-Identifier: Apache-2.0
"""The guard: which steps are refused, which checkpoints are good, and when a run has to end.

A refused step changes no param. A step is refused when

- its gradient norm or its loss is not finite, or
- its loss is over `LOSS_LIMIT` times that of a model to which all tokens are equally likely,
  ln(vocab_size) nats: its params are destroyed, whatever the norm is, or
- its norm is a spike: over `train.spike_factor` times the reference.

The reference is a moving mean of the norm. It has to be right also after norms change their level,
for the guard is saved with the params, and a wrong one would end each restart of a run:

- It is a geometric mean: one outlier moves it little.
- It has a floor, relative to what was seen: `FLOOR` of the highest it has been, which halves every
  `HALF_LIFE` steps. Else, after the norm fell (a small set that is learned by heart), batches with
  norms as before would count as spikes. A norm of 0 (no target, nothing trained) is not counted: it
  does not predict later norms.
- A spike raises it by `RISE`, so that it slowly follows norms that stay high. After `PATIENCE`
  spikes in a row the next one is accepted, however large it is, and the reference starts anew from
  it: so many in a row are the new level. So spikes are refused, alone and in bursts, and yet no
  level of finite norms ends a run: the loss tells a destroyed model from one whose norms have
  changed.
- It starts anew as well where `train.spike_factor` is not what it was made with.

`train.max_skipped` refused steps in a row end the run.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mm1_jax import distributed
from mm1_jax.checkpoint import Checkpointer
from mm1_jax.config import RunConfig, UserError

NORM_DECAY = 0.98  # of the reference, a step
NORM_STEPS = 20  # steps it is made of before spikes are looked for
FLOOR = 0.1  # of the highest reference
HALF_LIFE = 1000  # steps in which the highest reference is half forgotten
RISE = 1.1  # of the reference, by a spike
PATIENCE = 4  # spikes in a row, or half of `train.max_skipped` if that is less
LOSS_LIMIT = 8.0  # times ln(vocab_size)


class TrainingDiverged(UserError):
  """Too many steps in a row had to be refused."""


class Guard(NamedTuple):
  """What the guard keeps of the steps so far; saved with the params."""

  norm: Float[Array, ""]  # reference for gradient norms
  high: Float[Array, ""]  # the highest it has been, half forgotten every HALF_LIFE steps
  seen: Int[Array, ""]  # steps that it is made of
  factor: Float[Array, ""]  # `train.spike_factor` that it was made with
  spikes: Int[Array, ""]  # since the last accepted step
  accepted: Int[Array, ""]
  skipped: Int[Array, ""]
  in_a_row: Int[Array, ""]  # skipped since the last accepted step


def new_guard(run: RunConfig) -> Guard:
  """Returns the guard before the first step."""
  zero, none = jnp.zeros(()), jnp.zeros((), jnp.int32)
  return Guard(zero, zero, none, jnp.float32(run.train.spike_factor), none, none, none, none)


def judge(
  guard: Guard, *, norm: Float[Array, ""], loss: Float[Array, ""], run: RunConfig
) -> tuple[Bool[Array, ""], Guard]:
  """Returns whether to take a step, and the guard after it.

  Args:
    norm: of the step's gradient, before it is clipped.
    loss: nats per target.
  """
  factor = jnp.float32(run.train.spike_factor)
  changed = guard.factor != factor
  seen = jnp.where(changed, 0, guard.seen)
  patience = max(1, min(PATIENCE, run.train.max_skipped // 2))
  limit = LOSS_LIMIT * math.log(max(2, run.model.decoder.vocab_size))
  sane = jnp.isfinite(norm) & (loss <= limit)  # false for NaN
  far = (seen >= NORM_STEPS) & (norm > factor * jnp.maximum(guard.norm, FLOOR * guard.high))
  spike = sane & far & (guard.spikes < patience)
  accept = sane & ~spike
  counted = accept & (norm > 0)
  seen = jnp.where(counted & far, 0, seen)  # a new level
  # The first steps have equal weights, so that the reference is a mean of them from the start.
  decay = jnp.minimum(NORM_DECAY, seen / (seen + 1.0))
  mean = jnp.where(seen > 0, guard.norm, 1.0) ** decay * norm ** (1 - decay)
  reference = jnp.where(counted, mean, guard.norm * jnp.where(spike, RISE, 1.0))
  seen += counted
  high = jnp.maximum(reference, guard.high * 0.5 ** (1 / HALF_LIFE))
  return accept, Guard(
    norm=reference,
    high=jnp.where(seen >= NORM_STEPS, high, 0.0),
    seen=seen,
    factor=factor,
    spikes=jnp.where(accept, 0, guard.spikes + spike),
    accepted=guard.accepted + accept,
    skipped=guard.skipped + ~accept,
    in_a_row=jnp.where(accept, 0, guard.in_a_row + 1),
  )


class Verdicts:
  """Ends a run and marks checkpoints by the guard's counters, which are equal on all processes.

  A checkpoint is good when a step from its params was accepted. Nothing is saved after a refused
  step, so of all checkpoints only the newest can be other than good, until the next step is
  accepted; and the one before it is never deleted (see `Checkpointer`).

  Attributes:
    in_a_row: refused steps up to the newest that was read.
  """

  def __init__(self, run: RunConfig, checkpointer: Checkpointer):
    self._run, self._checkpointer = run, checkpointer
    self.in_a_row = 0

  def read(self, step: int, in_a_row: int) -> None:
    """Takes the guard's counter of a step.

    Raises:
      TrainingDiverged: it is `train.max_skipped`. If the newest checkpoint is not good, and the one
        before it is, the newest has been set aside.
    """
    self.in_a_row = in_a_row
    newest = self._checkpointer.latest_step
    if in_a_row == 0 and newest is not None and newest < step:
      self._checkpointer.prove(newest)
    if in_a_row >= self._run.train.max_skipped:
      train = self._run.train
      raise TrainingDiverged(
        f"{in_a_row} steps in a row, up to step {step}, were skipped: their loss or gradient was "
        f"not finite, their loss over {LOSS_LIMIT:g} ln(vocab_size), or their gradient norm over "
        f"train.spike_factor {train.spike_factor:g} times the usual. Lower "
        f"optimizer.learning_rate, or look at the data. {self._what_is_left()}"
      )

  def _what_is_left(self) -> str:
    checkpointer = self._checkpointer
    checkpointer.wait()
    newest, good = checkpointer.latest_step, checkpointer.good_step
    if newest is None:
      return "No checkpoint was saved: the next start begins anew."
    if good is None:
      return (
        f"Of the only checkpoint, step {newest}, no step was accepted: if a lower rate does not "
        f"help, delete {checkpointer.folder(newest)} to begin anew."
      )
    text = f"The last good checkpoint is that of step {good}; the next start resumes there."
    if newest != good:
      distributed.barrier("mm1_jax/saved")
      aside = checkpointer.set_aside()
      distributed.barrier("mm1_jax/set aside")
      text += f" No step from the newest, that of step {newest}, was accepted: it is now {aside}."
    return text
