# SPDX-License-Identifier: Apache-2.0
"""Overrides: any value of a config, by the type of its field; a wrong key says what was meant."""

import dataclasses
import functools
import operator

import pytest

from mm1_jax.config import ConfigError, RunConfig
from mm1_jax.config_files import ConfigFile
from mm1_jax.configs import common
from mm1_jax.overrides import is_switch, merge


def override(config: str, *texts: str) -> RunConfig:
  return ConfigFile.find(config).build(tuple(text.split("=", 1)) for text in texts)


def read(run: RunConfig, path: str):
  """Returns a value by its path; an entry of a list goes by its name, or its number."""

  def step(value, key: str):
    if isinstance(value, tuple):
      named = {getattr(one, "name", str(i)): one for i, one in enumerate(value)}
      return named[key]
    return getattr(value, key)

  return functools.reduce(step, path.split("."), run)


@pytest.mark.parametrize(
  ("config", "text", "value"),
  [
    # Numbers, words and switches.
    ("mm1_3b", "train.num_steps=20", 20),
    ("mm1_3b", "mesh.fsdp=-1", -1),
    ("mm1_3b", "optimizer.eps=1e-6", 1e-6),
    ("mm1_3b", "optimizer.clip_norm=1", 1.0),
    ("mm1_3b", "optimizer.name=adafactor", "adafactor"),
    ("mm1_3b", "model.scan=false", False),
    ("mm1_3b", "model.scan=True", True),
    ("mm1_3b", "model.decoder.qk_norm=1", True),
    ("mm1_3b", "name=a=b", "a=b"),
    # Texts stay texts.
    ("mm1_3b", "name=123", "123"),
    ("mm1_3b", "data.tokenizer=data/(1,2).model", "data/(1,2).model"),
    # None, and back.
    ("mm1_30b_moe", "model.decoder.moe.capacity_factor=None", None),
    ("mm1_3b", "optimizer.learning_rate=None", None),
    ("mm1_3b", "optimizer.vit_learning_rate=1e-5", 1e-5),
    ("mm1_debug", "model.image_group=None", None),
    ("mm1_3b", "model.image_group=8", 8),
    ("mm1_debug_sft", "train.init_from=None", None),
    ("mm1_debug_sft", "train.init_from=runs/debug", "runs/debug"),
    ("mm1_3b", "checkpoint.keep_period=None", None),
    # Lists.
    ("mm1_3b", "model.connector.token_grid=(8, 8)", (8, 8)),
    ("mm1_3b", "model.connector.token_grid=8,8", (8, 8)),
    ("mm1_3b", "model.connector.token_grid=[8,8]", (8, 8)),
    ("mm1_3b", "optimizer.frozen=vit,connector", ("vit", "connector")),
    ("mm1_3b", "optimizer.frozen=('vit',)", ("vit",)),
    ("mm1_3b", "optimizer.frozen=vit", ("vit",)),
    ("mm1_3b", "optimizer.frozen=()", ()),
    ("mm1_3b", "optimizer.frozen=", ()),
    # Keys of a group that is absent, and the group itself.
    ("mm1_3b", "model.decoder.lora.rank=8", 8),
    ("mm1_3b", "model.decoder.moe.num_experts=4", 4),
    ("mm1_3b", "model.decoder.rope_scaling.factor=4", 4.0),
    ("mm1_3b", "data.tiling.grid=None", None),
    ("mm1_30b_moe", "model.decoder.moe=None", None),
    ("mm1_5_sft", "data.tiling.last=1", 1),
    # Sources, by name.
    ("mm1_3b", "data.sources.text.weight=3", 3.0),
    ("mm1_3b", "data.sources.text.epochs=2", 2.0),
    ("mm1_3b", "data.sources.text.limit=100", 100),
    ("mm1_3b", "data.sources.text.path=gs://b/text-*", "gs://b/text-*"),
    ("mm1_3b", "data.eval_sources.text.path=x", "x"),
    ("mm1_5_sft", "data.sources.single.sources.math.sources.clevr.weight=7", 7.0),
  ],
)
def test_a_value_is_read_by_the_type_of_its_field(config, text, value):
  base, run = override(config), override(config, text)
  path = text.partition("=")[0]
  found = read(run, path)
  assert found == value
  assert type(found) is type(value)
  with_it = run.to_dict()
  changed = [k for k, v in flat(with_it).items() if flat(base.to_dict()).get(k, ...) != v]
  group = path.rpartition(".")[0]
  assert all(key.startswith(path) or key.startswith(group) for key in changed), changed


def flat(value, at: str = "") -> dict:
  if isinstance(value, dict) and value:
    return {k: v for key, one in value.items() for k, v in flat(one, f"{at}.{key}").items()}
  if isinstance(value, tuple) and value and isinstance(value[0], dict):
    return {k: v for one in value for k, v in flat(one, f"{at}.{one.get('name')}").items()}
  return {at.removeprefix("."): value}


def test_an_absent_group_comes_at_its_defaults():
  run = override("mm1_3b", "model.decoder.lora.rank=8")
  assert run.model.decoder.lora == dataclasses.replace(
    override("mm1_3b", "model.decoder.lora={}").model.decoder.lora, rank=8
  )
  assert run.model.decoder.lora.alpha == 32.0


def test_whole_groups_and_lists_are_taken():
  run = override(
    "mm1_3b",
    "data.sources={'mine': {'path': 'a-*', 'weight': 2}, 'web': {'path': 'b-*'}}",
    "data.reweight=[{'step': 10, 'weights': {'mine': 1}}]",
    "data.reweight.0.weights.mine=4",
    "data.reweight.0.step=20",
  )
  assert [(s.name, s.path, s.weight) for s in run.data.sources] == [
    ("mine", "a-*", 2.0),
    ("web", "b-*", 1.0),
  ]
  assert [(r.step, r.weights) for r in run.data.reweight] == [(20, (("mine", 4.0),))]


def test_the_last_of_equal_keys_counts_and_all_are_judged_together():
  """Either of the first two alone would not fit."""
  run = override(
    "mm1_debug",
    "train.num_steps=3",
    "model.decoder.num_heads=6",
    "model.decoder.num_kv_heads=3",
    "train.num_steps=4",
  )
  assert (run.train.num_steps, run.model.decoder.num_heads) == (4, 6)


def test_sources_of_a_list_go_by_their_names_too():
  """As in the config.json of a run."""
  values = override("mm1_debug").to_dict()
  merged = merge(values, [("data.sources.text.weight", "3")])
  assert [s.weight for s in RunConfig.from_dict(merged).data.sources] == [0.45, 0.45, 3.0]
  assert RunConfig.from_dict(values) == override("mm1_debug")  # which is as it was


@pytest.mark.parametrize(
  ("text", "says"),
  [
    ("train.num_stpes=3", r"unknown key 'train\.num_stpes' = '3'; did you mean 'num_steps'\? The"),
    ("train.zzz=3", r"unknown key 'train\.zzz' = '3'; the keys here are \['accumulation_steps', "),
    (
      "num_steps=3",
      r"did you mean 'train\.num_steps'\? The keys here are \['checkpoint', 'data', ",
    ),
    ("model.decoder.lora.rnk=8", r"'model\.decoder\.lora\.rnk' .* mean 'rank'\? .* \['alpha', "),
    ("model.decoder.moe.experts=8", r"mean 'num_experts'\? The keys here are \['balance_loss', "),
    ("data.sources.txt.weight=1", r"data\.sources has no 'txt'; did you mean 'text'\? It has \['c"),
    ("data.sources.text.wieght=1", r"'data\.sources\.text\.wieght' .* did you mean 'weight'\?"),
    ("train.num_steps.x=3", r"'train\.num_steps\.x' is no key: train\.num_steps is a single value"),
    ("model.vision.image_size.0=3", r"model\.vision\.image_size is a single value; set it whole"),
    ("train.num_steps=3.5", r"train\.num_steps is '3\.5'; it must be of type int"),
    ("train.num_steps=", r"train\.num_steps is ''; it must be of type int"),
    ("model.scan=maybe", r"model\.scan is 'maybe'; it must be of type bool"),
    ("optimizer.b1=None", r"optimizer\.b1 is None; it must be of type float"),
    ("data.tokenizer=None", r"data\.tokenizer is None; it must be of type str"),
    ("optimizer.b1=nan", r"optimizer\.b1 nan must lie in \[0, 1\)"),
    ("optimizer.name=lion", r"optimizer\.name is 'lion'; it must be one of \['adamw', 'adafactor'"),
    ("model.decoder.moe=8", r"model\.decoder\.moe.* is 8; it must be a group of settings"),
    ("model.connector.token_grid=8", r"token_grid is \(8,\); it must have 2 entries"),
    ("model.connector.token_grid=8,x", r"token_grid\[1\] is 'x'; it must be of type int"),
    ("data.reweight.0.step=3", r"data\.reweight has no '0'; It has \[\]"),
    ("=3", r"unknown key '' = '3'; "),
    ("train.=3", r"unknown key 'train\.' = '3'; "),
  ],
)
def test_a_mistake_is_said(text, says):
  with pytest.raises(ConfigError, match=says):
    override("mm1_3b", text)


def test_switches_are_told_from_other_keys():
  assert is_switch("model.scan")
  assert is_switch("model.decoder.qk_norm")
  assert not is_switch("train.num_steps")
  assert not is_switch("no.such.key")


def test_mixtures_of_common_can_be_overridden():
  config = common.pretrain("x")
  config.data.sources = common.mixture("data", common.MM1_VECAP)
  values = merge(config.to_dict(), [("data.sources.captions.sources.vecap.weight", "0.93")])
  leaves = {s.name: s.weight for s in RunConfig.from_dict(values).data.leaves}
  assert leaves["captions/vecap"] == pytest.approx(leaves["captions/web"])
  assert operator.attrgetter("data.sources.captions.sources.vecap.weight")(config) == 0.07
