# SPDX-License-Identifier: Apache-2.0
"""Optimizer: what moves, how fast, and what is left alone.

The gradient is clipped by its global norm, preconditioned (AdamW or Adafactor), decayed, and
scaled by its part's schedule; ViT and connector may have peaks of their own. What is frozen is not
in the trees that the optimizer sees (`split_frozen`), so it has no gradient, no state and no decay.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mm1_jax.config import PARTS, DecoderConfig, RunConfig
from mm1_jax.models.mm1 import MM1

Params = Any  # an MM1 in which some params, or their gradients, are None


def backbone_params(cfg: DecoderConfig) -> int:
  """Returns N of the learning-rate law: non-embedding params of the dense decoder.

  A MoE model takes its dense backbone's rate (MM1 section 3.4), so experts count once.
  """
  attention = cfg.width * cfg.head_dim * 2 * (cfg.num_heads + cfg.num_kv_heads)
  return cfg.depth * (attention + 3 * cfg.width * cfg.mlp_dim)


def learning_rate_law(num_params: int) -> float:
  """Returns MM1's peak rate, exp(-0.4214 ln N - 0.5535) (section 3.3), for N params."""
  return math.exp(-0.4214 * math.log(num_params) - 0.5535)


def peak_learning_rate(run: RunConfig, part: str = "decoder") -> float:
  """Returns a part's peak rate: its own, else the configured one, else the law's."""
  cfg = run.optimizer
  own = {"vit": cfg.vit_learning_rate, "connector": cfg.connector_learning_rate}.get(part)
  if own is not None:
    return own
  if cfg.learning_rate is not None:
    return cfg.learning_rate
  return learning_rate_law(backbone_params(run.model.decoder))


def make_schedule(run: RunConfig, part: str = "decoder") -> optax.Schedule:
  """Returns a part's rate by step: linear warm-up, then cosine to `final_fraction` of the peak.

  A run shorter than its warm-up ends inside it.
  """
  cfg, peak = run.optimizer, peak_learning_rate(run, part)
  decay_steps = max(1, run.train.num_steps - cfg.warmup_steps)
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, peak, cfg.warmup_steps),
      optax.cosine_decay_schedule(peak, decay_steps, cfg.final_fraction),
    ],
    [cfg.warmup_steps],
  )


def make_optimizer(run: RunConfig) -> optax.GradientTransformation:
  """Returns the transformation of gradients into updates, over what `split_frozen` trains."""
  cfg = run.optimizer
  if cfg.name == "adamw":
    precondition = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=cfg.moment_dtype)
  else:
    precondition = optax.chain(
      optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
    )
  return optax.chain(
    optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm),
    precondition,
    optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask),
    _scale_by_rates(run),
  )


def _scale_by_rates(run: RunConfig) -> optax.GradientTransformation:
  """Returns what turns directions into steps downhill, each part's at its own rate."""
  schedules = {part: make_schedule(run, part) for part in PARTS}

  def init(params: Params) -> optax.ScaleByScheduleState:
    del params
    return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    steps = {part: jnp.negative(schedule(state.count)) for part, schedule in schedules.items()}
    del params
    updates = jax.tree_util.tree_map_with_path(
      lambda path, x: jnp.asarray(steps[_names(path)[0]], x.dtype) * x, updates
    )
    return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

  return optax.GradientTransformation(init, update)


def decay_mask(params: Params) -> Any:
  """Returns which params decay: all but norms' scales and biases."""

  def decays(path, _) -> bool:
    name = _names(path)[-1]
    return name != "scale" and not name.endswith("bias")

  return jax.tree_util.tree_map_with_path(decays, params)


def split_frozen(model: MM1, frozen: tuple[str, ...]) -> tuple[Params, Params]:
  """Returns the model twice: with only its trainable params, and with only its frozen ones.

  What the one has, the other holds as None, which is no leaf to JAX. Of a decoder with adapters
  (`models.lora`) only they are trainable.
  """
  adapters = model.cfg.decoder.lora is not None

  def is_frozen(part: str, *names: str) -> bool:
    return part in frozen or (adapters and part == "decoder" and "lora" not in names)

  def pick(keep_frozen: bool) -> Params:
    return jax.tree_util.tree_map_with_path(
      lambda path, x: x if is_frozen(*_names(path)) == keep_frozen else None, model
    )

  return pick(False), pick(True)


def join_frozen(trainable: Params, frozen: Params) -> MM1:
  """Puts together what `split_frozen` took apart."""
  return jax.tree.map(
    lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None
  )


def part_norms(tree: Params) -> dict[str, jax.Array]:
  """Returns the global norm of each part's arrays; 0 for a part that is frozen."""
  return {part: optax.tree.norm(getattr(tree, part)) for part in PARTS}


def _names(path) -> list[str]:
  """Returns a leaf's attribute names, without nnx.Param's own `value`."""
  names = [str(getattr(key, "name", getattr(key, "idx", key))) for key in path]
  return names[:-1] if names[-1] == "value" else names
