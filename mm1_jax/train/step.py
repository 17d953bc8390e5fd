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
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from mm1_jax.batch import Batch
from mm1_jax.chips import compiler_options
from mm1_jax.config import PARTS, RunConfig
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import spec_of
from mm1_jax.train.guard import Guard, judge, new_guard
from mm1_jax.train.loss import Losses, TokenSums, loss_fn, split_rows
from mm1_jax.train.optimizer import (
  Params,
  join_frozen,
  make_optimizer,
  make_schedule,
  part_norms,
  split_frozen,
)

Metrics = dict[str, Any]  # clu's Average or LastValue by name


class TrainState(NamedTuple):
  step: Int[Array, ""]  # batches seen, skipped steps included
  model: MM1
  opt_state: Any  # of the trainable params
  guard: Guard


def init_state(model: MM1, run: RunConfig) -> TrainState:
  """Returns the state before the first step, with the optimizer sharded like the params."""
  trainable, _ = split_frozen(model, run.optimizer.frozen)
  step = jnp.zeros((), jnp.int32)
  return TrainState(step, model, make_optimizer(run).init(trainable), new_guard(run))


def train_step(state: TrainState, batch: Batch, *, run: RunConfig) -> tuple[TrainState, Metrics]:
  """Takes one step; one that the guard refuses changes no param."""
  trainable, frozen = split_frozen(state.model, run.optimizer.frozen)
  losses, grads = _gradients(trainable, frozen, batch, run)
  norm = optax.tree.norm(grads)
  accept, guard = judge(state.guard, norm=norm, loss=_guarded(losses), run=run)
  updates, opt_state = make_optimizer(run).update(grads, state.opt_state, trainable)

  def choose(new, old):
    return jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)

  trainable = choose(optax.apply_updates(trainable, updates), trainable)
  metrics = _metrics(losses, run) | {
    "image_spread": _average(*losses.image_spread),
    **_rates(run, state.guard.accepted),
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


def eval_step(model: MM1, batch: Batch, *, run: RunConfig) -> clu_metrics.Average:
  """Returns the mean loss of a held-out batch, in nats per target; experts drop no token."""
  losses = loss_fn(model, batch, run, num_targets=jnp.ones(()), dropless=True)
  return _average(jnp.sum(losses.tokens.nll), jnp.sum(losses.tokens.count))


@functools.cache
def train_step_on(mesh: Mesh) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns `train_step`, compiled with the options of the mesh's chips; it donates the state."""
  return jax.jit(
    train_step, static_argnames="run", donate_argnames="state", compiler_options=_options(mesh)
  )


@functools.cache
def eval_step_on(mesh: Mesh) -> Callable[..., clu_metrics.Average]:
  """Returns `eval_step`, compiled with the options of the mesh's chips."""
  return jax.jit(eval_step, static_argnames="run", compiler_options=_options(mesh))


def _options(mesh: Mesh) -> dict[str, bool | int | float | str] | None:
  return compiler_options(mesh.devices.flat[0].device_kind) or None


def _gradients(
  trainable: Params, frozen: Params, batch: Batch, run: RunConfig
) -> tuple[Losses, Params]:
  """Returns the losses of a batch and their gradient, summed over micro-batches.

  Slices sum gradients over `data`, their slowest network: once a step, in float32. Until then each
  slice keeps its own sum, which is the type of a gradient by a *reduced* param.
  """
  num = run.train.accumulation_steps
  across = frozenset({"data"} if jax.sharding.get_abstract_mesh().shape["data"] > 1 else ())
  trainable, frozen = (_reshard(x, reduced=across) for x in (trainable, frozen))
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
    losses, grads = micro(batch)
    return losses, _reshard(grads)

  def body(carry, rows):
    losses, grads = micro(rows)
    terms = losses.total, losses.tokens, losses.image_spread, grads
    return jax.tree.map(jnp.add, carry, terms), losses.moe

  def no_gradient(param):
    where = P(*spec_of(param).partitions, unreduced=across)
    return jnp.zeros_like(param, out_sharding=where)

  num_sources = len(run.data.leaves) or 1
  sums = TokenSums(jnp.zeros(num_sources), jnp.zeros(num_sources), jnp.zeros(()))
  spread = jnp.zeros(()), jnp.zeros(())
  zeros = jnp.zeros(()), sums, spread, jax.tree.map(no_gradient, trainable)
  (total, tokens, spread, grads), moe = jax.lax.scan(body, zeros, split_rows(batch, num))
  moe = jax.tree.map(lambda x: jnp.mean(x, axis=0), moe)
  return Losses(total, tokens, moe, spread), _reshard(grads)


def _reshard(params: Params, **kind: frozenset[str]) -> Params:
  """Returns params split as they are, with sums over an axis made or, of a `kind`, put off."""
  return jax.tree.map(lambda x: jax.sharding.reshard(x, P(*spec_of(x).partitions, **kind)), params)


def _guarded(losses: Losses) -> Float[Array, ""]:
  """Returns nats per target, not finite where any term of the loss is not."""
  tokens = losses.tokens
  mean = jnp.sum(tokens.nll) / jnp.maximum(jnp.sum(tokens.count), 1.0)
  return jnp.where(jnp.isfinite(losses.total), mean, jnp.nan)


def _rates(run: RunConfig, step: Int[Array, ""]) -> Metrics:
  """Returns the decoder's rate as `lr`, and that of each part that is trained."""
  trained = [part for part in PARTS if part not in run.optimizer.frozen]
  rates = {f"lr/{part}": make_schedule(run, part)(step) for part in trained}
  return {name: _last(rate) for name, rate in ({"lr": make_schedule(run)(step)} | rates).items()}


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
