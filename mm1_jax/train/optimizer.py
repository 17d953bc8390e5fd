# SPDX-License-Identifier: Apache-2.0
"""Optimizer: which params are trained, and at which rates.

The gradient is clipped by its global norm, preconditioned (AdamW or Adafactor), decayed, and
scaled by its part's schedule; ViT and connector may have peaks of their own. Frozen params are not
in the optimizer's trees (`split_frozen`), so they have no gradient, no state and no decay.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from mm1_jax.config import PARTS, DecoderConfig, OptimizerConfig, RunConfig
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import spec_of

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
    precondition = per_layer(adafactor(cfg))
  return optax.chain(
    optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm),
    precondition,
    optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask),
    _scale_by_rates(run),
  )


def adafactor(cfg: OptimizerConfig) -> optax.GradientTransformation:
  """Returns Adafactor's direction for one array (arXiv 1804.04235), its RMS about 1.

  With `multiply_by_parameter_scale` it is multiplied by the param's RMS, or 1e-3 if that is less.
  Then the rate is relative (section 8 of the paper): of a matrix initialised at width^-0.5, a step
  is width^-0.5 of the rate.
  """
  parts = [optax.scale_by_factored_rms()]
  if cfg.clipping_threshold is not None:
    parts.append(optax.clip_by_block_rms(cfg.clipping_threshold))
  if cfg.multiply_by_parameter_scale:
    parts.append(optax.scale_by_param_block_rms())
  return optax.chain(*parts)


def per_layer(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns a transformation that treats each layer and each expert as an array of its own.

  Layers are stacked along a leading dim. With one RMS over the whole stack, a layer with a 100
  times larger gradient would shrink the steps of all others.
  """

  def over_stack(f: Callable, path, param: jax.Array, *args: Any) -> Any:
    num = num_stacked(path, param)
    out = functools.reduce(lambda f, _: jax.vmap(f), range(num), f)(*args)
    # Experts are split over the mesh; so must be state that is made of no param, such as a count.
    stack = spec_of(param)[:num]
    return jax.tree.map(lambda x: jax.sharding.reshard(x, P(*stack, *spec_of(x)[num:])), out)

  def init(params: Params) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda path, x: over_stack(transformation.init, path, x, x), params
    )

  def update(updates: Params, state: Any, params: Params = None) -> tuple[Params, Any]:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    rest = zip(treedef.flatten_up_to(updates), treedef.flatten_up_to(state), strict=True)
    results = [
      over_stack(transformation.update, path, x, update, state, x)
      for (path, x), (update, state) in zip(leaves, rest, strict=True)
    ]
    new_updates, new_state = zip(*results, strict=True)
    return treedef.unflatten(new_updates), treedef.unflatten(new_state)

  return optax.GradientTransformation(init, update)


def num_stacked(path, param: jax.Array) -> int:
  """Returns how many leading dims of a param number layers and experts."""
  names = _names(path)
  if not {"units", "blocks"} & set(names):
    return 0
  matrix = names[-2] if names[-1] in ("a", "b") else names[-1]  # of LoRA
  return 1 + (matrix in ("gate", "up", "down") and param.ndim == 4)  # [U, E, ...]


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

  A param of the one is None in the other, which is no leaf to JAX. Of a decoder with adapters
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
