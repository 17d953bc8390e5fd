# SPDX-License-Identifier: Apache-2.0
"""What each setting of a model means for its params: the one table for comparing configs.

A run that starts from given params (its own checkpoint, or `train.init_from`) computes what they
were trained to compute only if some settings are unchanged. Most changes show in the arrays' names
and shapes; of the others a run would notice nothing, and lose part of what the params had learned.
"""

import dataclasses
import enum
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from mm1_jax.config import (
  ConnectorConfig,
  DecoderConfig,
  LoRAConfig,
  ModelConfig,
  MoEConfig,
  VisionConfig,
)


class Kind(enum.Enum):
  """What another value of a setting does to given params."""

  MEANING = enum.auto()  # the same arrays compute something else
  ARRAYS = enum.auto()  # other names or shapes of arrays, which are compared themselves
  PRECISION = enum.auto()  # rounding alone: another stage may choose it, a run keeps it
  FREE = enum.auto()  # nothing
  GROUP = enum.auto()  # settings of its own


MEANING, ARRAYS, FREE, GROUP = Kind.MEANING, Kind.ARRAYS, Kind.FREE, Kind.GROUP

TABLE: Mapping[type, Mapping[str, Kind]] = {
  ModelConfig: {
    "vision": GROUP,
    "connector": GROUP,
    "decoder": GROUP,
    "image_token_id": MEANING,
    "dtype": Kind.PRECISION,
    "remat": FREE,
    "scan": FREE,
    "image_group": FREE,
  },
  VisionConfig: {
    "image_size": FREE,  # positions are resized to its grid
    "patch_size": ARRAYS,
    "width": ARRAYS,
    "depth": ARRAYS,  # with feature_layer: blocks that are built
    "num_heads": ARRAYS,
    "mlp_dim": ARRAYS,
    "activation": MEANING,
    "class_token": ARRAYS,
    "pre_norm": ARRAYS,
    "norm_eps": MEANING,
    "position_grid": FREE,  # stored positions are resized to it
    "feature_layer": ARRAYS,
  },
  ConnectorConfig: {
    "kind": MEANING,
    "token_grid": FREE,  # bins of other sizes; an attention pool's queries are an array
    "hidden": ARRAYS,
    "depth": ARRAYS,
    "mlp_depth": ARRAYS,
    "num_heads": MEANING,
  },
  DecoderConfig: {
    "vocab_size": ARRAYS,
    "width": ARRAYS,
    "depth": ARRAYS,
    "num_heads": ARRAYS,
    "num_kv_heads": ARRAYS,
    "head_dim": ARRAYS,
    "mlp_dim": ARRAYS,
    "rope_theta": MEANING,
    "rope_scaling": MEANING,  # as a whole
    "norm_eps": MEANING,
    "qk_norm": ARRAYS,
    "qkv_bias": ARRAYS,
    "tie_embeddings": ARRAYS,
    "moe": GROUP,
    "lora": GROUP,
  },
  MoEConfig: {
    "num_experts": ARRAYS,
    "every": ARRAYS,
    "top_k": MEANING,
    # How a step of training is computed and weighed; where nothing is dropped, no output differs.
    "capacity_factor": FREE,
    "exchange_factor": FREE,
    "balance_loss": FREE,
    "router_z_loss": FREE,
  },
  LoRAConfig: {"rank": ARRAYS, "alpha": MEANING, "matrices": ARRAYS},
}
# The part that a setting belongs to; all others are the decoder's.
PARTS = {
  "model.vision": "vit",
  "model.connector": "connector",
  "data.image_delimiters": "connector",
}


class Change(typing.NamedTuple):
  """A setting of the model with two values."""

  path: str  # such as "model.decoder.rope_theta"
  kind: Kind
  old: Any
  new: Any

  @property
  def part(self) -> str:
    return next((part for path, part in PARTS.items() if self.path.startswith(path)), "decoder")

  def __str__(self) -> str:
    return f"{self.path}: {self.old} -> {self.new}"


def changes(old: ModelConfig, new: ModelConfig) -> list[Change]:
  """Returns the settings that differ, those of no kind of connector that either has left out."""
  found = list(_changes(old, new, "model"))
  if "attention_pool" not in (old.connector.kind, new.connector.kind):
    found = [change for change in found if change.path != "model.connector.num_heads"]
  return found


def meaningful() -> list[str]:
  """Returns the settings of kind MEANING."""
  return list(_paths(ModelConfig, "model"))


def _changes(old: Any, new: Any, path: str) -> Iterator[Change]:
  for name, kind in TABLE[type(new)].items():
    a, b = getattr(old, name), getattr(new, name)
    if a == b:
      continue
    if kind is GROUP and a is not None and b is not None:
      yield from _changes(a, b, f"{path}.{name}")
    else:  # a group that only one has shows in the arrays
      yield Change(f"{path}.{name}", ARRAYS if kind is GROUP else kind, a, b)


def _paths(cls: type, path: str) -> Iterator[str]:
  hints = typing.get_type_hints(cls)
  for name, kind in TABLE[cls].items():
    if kind is GROUP:
      inner = (hints[name], *typing.get_args(hints[name]))
      (group,) = (t for t in inner if dataclasses.is_dataclass(t))
      yield from _paths(typing.cast(type, group), f"{path}.{name}")
    elif kind is MEANING:
      yield f"{path}.{name}"
