# SPDX-License-Identifier: Apache-2.0
"""One step of training, and the state it carries: pure functions of (state, batch)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from mm1_jax.batch import Batch
from mm1_jax.config import RunConfig
from mm1_jax.models.mm1 import MM1
from mm1_jax.train.loss import Losses, TokenSums, loss_fn, split_rows
from mm1_jax.train.optimizer import (
  Params,
  join_frozen,
  make_optimizer,
  make_schedule,
  part_norms,
  split_frozen,
)
from mm1_jax.train.xla_flags import compiler_options

Metrics = dict[str, Any]  # clu's Average or LastValue by name

NORM_DECAY = 0.98  # of the running gradient norm that a spike is measured against
NORM_STEPS = 20  # accepted steps before spikes are looked for


class Guard(NamedTuple):
  """Watches for steps that would harm the model."""

  norm: Float[Array, ""]  # running mean of accepted steps' gradient norms
  accepted: Int[Array, ""]
  skipped: Int[Array, ""]
  in_a_row: Int[Array, ""]  # skipped since the last accepted step


class TrainState(NamedTuple):
  step: Int[Array, ""]  # batches seen, skipped steps included
  model: MM1
  opt_state: Any  # of the trainable params
  guard: Guard


def init_state(model: MM1, run: RunConfig) -> TrainState:
  """Returns the state in front of the first step, with the optimizer sharded like the params."""
  trainable, _ = split_frozen(model, run.optimizer.frozen)
  zero = jnp.zeros((), jnp.int32)
  guard = Guard(norm=jnp.zeros(()), accepted=zero, skipped=zero, in_a_row=zero)
  return TrainState(zero, model, make_optimizer(run).init(trainable), guard)


_jit = functools.partial(jax.jit, static_argnames="run", donate_argnames="state")


@_jit
def train_step(state: TrainState, batch: Batch, *, run: RunConfig) -> tuple[TrainState, Metrics]:
  """Takes one step; a step whose gradient is not finite or far too large changes no param."""
  trainable, frozen = split_frozen(state.model, run.optimizer.frozen)
  losses, grads = _gradients(trainable, frozen, batch, run)
  norm = optax.tree.norm(grads)
  accept = jnp.isfinite(norm) & jnp.isfinite(losses.total) & ~_is_spike(state.guard, norm, run)
  updates, opt_state = make_optimizer(run).update(grads, state.opt_state, trainable)

  def choose(new, old):
    return jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)

  trainable = choose(optax.apply_updates(trainable, updates), trainable)
  guard = _update_guard(state.guard, norm, accept)
  metrics = _metrics(losses, run) | {
    "lr": _last(make_schedule(run)(state.guard.accepted)),
    "grad_norm": _average(norm),
    **{f"grad_norm/{part}": _average(x) for part, x in part_norms(grads).items()},
    "skipped": _last(guard.skipped),
    "skipped_in_a_row": _last(guard.in_a_row),
  }
  state = TrainState(
    step=state.step + 1,
    model=join_frozen(trainable, frozen),
    opt_state=choose(opt_state, state.opt_state),
    guard=guard,
  )
  return state, metrics


@functools.partial(jax.jit, static_argnames="run")
def eval_step(model: MM1, batch: Batch, *, run: RunConfig) -> clu_metrics.Average:
  """Returns the mean loss of a held-out batch, in nats per target; experts drop no token."""
  losses = loss_fn(model, batch, run, num_targets=jnp.ones(()), dropless=True)
  return _average(jnp.sum(losses.tokens.nll), jnp.sum(losses.tokens.count))


@functools.cache
def train_step_on(mesh: Mesh) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns `train_step`, to be compiled with the options of the mesh's chips."""
  return _jit(_plain(train_step), compiler_options=_options(mesh))


@functools.cache
def eval_step_on(mesh: Mesh) -> Callable[..., clu_metrics.Average]:
  """Returns `eval_step`, to be compiled with the options of the mesh's chips."""
  return jax.jit(_plain(eval_step), static_argnames="run", compiler_options=_options(mesh))


def _plain(step: Callable) -> Callable:
  return step.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]


def _options(mesh: Mesh) -> dict[str, bool | int | float | str] | None:
  return compiler_options(mesh.devices.flat[0].device_kind) or None


def _gradients(
  trainable: Params, frozen: Params, batch: Batch, run: RunConfig
) -> tuple[Losses, Params]:
  """Returns the losses of a batch and their gradient, summed over micro-batches."""
  num = run.train.accumulation_steps
  num_targets = jnp.maximum(jnp.sum(batch.loss_mask), 1.0)

  def micro(rows: Batch) -> tuple[Losses, Params]:
    def total(trainable):
      losses = loss_fn(
        join_frozen(trainable, frozen), rows, run, num_targets=num_targets, share=1 / num
      )
      return losses.total, losses

    grads, losses = jax.grad(total, has_aux=True)(trainable)
    return losses, grads

  if num == 1:
    return micro(batch)

  def body(carry, rows):
    losses, grads = micro(rows)
    summed = jax.tree.map(jnp.add, carry, (losses.total, losses.tokens, grads))
    return summed, losses.moe

  num_sources = len(run.data.leaves) or 1
  sums = TokenSums(jnp.zeros(num_sources), jnp.zeros(num_sources), jnp.zeros(()))
  zeros = jnp.zeros(()), sums, jax.tree.map(jnp.zeros_like, trainable)
  (total, tokens, grads), moe = jax.lax.scan(body, zeros, split_rows(batch, num))
  return Losses(total, tokens, jax.tree.map(lambda x: jnp.mean(x, axis=0), moe)), grads


def _is_spike(guard: Guard, norm: Float[Array, ""], run: RunConfig) -> Bool[Array, ""]:
  return (guard.accepted >= NORM_STEPS) & (norm > run.train.spike_factor * guard.norm)


def _update_guard(guard: Guard, norm: Float[Array, ""], accept: Bool[Array, ""]) -> Guard:
  # The first steps are averaged evenly, so that the running norm means something from the start.
  decay = jnp.minimum(NORM_DECAY, guard.accepted / (guard.accepted + 1.0))
  return Guard(
    norm=jnp.where(accept, decay * guard.norm + (1 - decay) * norm, guard.norm),
    accepted=guard.accepted + accept,
    skipped=guard.skipped + ~accept,
    in_a_row=jnp.where(accept, 0, guard.in_a_row + 1),
  )


def _metrics(losses: Losses, run: RunConfig) -> Metrics:
  """Returns the losses as averages that merge over steps: every token counts alike."""
  tokens = losses.tokens
  count = jnp.sum(tokens.count)
  metrics: Metrics = {
    "loss": _average(jnp.sum(tokens.nll), count),
    "z_loss": _average(run.train.z_loss * tokens.z, count),
    **{
      f"loss/{source.name}": _average(tokens.nll[i], tokens.count[i])
      for i, source in enumerate(run.data.leaves)
    },
  }
  if losses.moe is not None:
    metrics |= {
      "moe/balance_loss": _average(jnp.mean(losses.moe.balance_loss)),
      "moe/router_z_loss": _average(jnp.mean(losses.moe.router_z_loss)),
      "moe/dropped": _average(jnp.mean(losses.moe.dropped)),
      "moe/load": _average(losses.moe.load),  # [U, E]: a scalar for each would be hundreds
    }
  return metrics


def _last(value: ArrayLike) -> clu_metrics.LastValue:
  return clu_metrics.LastValue(total=jnp.float32(value), count=jnp.ones(()))


def _average(total: jax.Array, count: jax.Array | None = None) -> clu_metrics.Average:
  count = jnp.ones(()) if count is None else count
  return clu_metrics.Average(total=total, count=count)  # pyright: ignore[reportCallIssue]
