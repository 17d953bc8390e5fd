# SPDX-License-Identifier: Apache-2.0
"""Configs: every file loads, has the size its name promises, and says what is wrong with a mistake.

Full-size models are built by shape only (`jax.eval_shape`): no array is made.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import types
import typing
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from mm1_jax import untrusted
from mm1_jax.config import (
  ConfigError,
  ConnectorConfig,
  DataConfig,
  DecoderConfig,
  EvalTaskConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  ReweightConfig,
  RunConfig,
  SourceConfig,
  TrainConfig,
  UserError,
  VisionConfig,
)
from mm1_jax.configs import (
  common,
  mm1_3b,
  mm1_3b_moe,
  mm1_5_continual,
  mm1_5_sft,
  mm1_7b,
  mm1_7b_moe,
  mm1_30b,
  mm1_30b_moe,
  mm1_debug,
  mm1_debug_sft,
  mm1_demo,
  mm1_demo_sft,
  mm1_proxy,
  mm1_sft,
)
from mm1_jax.models.mm1 import MM1
from mm1_jax.plan.topology import find_topology
from mm1_jax.ranges import Range
from mm1_jax.sharding import make_mesh
from mm1_jax.train import optimizer
from tests.helpers import fuzz

FAMILY = (mm1_3b, mm1_7b, mm1_30b, mm1_3b_moe, mm1_7b_moe, mm1_30b_moe)
GOLDENS = pathlib.Path(__file__).parent / "goldens" / "configs"
REPO = pathlib.Path(__file__).parent.parent

CONFIGS = {
  "mm1_3b": mm1_3b.get_config,
  "mm1_3b_moe": mm1_3b_moe.get_config,
  "mm1_7b": mm1_7b.get_config,
  "mm1_7b_moe": mm1_7b_moe.get_config,
  "mm1_30b": mm1_30b.get_config,
  "mm1_30b_moe": mm1_30b_moe.get_config,
  "mm1_debug": mm1_debug.get_config,
  "mm1_debug_moe": functools.partial(mm1_debug.get_config, "moe"),
  "mm1_debug_sft": mm1_debug_sft.get_config,
  "mm1_debug_moe_sft": functools.partial(mm1_debug_sft.get_config, "moe"),
  "mm1_demo": mm1_demo.get_config,
  "mm1_demo_sft": mm1_demo_sft.get_config,
  **{
    f"mm1_proxy_{size}": functools.partial(mm1_proxy.get_config, size) for size in mm1_proxy.SIZES
  },
  **{f"mm1_sft_{model}": functools.partial(mm1_sft.get_config, model) for model in mm1_sft.MODELS},
  "mm1_sft_3b_mm1_high_res": functools.partial(mm1_sft.get_config, "3b,mm1,high_res"),
  "mm1_sft_3b_lora": functools.partial(mm1_sft.get_config, "3b,lora"),
  "mm1_5_continual_3b": mm1_5_continual.get_config,
  "mm1_5_sft_3b": mm1_5_sft.get_config,
}


def load(name: str) -> RunConfig:
  return RunConfig.from_dict(CONFIGS[name]().to_dict())


@functools.cache
def shapes(model: ModelConfig) -> MM1:
  """Returns the model by shape only."""
  with jax.set_mesh(make_mesh(RunConfig(model=model))):
    return jax.eval_shape(lambda: MM1(jax.random.key(0), model))


def size(tree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def flat(run: RunConfig) -> str:
  """Returns `key: value` lines, sorted; paths inside the repository are relative to it."""

  def lines(prefix: str, value):
    if isinstance(value, dict) and value:
      for key, entry in value.items():
        yield from lines(f"{prefix}.{key}" if prefix else key, entry)
    elif isinstance(value, tuple | list) and value and isinstance(value[0], dict):
      for entry in value:
        yield from lines(f"{prefix}.{entry['name']}", entry)
    else:
      if isinstance(value, str):
        value = value.replace(f"{REPO}/", "")
      yield f"{prefix}: {value!r}"

  return "\n".join(sorted(lines("", run.to_dict()))) + "\n"


@pytest.mark.parametrize("size", [(378, 378), (448, 448), (560, 560), (672, 672), (448, 672)])
def test_every_resolution_takes_144_tokens_and_the_same_params(size):
  """Positions are resized: a checkpoint of 378 pixels fits any other size (section 4.1)."""
  model = load("mm1_3b").model
  larger = dataclasses.replace(model, vision=dataclasses.replace(model.vision, image_size=size))
  saved, wanted = ([x.shape for x in jax.tree.leaves(shapes(m))] for m in (model, larger))
  assert saved == wanted
  images = jax.ShapeDtypeStruct((8, 2, *size, 3), "uint8")
  with jax.set_mesh(make_mesh(RunConfig(model=larger))):
    tokens = jax.eval_shape(lambda model, images: model.embed_image(images), shapes(larger), images)
  assert tokens.shape == (8, 2 * 144, 3072)


def test_continual_pretraining_is_mm1_5s():
  """Documents at 1344 x 1344 (720 tokens), all text a target, and no room that is lost."""
  run, first, last = load("mm1_5_continual_3b"), load("mm1_3b"), load("mm1_5_sft_3b")
  assert [source.weight for source in run.data.leaves] == [0.25] * 4
  assert run.data.weight_by == last.data.weight_by == "examples"
  assert run.data.tiling is not None
  slots = run.data.tiling.max_slots
  assert slots * run.model.connector.num_tokens == 720
  assert run.data.images_per_row == 4 * slots
  assert not run.data.chat
  assert run.model.vision == last.model.vision
  assert run.model.decoder == first.model.decoder
  assert not run.optimizer.frozen


# Every file of configs/.


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_what_the_golden_file_says(name):
  """A changed default or a changed shared piece shows as a diff of every config it reaches."""
  golden = GOLDENS / f"{name}.txt"
  text = flat(load(name))
  if os.environ.get("UPDATE_GOLDENS"):
    golden.parent.mkdir(parents=True, exist_ok=True)
    golden.write_text(text)
  assert golden.exists(), f"{golden} is missing; UPDATE_GOLDENS=1 pytest tests/config_test.py"
  assert text == golden.read_text(), (
    f"{name} changed. If you did not mean to change what a run does, this is a bug. If you did: "
    "UPDATE_GOLDENS=1 pytest tests/config_test.py"
  )


def test_sft_mixtures_have_the_papers_counts():
  """MM1's 1.46M examples; MM1.5's shares, with groups that add up as the paper says (Fig. 4)."""
  assert sum(common.MM1_SFT.values()) == 1460
  single, multi, text = (common.MM1_5_SFT[group] for group in ("single", "multi", "text"))
  assert (single[0], multi[0], text[0]) == (0.8, 0.1, 0.1)
  shares = {name: share for name, (share, _) in single[1].items()}
  assert sum(shares.values()) == pytest.approx(80.0)
  data = load("mm1_5_sft_3b").data
  by_name = {source.name: source.weight for source in data.leaves}
  assert sum(by_name.values()) == pytest.approx(1)
  rich = sum(w for name, w in by_name.items() if name.startswith("single/text_rich/"))
  assert rich == pytest.approx(0.372)
  counts = single[1]["text_rich"][1]
  assert by_name["single/text_rich/dvqa"] == pytest.approx(
    0.372 * counts["dvqa"] / sum(counts.values())
  )


def test_high_resolution_sft_has_room_for_its_pictures():
  """MM1: 720 tokens a picture of 1344 x 1344. MM1.5: at most 1440."""
  mm1, mm1_5 = load("mm1_sft_3b_mm1_high_res"), load("mm1_5_sft_3b")
  for run, tokens in ((mm1, 720), (mm1_5, 1440)):
    assert run.model.vision.image_size == (672, 672)
    assert run.data.tiling.max_slots * run.model.connector.num_tokens == tokens


def test_every_config_file_is_tested():
  """A config file that no test loads rots first."""
  files = {path.stem for path in (REPO / "configs").glob("mm1_*.py")}
  tested = {getattr(f, "func", f).__module__.rpartition(".")[2] for f in CONFIGS.values()}
  assert files == tested


def test_no_golden_file_is_left_over():
  assert {path.stem for path in GOLDENS.glob("*.txt")} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_values_survive_a_round_trip_through_json(name):
  """A checkpoint's config.json must read back as the very same run."""
  run = load(name)
  assert RunConfig.from_dict(run.to_dict()) == run
  assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_an_unknown_variant_is_named():
  with pytest.raises(ValueError, match=r"no size '7m'; choose one of .*'9m'"):
    mm1_proxy.get_config("7m")
  with pytest.raises(ValueError, match=r"no '13b'; choose one of .*'30b_moe'"):
    mm1_sft.get_config("13b")
  with pytest.raises(ValueError, match="'dense' or 'moe', not 'sparse'"):
    mm1_debug.get_config("sparse")


@pytest.mark.parametrize("model", mm1_sft.MODELS)
def test_sft_keeps_the_model_and_changes_the_rest(model):
  """Params of a pre-training run load into its SFT only if the models are equal."""
  pretrained, sft = load(f"mm1_{model}"), load(f"mm1_sft_{model}")
  assert sft.model == pretrained.model
  assert (sft.data.batch_size, sft.data.seq_len, sft.train.num_steps) == (256, 2048, 10_000)
  assert sft.optimizer.name == "adafactor"
  assert (pretrained.data.weight_by, sft.data.weight_by) == ("positions", "examples")
  assert [source.name for source in sft.data.sources] == ["sft"]


def test_the_mixture_is_45_45_10():
  weights = {source.name: source.weight for source in load("mm1_30b_moe").data.leaves}
  assert weights == pytest.approx({"captions": 0.45, "interleaved": 0.45, "text": 0.10})


def test_mixtures_of_the_papers():
  def shares(mixture) -> dict[str, float]:
    config = common.pretrain("x")
    config.data.sources = common.mixture("data", mixture)
    return {s.name: s.weight for s in RunConfig.from_dict(config.to_dict()).data.leaves}

  assert shares(common.MM1_5) == pytest.approx({"captions": 0.5, "interleaved": 0.1, "text": 0.4})
  assert shares(common.MM1_VECAP) == pytest.approx(
    {"captions/web": 0.4185, "captions/vecap": 0.0315, "interleaved": 0.45, "text": 0.10}
  )


def test_a_source_in_a_group_can_be_overridden():
  """As `--config.data.sources.captions.sources.vecap.weight=0.5` does."""
  config = common.pretrain("x")
  config.data.sources = common.mixture("data", common.MM1_VECAP)
  config.data.sources.captions.sources.vecap.weight = 0.93
  config.data.sources.captions.sources.vecap.epochs = 2
  leaves = {s.name: s for s in RunConfig.from_dict(config.to_dict()).data.leaves}
  assert leaves["captions/vecap"].weight == pytest.approx(0.225)
  assert leaves["captions/vecap"].epochs == 2.0
  assert leaves["captions/vecap"].path == "data/captions_vecap-train-*.arrayrecord"


def test_weights_that_change_at_steps():
  """What a change does not name keeps its weight; a group's sources keep their proportions."""
  config = common.pretrain("x")
  config.data.sources = common.mixture("data", {**common.MM1_VECAP, "text": 0.10})
  config.data.reweight = (
    {"step": 100, "weights": {"captions": 0.5, "interleaved": 0.1, "text": 0.4}},
    {"step": 200, "weights": {"captions/vecap": 0.93, "interleaved": 0.0}},
  )
  run = RunConfig.from_dict(config.to_dict())
  assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run
  assert hash(run) == hash(RunConfig.from_dict(run.to_dict()))  # `train_step` is compiled for it
  data = run.data
  assert data.shares(99) == data.shares(0) == pytest.approx((0.0315, 0.4185, 0.45, 0.10))
  assert data.shares(100) == data.shares(199) == pytest.approx((0.035, 0.465, 0.1, 0.4))
  assert data.shares(200) == pytest.approx((0.5 / 2 / 0.9, 0.5 / 2 / 0.9, 0, 0.4 / 0.9))


def reweighted(*changes: tuple[int, dict[str, float]]) -> DataConfig:
  group = SourceConfig("captions", sources=(SourceConfig("web", "x"), SourceConfig("vecap", "x")))
  return DataConfig(
    sources=(group, SourceConfig("text", "x")),
    reweight=tuple(ReweightConfig(step, tuple(weights.items())) for step, weights in changes),
  )


def test_a_named_source_can_be_overridden():
  """Sources are given by name, so that the command line can change one of them."""
  config = common.pretrain("x")
  config.data.sources.captions.path = "mine/*.arrayrecord"
  run = RunConfig.from_dict(config.to_dict())
  paths = {source.name: source.path for source in run.data.sources}
  assert paths["captions"] == "mine/*.arrayrecord"
  assert paths["text"] == "data/text-train-*.arrayrecord"


# Sizes: the numbers of the recipe, from the shapes of the real model.

# Decoder params in all, and active for a token.
DECODERS = {
  "mm1_3b": (2.7e9, 2.7e9),
  "mm1_3b_moe": (63.6e9, 3.7e9),
  "mm1_7b": (6.7e9, 6.7e9),
  "mm1_7b_moe": (46.4e9, 8.0e9),
  "mm1_30b": (29.8e9, 29.8e9),
  "mm1_30b_moe": (119e9, 35.7e9),
  "mm1_proxy_1b": (1.33e9, 1.33e9),  # "1B" in MM1.5
}


def active(decoder, moe: MoEConfig | None) -> int:
  """Returns a decoder's params without the experts that a token does not visit."""
  if moe is None:
    return size(decoder)
  experts = decoder.units.layers[-1].mlp
  experts = size((experts.gate, experts.up, experts.down))
  return size(decoder) - experts + experts * moe.top_k // moe.num_experts


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_has_the_size_of_its_name(name):
  run = load(name)
  total, active_total = DECODERS[name]
  decoder = shapes(run.model).decoder
  assert size(decoder) == pytest.approx(total, rel=0.02)
  assert active(decoder, run.model.decoder.moe) == pytest.approx(active_total, rel=0.02)


@pytest.mark.parametrize(
  ("name", "expected"), [("9m", 9e6), ("85m", 85e6), ("302m", 302e6)], ids=lambda x: str(x)
)
def test_proxy_has_the_size_of_its_name_without_the_embedding(name, expected):
  decoder = shapes(load(f"mm1_proxy_{name}").model).decoder
  assert size(decoder) - size(decoder.embedding) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("name", ["mm1_3b", "mm1_3b_moe", "mm1_proxy_85m"])
def test_learning_rate_law_counts_the_params_that_exist(name):
  """`backbone_params` counts by formula: the dense decoder without embedding and norms."""
  cfg = load(name).model
  dense = dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, moe=None))
  units = shapes(dense).decoder.units
  matrices = [leaf for leaf in jax.tree.leaves(units) if leaf.ndim > 2]
  assert optimizer.backbone_params(cfg.decoder) == size(matrices)


def test_image_encoder_is_vit_h():
  assert size(shapes(load("mm1_3b").model).vit) == pytest.approx(631e6, rel=0.01)


def test_image_encoder_of_the_proxies_is_vit_l():
  assert size(shapes(load("mm1_proxy_9m").model).vit) == pytest.approx(303.5e6, rel=0.01)


def test_blocks_past_the_feature_layer_are_not_built():
  """They would cost memory and optimizer state, and get no gradient."""
  cfg = load("mm1_3b").model
  earlier = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, feature_layer=-2))
  blocks = shapes(cfg).vit.blocks
  assert size(shapes(cfg).vit) - size(shapes(earlier).vit) == size(blocks) // 32


@pytest.mark.parametrize(
  ("name", "expected"), [("mm1_3b", 31.1e6), ("mm1_7b", 39.4e6), ("mm1_30b", 77.2e6)]
)
def test_c_abstractor_has_honeybees_size(name, expected):
  connector = shapes(load(name).model).connector
  assert size(connector) == pytest.approx(expected, rel=0.01)


def test_tokens_per_image_and_row():
  run = load("mm1_30b")
  assert run.model.connector.num_tokens == 144
  assert run.image_positions == 146
  assert run.model.vision.grid == (27, 27)
  assert run.model.vision.num_patches == 729
  no_delimiters = dataclasses.replace(run.data, image_delimiters=False)
  assert dataclasses.replace(run, data=no_delimiters).image_positions == 144


# Mistakes: the message names the key, its value, and what would fit.


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"modle": {}}, r"unknown key 'modle' = \{\}; did you mean 'model'\?"),
    (
      {"model": {"decoder": {"zoom": 12}}},
      r"unknown key 'model\.decoder\.zoom' = 12; the keys here are \['depth', 'head_dim'",
    ),
    (
      {"model": {"decoder": {"moe": {"n_experts": 8}}}},
      r"unknown key 'model\.decoder\.moe\.n_experts' = 8; did you mean 'num_experts'\?",
    ),
    (
      {"data": {"sources": [{"name": "a", "path": "b", "wieght": 1.0}]}},
      r"unknown key 'data\.sources\[0\]\.wieght' = 1\.0; did you mean 'weight'\?",
    ),
    ({"model": 3}, r"model.* is 3; it must be a group of settings"),
    ({"data": {"batch_size": 8.0}}, r"data\.batch_size is 8\.0; it must be of type int"),
    ({"data": {"batch_size": "8"}}, r"data\.batch_size is '8'; it must be of type int"),
    ({"data": {"batch_size": True}}, r"data\.batch_size is True; it must be of type int"),
    ({"data": {"image_delimiters": 1}}, r"data\.image_delimiters is 1; it must be of type bool"),
    ({"optimizer": {"b1": "0.9"}}, r"optimizer\.b1 is '0\.9'; it must be of type float"),
    ({"optimizer": {"b1": True}}, r"optimizer\.b1 is True; it must be of type float"),
    ({"optimizer": {"b1": None}}, r"optimizer\.b1 is None; it must be of type float"),
    ({"train": {"init_from": 3}}, r"train\.init_from is 3; it must be of type str"),
    (
      {"model": {"remat": "qkv+host:mlp"}},
      r"model\.remat 'qkv\+host:mlp' names 'host:mlp'; .* joined by \+, .* mlp_gate, mlp_up",
    ),
    (
      {"model": {"vision": {"image_size": 378}}},
      r"model\.vision\.image_size is 378; it must be a list",
    ),
    (
      {"model": {"vision": {"image_size": [378, 378, 3]}}},
      r"model\.vision\.image_size is \[378, 378, 3\]; it must have 2 entries",
    ),
    (
      {"model": {"vision": {"image_size": [378, 378.0]}}},
      r"model\.vision\.image_size\[1\] is 378\.0; it must be of type int",
    ),
    ({"optimizer": {"frozen": "vit"}}, r"optimizer\.frozen is 'vit'; it must be a list"),
  ],
)
def test_unknown_keys_and_wrong_types_are_named(values, message):
  with pytest.raises(ConfigError, match=message):
    RunConfig.from_dict(values)


def test_whole_numbers_and_lists_are_taken_for_floats_and_tuples():
  run = RunConfig.from_dict(
    {
      "optimizer": {"clip_norm": 1, "learning_rate": 1},
      "model": {"connector": {"token_grid": [8, 8]}},
    }
  )
  assert run.optimizer.clip_norm == 1.0
  assert isinstance(run.optimizer.clip_norm, float)
  assert isinstance(run.optimizer.learning_rate, float)
  assert run.model.connector.token_grid == (8, 8)


source = functools.partial(SourceConfig, path="x")


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: VisionConfig(image_size=(378, 380)),
      r"image_size \(378, 380\) must be a multiple of patch_size 14 .*: 378 or 392 would fit",
    ),
    (lambda: VisionConfig(num_heads=17), r"width 1280 must be a multiple of num_heads 17"),
    (lambda: VisionConfig(feature_layer=-33), r"feature_layer -33 must lie in \[-32, -1\]"),
    (
      lambda: ConnectorConfig(kind="attention_pool", hidden=100),
      r"connector\.hidden 100 must be a multiple of num_heads 16",
    ),
    (lambda: MoEConfig(num_experts=4, top_k=5), r"top_k 5 must lie in \[1, num_experts = 4\]"),
    (lambda: DecoderConfig(num_kv_heads=7), r"num_heads 24 must be a multiple of num_kv_heads 7"),
    (lambda: DecoderConfig(head_dim=127), r"head_dim 127 must be even"),
    (
      lambda: DecoderConfig(moe=MoEConfig(every=4)),
      r"depth 26 must be a multiple of moe\.every 4: 24 or 28 would fit",
    ),
    (
      lambda: ModelConfig(connector=ConnectorConfig(kind="mlp")),
      r"kind 'mlp' keeps one token per patch, so token_grid \(12, 12\) must equal the patch grid "
      r"\(27, 27\)",
    ),
    (
      lambda: ModelConfig(connector=ConnectorConfig(token_grid=(12, 28))),
      r"token_grid \(12, 28\) is finer than the encoder's patch grid \(27, 27\); use at most "
      r"\(27, 27\), or a larger model\.vision\.image_size",
    ),
    (
      lambda: ModelConfig(image_token_id=49152),
      r"image_token_id 49152 must lie in \[0, vocab_size = 49152\)",
    ),
    (lambda: SourceConfig("a"), r"source 'a' has neither 'path' nor 'sources'"),
    (lambda: source("a", sources=(source("b"),)), r"source 'a' has both 'path' and 'sources'"),
    (
      lambda: SourceConfig("a", sources=(source("b"),), epochs=2.0),
      r"source 'a' is a group and has no epochs of its own; set them for its sources",
    ),
    (
      lambda: DataConfig(sources=(source("a/b"),)),
      r"data\.sources has the name 'a/b'; a name has no",
    ),
    (
      lambda: DataConfig(sources=(SourceConfig("a", sources=(source("b"), source("b"))),)),
      r"data\.sources\.a\.sources names \['b'\] more than once",
    ),
    (
      lambda: DataConfig(eval_sources=(SourceConfig("a", sources=(source("b"),)),)),
      r"data\.eval_sources\.a is a group",
    ),
    (
      lambda: DataConfig(eval_sources=(source("a", limit=3),)),
      r"data\.eval_sources\.a has epochs or a limit, but is evaluated whole",
    ),
    (
      lambda: DataConfig(sources=(source("a", weight=0.0),)),
      r"all of data\.sources have weight 0 at step 0",
    ),
    (
      lambda: reweighted((10, {"captions/veccap": 1.0})),
      r"reweight at step 10 names 'captions/veccap'; did you mean 'captions/vecap'\? The "
      r"sources are \['captions', 'captions/web', 'captions/vecap', 'text'\]",
    ),
    (
      lambda: reweighted((20, {}), (10, {})),
      r"data\.reweight has steps \[20, 10\]; they must ascend",
    ),
    (
      lambda: reweighted((5, {"text": 0.0, "captions": 0.0})),
      r"all of data\.sources have weight 0 at step 5",
    ),
    (
      lambda: DataConfig(sources=(source(name="a"), source(name="a"), source(name="b"))),
      r"data\.sources names \['a'\] more than once",
    ),
    (
      lambda: OptimizerConfig(frozen=("vision",)),
      r"frozen names 'vision'; the parts are \('vit', 'connector', 'decoder'\)",
    ),
    (
      lambda: OptimizerConfig(frozen=("vit", "connector", "decoder")),
      r"frozen leaves nothing to train",
    ),
    (lambda: MeshConfig(fsdp=0), r"mesh\.fsdp 0 must be at least 1, or -1"),
    (
      lambda: RunConfig(data=DataConfig(seq_len=100, images_per_row=0)),
      r"data\.seq_len 100 cannot hold one image of 146 positions",
    ),
    (
      lambda: RunConfig(data=DataConfig(images_per_row=29)),
      r"images_per_row 29: a row of 4096 positions holds at most 28 images of 146 positions",
    ),
    (
      lambda: RunConfig(train=TrainConfig(accumulation_steps=3)),
      r"data\.batch_size 512 must be a multiple of train\.accumulation_steps 3",
    ),
  ],
)
def test_what_does_not_fit_together_is_refused(make, message):
  with pytest.raises(ConfigError, match=message):
    make()


def groups(cls: type = RunConfig) -> Iterator[type]:
  """Yields all dataclasses of a config."""
  yield cls
  for hint in typing.get_type_hints(cls).values():
    for part in (hint, *typing.get_args(hint)):
      if dataclasses.is_dataclass(part) and part is not cls:
        yield from groups(part)


def numbers(hint: Any, wrap=lambda number: number) -> Iterator[tuple[type, Range | None, Any]]:
  """Yields a field's numbers: type, range, and what puts one where it belongs in the field."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint in (int, float):
    yield hint, None, wrap
  elif origin is typing.Annotated:
    yield args[0], args[1], wrap
  elif origin is tuple and args[-1] is Ellipsis:
    yield from numbers(args[0], lambda number: wrap((number,)))
  elif origin is tuple:
    good = ["a" if arg is str else 1 for arg in args]
    for i, arg in enumerate(args):
      yield from numbers(arg, lambda x, i=i: wrap((*good[:i], x, *good[i + 1 :])))
  else:
    for arg in args if origin in (types.UnionType, typing.Union) else ():
      yield from numbers(arg, wrap)


NUMBERS = {
  f"{cls.__name__}.{name}-{i}": (cls, name, *found)
  for cls in dict.fromkeys(groups())
  for name, hint in typing.get_type_hints(cls, include_extras=True).items()
  for i, found in enumerate(numbers(hint))
}


def refused(bounds: Range, kind: type) -> list[Any]:
  """Returns numbers that are just outside a range, far outside, or no numbers."""
  last, least = np.float32(np.inf), -np.float32(np.inf)
  found = [math.nan, math.inf, -math.inf, 1e39, -1e39, "1", True]
  if kind is int:
    found += [2**40, -(2**40), 1.0]
    found += [x for x in (bounds.at_least - 1, bounds.at_most + 1) if math.isfinite(x)]
  else:
    found += [10**400]
    found += [float(np.nextafter(np.float32(x), least)) for x in (bounds.at_least, bounds.above)]
    found += [float(np.nextafter(np.float32(x), last)) for x in (bounds.at_most, bounds.below)]
  return found + [x for x in (bounds.above, bounds.below) if math.isfinite(x)]


@pytest.mark.parametrize("name", NUMBERS)
def test_each_number_has_a_range_and_nothing_outside_is_taken(name):
  """However a group is made; the message has the number's path, its value and the range."""
  cls, field, kind, bounds, wrap = NUMBERS[name]
  assert bounds is not None, f"{name} has no range; see mm1_jax/ranges.py"
  needed = {EvalTaskConfig: ("a",), SourceConfig: ("a", "x"), ReweightConfig: (1, (("a", 1.0),))}
  good = cls(*needed.get(cls, ()))
  for bad in refused(bounds, kind):
    with pytest.raises(ConfigError) as error:
      dataclasses.replace(good, **{field: wrap(bad)})
    message = str(error.value)
    path = {SourceConfig: f"data source 'a': {field}"}.get(cls, field)
    assert path in message
    assert str(bounds) in message or f"must be of type {kind.__name__}" in message
    assert (repr(bad) if isinstance(bad, str) else str(bad)) in message
    values = {field: wrap(bad)}
    for group in reversed(cls._where.split(".")[:-1] if cls not in needed else []):
      values = {group: values}
    with pytest.raises(ConfigError):
      RunConfig.from_dict(values)


def test_numbers_that_mean_something_at_a_bound_are_taken():
  OptimizerConfig(b1=0.0, b2=0.0, final_fraction=1.0, weight_decay=0.0, warmup_steps=0)
  OptimizerConfig(learning_rate=0.0, vit_learning_rate=1e30, clip_norm=None)
  DataConfig(max_drop_fraction=1, images_per_row=0, seed=2**32 - 1)
  TrainConfig(num_steps=2**31 - 1, z_loss=0.0)
  DecoderConfig(norm_eps=1e-12, rope_theta=1e12)
  MeshConfig(data=-1, fsdp=1)


def test_no_clipping_is_none_and_the_message_says_so():
  with pytest.raises(
    ConfigError,
    match=r"optimizer\.clip_norm 0\.0 must lie in \(0, inf\), or be None, which clips nothing\.",
  ):
    OptimizerConfig(clip_norm=0.0)


# The mesh, and the presets of slices.


@pytest.mark.parametrize("module", FAMILY, ids=lambda module: module.__name__.rpartition(".")[2])
def test_presets_divide_over_their_slices(module):
  assert {slice_name.partition("-")[0] for slice_name in module.SLICES} >= {"v5p", "v6e", "tpu7x"}
  for slice_name in module.SLICES:
    run = RunConfig.from_dict(module.get_config(slice_name).to_dict())
    run.check_mesh(find_topology(slice_name).num_devices)
    assert (run.data.batch_size, run.data.seq_len) == (512, 4096)


def test_a_slice_without_a_preset_is_said():
  with pytest.raises(ValueError, match=r"mm1_3b has no preset for 'v5p-8', only for v5e-256, v5p-"):
    mm1_3b.get_config("v5p-8")


@pytest.mark.parametrize(
  ("mesh", "sizes"),
  [
    (MeshConfig(), (1, 8, 1, 1, 1)),
    (MeshConfig(expert=2, tensor=2), (1, 2, 2, 2, 1)),
    (MeshConfig(data=-1, fsdp=2), (4, 2, 1, 1, 1)),
    (MeshConfig(data=2, fsdp=2, sequence=2), (2, 2, 1, 1, 2)),
  ],
)
def test_mesh_takes_what_is_left(mesh, sizes):
  assert mesh.resolve(8) == sizes


@pytest.mark.parametrize(
  ("mesh", "message"),
  [
    (MeshConfig(data=-1), r"mesh -1x-1x1x1x1 has more than one -1"),
    (
      MeshConfig(tensor=3),
      r"mesh 1x-1x1x3x1 .* multiply to 3, which does not divide the 8 devices",
    ),
    (MeshConfig(fsdp=4), r"mesh 1x4x1x1x1 .* needs 4 devices; there are 8\. Set one axis to -1"),
    (MeshConfig(fsdp=4, tensor=4), r"mesh 1x4x1x4x1 .* needs 16 devices; there are 8"),
  ],
)
def test_mesh_that_does_not_fit_the_devices_is_refused(mesh, message):
  with pytest.raises(ConfigError, match=message):
    mesh.resolve(8)


@pytest.mark.parametrize(
  ("run", "message"),
  [
    (
      {"data": {"batch_size": 12, "images_per_row": 0}},
      r"data\.batch_size / train\.accumulation_steps 12 does not divide over mesh axes data x fsdp "
      r"x expert = 8; 8 or 16 would fit",
    ),
    (
      {"train": {"accumulation_steps": 128}},
      r"train\.accumulation_steps 4 does not divide over .* = 8; 8 would fit",
    ),
    (
      {"model": {"decoder": {"width": 100}}},
      r"model\.decoder\.width 100 does not divide over mesh axes fsdp x expert x sequence = 8; "
      r"96 or 104",
    ),
    ({"model": {"vision": {"width": 60, "num_heads": 4}}}, r"vision\.width 60 .* 56 or 64"),
    ({"model": {"connector": {"hidden": 1020}}}, r"connector\.hidden 1020 .* 1016 or 1024"),
    (
      {"model": {"decoder": {"num_heads": 6, "num_kv_heads": 2}}, "mesh": {"tensor": 4}},
      r"model\.decoder\.num_heads 6 does not divide over mesh axes tensor = 4; 4 or 8 would fit",
    ),
    (
      {"data": {"seq_len": 4098}, "mesh": {"sequence": 4}},
      r"data\.seq_len 4098 does not divide over mesh axes sequence = 4; 4096 or 4100 would fit",
    ),
    (
      {"model": {"decoder": {"num_kv_heads": 2}}, "mesh": {"tensor": 4}},
      r"decoder\.num_kv_heads 2 does not divide over mesh axes tensor = 4; 4 would fit",
    ),
    (
      {"model": {"decoder": {"mlp_dim": 101}}, "mesh": {"tensor": 2}},
      r"decoder\.mlp_dim 101 .* 100 or 102",
    ),
    (
      {"model": {"decoder": {"vocab_size": 101}}, "mesh": {"tensor": 2}},
      r"decoder\.vocab_size 101 .* 100 or 102",
    ),
    (
      {"model": {"vision": {"num_heads": 5}}, "mesh": {"tensor": 2}},
      r"vision\.num_heads 5 .* 4 or 6",
    ),
    (
      {"model": {"vision": {"mlp_dim": 101}}, "mesh": {"tensor": 2}},
      r"vision\.mlp_dim 101 .* 100 or 102",
    ),
    (
      {"model": {"decoder": {"moe": {"num_experts": 6}}}, "mesh": {"expert": 4}},
      r"moe\.num_experts 6 does not divide over mesh axes expert = 4; 4 or 8 would fit",
    ),
    (
      {"model": {"decoder": {"mlp_dim": 100, "moe": {}}}},
      r"decoder\.mlp_dim 100 does not divide over mesh axes tensor x fsdp x sequence = 8; "
      r"96 or 104",
    ),
  ],
)
def test_run_that_does_not_divide_over_its_mesh_is_refused(run, message):
  """The same mistake found by the partitioner is a page of HLO, after minutes."""
  with pytest.raises(ConfigError, match=message):
    RunConfig.from_dict(run).check_mesh(8)


def test_changed_configs_by_seed():
  """What a run's config.json may have become: a config, or one error."""
  data = json.dumps(mm1_debug.get_config("moe").to_dict()).encode()

  def read(data: bytes) -> None:
    RunConfig.from_dict(untrusted.parse_json(data, "'config.json'", UserError))

  assert fuzz.strays(fuzz.mutations(data, 400, seed=0), read, UserError) == []


def test_an_entry_without_its_name_is_refused():
  with pytest.raises(
    ConfigError, match=r"data\.sources\[0\]\.name is not given; it has no default"
  ):
    RunConfig.from_dict({"data": {"sources": [{"path": "x"}]}})


@pytest.mark.parametrize(
  ("group", "values"),
  [
    (("data",), {"batch_size": 2_000_000_000}),
    (("data",), {"seq_len": 2_000_000_000_000}),
    (("model", "decoder"), {"width": 2_000_000_000}),
    (("model", "decoder"), {"depth": 10_000_000_000}),
    (("model", "decoder"), {"vocab_size": 10_000_000_000_000}),
    (("model", "vision"), {"mlp_dim": 2_000_000_000_000}),
  ],
)
def test_sizes_that_nothing_has_room_for_are_refused(group, values):
  whole = RunConfig().to_dict()
  inner = whole
  for name in group:
    inner = inner[name]
  inner.update(values)
  with pytest.raises(ConfigError, match=rf"{'.'.join(group)}.*{next(iter(values))}"):
    RunConfig.from_dict(whole)
