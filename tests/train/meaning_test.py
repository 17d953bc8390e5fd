# SPDX-License-Identifier: Apache-2.0
"""The table of what settings mean: it has every field, and says what the arrays say."""

import dataclasses
import typing

import jax
import pytest

from mm1_jax.checkpoint import to_names
from mm1_jax.config import LoRAConfig, ModelConfig, RopeScaling
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import abstract_state
from mm1_jax.train import meaning
from mm1_jax.train.meaning import TABLE, Kind
from tests.helpers import tiny

pytestmark = pytest.mark.compiles

# Another value of each setting that fits the tiny model.
OTHER = {
  "vision": {
    "image_size": (16, 12),
    "patch_size": 2,
    "width": 32,
    "depth": 3,
    "num_heads": 4,
    "mlp_dim": 16,
    "activation": "gelu",
    "class_token": False,
    "pre_norm": False,
    "norm_eps": 1e-6,
    "position_grid": (4, 4),
    "feature_layer": -2,
  },
  "connector": {
    "kind": "attention_pool",
    "token_grid": (2, 1),
    "hidden": 16,
    "depth": 2,
    "mlp_depth": 3,
    "num_heads": 4,
  },
  "decoder": {
    "vocab_size": 64,
    "width": 16,
    "depth": 4,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 16,
    "mlp_dim": 16,
    "rope_theta": 1e6,
    "rope_scaling": RopeScaling(),
    "norm_eps": 1e-6,
    "qk_norm": True,
    "qkv_bias": True,
    "tie_embeddings": False,
  },
  "moe": {
    "num_experts": 8,
    "every": 1,
    "top_k": 1,
    "capacity_factor": 4.0,
    "exchange_factor": 2.0,
    "balance_loss": 0.0,
    "router_z_loss": 0.0,
  },
  "lora": {"rank": 3, "alpha": 3.0, "matrices": ("query",)},
  "": {
    "image_token_id": 5,
    "dtype": "bfloat16",
    "remat": "full",
    "scan": False,
    "image_group": 4,
  },
}
GRIDS = ("vision.image_size", "vision.position_grid")  # positions alone


def groups(cls: type = ModelConfig) -> typing.Iterator[type]:
  """Yields the dataclasses that a model's config is made of."""
  yield cls
  for name, hint in typing.get_type_hints(cls).items():
    if TABLE.get(cls, {}).get(name) is Kind.GROUP:
      for inner in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(inner):
          yield from groups(typing.cast(type, inner))


@pytest.mark.parametrize("cls", [*groups()], ids=lambda cls: cls.__name__)
def test_every_setting_is_classified(cls):
  """A new one has to be: is it arrays, what they mean, or neither?"""
  assert set(TABLE[cls]) == {field.name for field in dataclasses.fields(cls)}
  hints = typing.get_type_hints(cls)
  for name, hint in ((field.name, hints[field.name]) for field in dataclasses.fields(cls)):
    is_group = any(dataclasses.is_dataclass(t) for t in (hint, *typing.get_args(hint)))
    assert is_group == (TABLE[cls][name] is Kind.GROUP or name == "rope_scaling")


def base() -> ModelConfig:
  cfg = tiny.model_config(tiny.SPARSE)
  return dataclasses.replace(
    cfg, decoder=dataclasses.replace(cfg.decoder, lora=LoRAConfig(rank=2, alpha=4.0))
  )


def with_other(group: str, name: str) -> ModelConfig:
  cfg, value = base(), OTHER[group][name]
  if not group:
    return dataclasses.replace(cfg, **{name: value})
  if group in ("moe", "lora"):
    inner = dataclasses.replace(getattr(cfg.decoder, group), **{name: value})
    return dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, **{group: inner}))
  return dataclasses.replace(
    cfg, **{group: dataclasses.replace(getattr(cfg, group), **{name: value})}
  )


def shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
  model = abstract_state(lambda: MM1(jax.random.key(0), cfg), tiny.mesh())
  return {name: x.shape for name, x in to_names(model).items() if not name.endswith("positions")}


ALL = [(group, name) for group, fields in OTHER.items() for name in fields]


def test_every_setting_is_tried():
  """All but the groups."""
  tried = {name for _, name in ALL}
  assert tried == {n for table in TABLE.values() for n, k in table.items() if k is not Kind.GROUP}


@pytest.mark.parametrize(("group", "name"), ALL, ids=lambda x: x)
def test_the_table_says_what_arrays_do(group, name):
  """Of kind ARRAYS is what shows in names and shapes, and nothing else is."""
  cfg = with_other(group, name)
  found = meaning.changes(base(), cfg)
  if name == "num_heads" and group == "connector":
    assert not found  # the base is no attention pool
    return
  (change,) = found
  prefix = {"": "model", "moe": "model.decoder.moe", "lora": "model.decoder.lora"}
  assert change.path == f"{prefix.get(group, f'model.{group}')}.{name}"
  assert str(change).startswith(f"{change.path}: ")
  assert (shapes(cfg) != shapes(base())) == (change.kind is Kind.ARRAYS or name == "kind")
  assert change.part == {"vision": "vit", "connector": "connector"}.get(group, "decoder")


def test_a_group_that_only_one_has_is_arrays():
  dense = tiny.model_config()
  found = {change.path: change.kind for change in meaning.changes(dense, base())}
  assert found == {"model.decoder.moe": Kind.ARRAYS, "model.decoder.lora": Kind.ARRAYS}


def test_meaningful_settings_are_listed():
  names = meaning.meaningful()
  assert {"model.decoder.rope_theta", "model.decoder.moe.top_k", "model.image_token_id"} <= set(
    names
  )
  assert "model.decoder.width" not in names
