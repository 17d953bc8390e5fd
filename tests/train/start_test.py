# SPDX-License-Identifier: Apache-2.0
"""When a run may not start from other params, and what the message says."""

import dataclasses
import json
import logging
import pathlib
import shutil

import jax
import pytest

from mm1_jax import checkpoint
from mm1_jax.checkpoint import CheckpointError
from mm1_jax.config import (
  ConfigError,
  ConnectorConfig,
  LoRAConfig,
  OptimizerConfig,
  RopeScaling,
  RunConfig,
  TrainConfig,
)
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import abstract_state
from mm1_jax.train import start
from tests.helpers import tiny
from tests.helpers.records import TOKENIZER

pytestmark = pytest.mark.compiles

LORA = LoRAConfig(rank=2, alpha=4.0, matrices=("query",))


def run_config(moe=tiny.SPARSE, *, lora=None, **train) -> RunConfig:
  run = tiny.run_config(moe)
  data = dataclasses.replace(run.data, tokenizer=str(TOKENIZER))
  run = dataclasses.replace(run, data=data, train=TrainConfig(num_steps=100, **train))
  return change(run, model__decoder__lora=lora)


def change(run, **values):
  """Returns a config with other values, named with __ for a dot."""
  for name, value in values.items():
    head, _, rest = name.partition("__")
    inner = change(getattr(run, head), **{rest: value}) if rest else value
    run = dataclasses.replace(run, **{head: inner})
  return run


def save(workdir: pathlib.Path, run: RunConfig, parts=("vit", "connector", "decoder")) -> str:
  model = checkpoint.to_names(tiny.make_model(run.model, tiny.mesh()))
  params = {name: x for name, x in model.items() if name.split(".")[0] in parts}
  checkpoint.save_params(workdir, 3, params)
  checkpoint.write_run_files(workdir, run)
  return str(workdir)


def check_init(run: RunConfig, source: str, *changes: str) -> None:
  run = change(run, train__init_from=source, train__init_changes=changes)
  mesh = tiny.mesh()
  start.check_init_from(run, abstract_state(lambda: MM1(jax.random.key(0), run.model), mesh))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
  return save(tmp_path_factory.mktemp("source") / "run", run_config())


# Settings that show in no array, the value they get, and what is said of it.
MEANING = {
  "model__decoder__rope_theta": (5e5, "model.decoder.rope_theta: 10000.0 -> 500000.0"),
  "model__decoder__rope_scaling": (RopeScaling(), "model.decoder.rope_scaling: None -> RopeScal"),
  "model__decoder__norm_eps": (0.1, "model.decoder.norm_eps: 1e-05 -> 0.1"),
  "model__decoder__moe__top_k": (1, "model.decoder.moe.top_k: 2 -> 1"),
  "model__vision__norm_eps": (0.1, "model.vision.norm_eps: 1e-05 -> 0.1"),
  "model__vision__activation": ("gelu", "model.vision.activation: quick_gelu -> gelu"),
  "model__image_token_id": (5, "model.image_token_id: 4 -> 5"),
  "data__image_delimiters": (False, "data.image_delimiters: True -> False"),
}


@pytest.mark.parametrize("name", MEANING)
def test_what_changes_the_function_is_refused(source, name):
  """By both a run that starts from another, or from its step, and one that is resumed."""
  value, says = MEANING[name]
  run, setting = change(run_config(), **{name: value}), name.replace("__", ".")
  for path in (source, f"{source}/checkpoints/3"):
    with pytest.raises(CheckpointError) as error:
      check_init(run, path)
    assert says in str(error.value)
    assert f"--config.train.init_changes=\"('{setting}',)\"" in str(error.value)
  check_init(run, source, setting)  # as it says
  with pytest.raises(CheckpointError) as error:
    start.check_resume(run, source)
  assert says in str(error.value)
  assert f"--config.train.init_from={source}" in str(error.value)


def test_precision_is_a_stages_own_but_kept_by_a_run(source):
  run = change(run_config(), model__dtype="bfloat16")
  check_init(run, source)
  with pytest.raises(CheckpointError, match=r"model\.dtype: float32 -> bfloat16"):
    start.check_resume(run, source)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"model__vision__image_size": (16, 16), "model__vision__position_grid": (4, 4)},
    {"model__connector__token_grid": (2, 2)},
    {"model__remat": "full", "model__scan": False, "model__image_group": 2},
    {"model__decoder__moe__capacity_factor": 1.0, "model__decoder__moe__balance_loss": 0.0},
    {"model__decoder__lora": LORA},
    {"data__seq_len": 32, "data__chat": True, "data__image_fit": "pad"},
    {"optimizer__name": "adafactor", "train__seed": 7},
  ],
  ids=str,
)
def test_another_stage_is_none_of_it(source, changes):
  check_init(change(run_config(), **changes), source)


def test_other_arrays_are_refused_with_the_settings_that_make_them(source):
  """A fresh part is accepted where it is asked for."""
  run = change(run_config(), model__decoder__qk_norm=True)
  with pytest.raises(CheckpointError) as error:
    check_init(run, source)
  assert "decoder.units.layers.0.attention.query_norm.scale is missing" in str(error.value)
  assert "Settings that differ: model.decoder.qk_norm: False -> True." in str(error.value)
  with pytest.raises(CheckpointError, match=r"feature_layer: -1 -> -2\. .*upcycle"):
    check_init(change(run_config(), model__vision__feature_layer=-2), source)
  with pytest.raises(CheckpointError, match=r"model\.decoder\.moe: MoEConfig\(.* -> None"):
    check_init(run_config(None), source)
  pool = ConnectorConfig(kind="attention_pool", token_grid=(1, 2), hidden=8, num_heads=2)
  pooled = change(run_config(), model__connector=pool)
  with pytest.raises(CheckpointError, match=r"init_changes=\"\('connector',\)\""):
    check_init(pooled, source)
  check_init(pooled, source, "connector")


def test_another_kind_of_connector_with_the_same_arrays_is_refused(tmp_path):
  linear = ConnectorConfig(kind="linear", token_grid=(2, 3), hidden=8)
  source = save(tmp_path, change(run_config(), model__connector=linear))
  pool = dataclasses.replace(linear, kind="average_pool", token_grid=(1, 2))
  run = change(run_config(), model__connector=pool)
  with pytest.raises(CheckpointError, match=r"model\.connector\.kind: linear -> average_pool"):
    check_init(run, source)


def test_the_tokenizer_is_compared_by_what_is_in_it(source, tmp_path):
  """By another path it is the same."""
  copy, other = tmp_path / "copy.model", tmp_path / "other.model"
  copy.write_bytes(TOKENIZER.read_bytes())
  other.write_bytes(TOKENIZER.read_bytes() + b"\x0a\x0b\x0a\x03new\x15\0\0\0\0\x18\x03")
  check_init(change(run_config(), data__tokenizer=str(copy)), source)
  assert start.check_resume(change(run_config(), data__tokenizer=str(copy)), source)
  run = change(run_config(), data__tokenizer=str(other))
  for check in (check_init, start.check_resume):
    with pytest.raises(
      CheckpointError, match=r"data\.tokenizer: .*tokenizer\.model \(sha256 .* ->"
    ):
      check(run, source)


def test_a_json_tokenizer_is_what_it_begins_and_ends_texts_with(tmp_path):
  """What else its config says, a template for instance, makes no other ids."""
  tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
  added = [*tokens.values(), "<image>", "<image_start>", "<image_end>"]
  entries = [
    {"id": i, "content": text, "special": True, "single_word": False, "lstrip": False}
    | {"rstrip": False, "normalized": False}
    for i, text in enumerate(added)
  ]
  vocab = {text: i for i, text in enumerate(added)}
  model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<pad>"}
  runs = []
  for name, changes in (("a", {}), ("b", {"chat_template": "x"}), ("c", {"eos_token": "<s>"})):
    (tmp_path / name).mkdir()
    file = tmp_path / name / "tokenizer.json"
    file.write_text(json.dumps({"version": "1.0", "added_tokens": entries, "model": model}))
    (file.parent / "tokenizer_config.json").write_text(json.dumps(tokens | changes))
    runs.append(change(run_config(), data__tokenizer=str(file)))
  source = save(tmp_path / "run", runs[0])
  check_init(runs[1], source)
  with pytest.raises(CheckpointError, match=r"data\.tokenizer: "):
    check_init(runs[2], source)


def test_a_source_answers_for_the_parts_it_has(tmp_path):
  """An encoder alone comes with a decoder's default settings, which are not compared."""
  run = change(run_config(), model__decoder__rope_theta=7.0, model__image_token_id=9)
  source = save(tmp_path, run, parts=("vit",))
  check_init(run_config(), source)
  with pytest.raises(CheckpointError, match=r"model\.vision\.norm_eps"):
    check_init(change(run_config(), model__vision__norm_eps=0.1), source)


def test_adapters_are_not_rescaled(tmp_path):
  source = save(tmp_path, run_config(lora=LORA))
  check_init(run_config(lora=LORA), source)
  other = run_config(lora=dataclasses.replace(LORA, alpha=8.0))
  with pytest.raises(CheckpointError, match=r"lora\.alpha: 4\.0 -> 8\.0.*merge_lora"):
    check_init(other, source)
  with pytest.raises(ConfigError, match=r"init_changes names 'model\.decoder\.lora\.alpha'"):
    check_init(other, source, "model.decoder.lora.alpha")
  rank = run_config(lora=dataclasses.replace(LORA, rank=4, alpha=8.0))
  with pytest.raises(CheckpointError, match=r"adapters that this model lacks .*merge_lora"):
    check_init(rank, source)
  with pytest.raises(CheckpointError, match=r"lora\.alpha: 4\.0 -> 8\.0"):
    start.check_resume(other, source)


def test_what_cannot_be_compared_is_told(source, tmp_path, caplog):
  caplog.set_level(logging.WARNING, logger="absl")
  bare = save(tmp_path / "bare", run_config())
  (tmp_path / "bare" / "config.json").unlink()
  run = change(run_config(), model__decoder__rope_theta=5e5)
  check_init(run, bare)
  assert start.check_resume(run, bare) is None
  assert caplog.text.count("has no config.json: only arrays are compared") == 2
  path = tmp_path / "bare" / "config.json"
  values = json.loads((pathlib.Path(source) / "config.json").read_text())
  path.write_text(json.dumps(values | {"colour": "red"}))
  assert start.check_resume(run, bare) is None
  assert "unknown key 'colour'" in caplog.text
  path.write_text("{")
  with pytest.raises(CheckpointError, match=r"config\.json' is not JSON"):
    start.check_resume(run, bare)


def test_other_changes_are_logged_with_what_they_do_to_the_rate(tmp_path, caplog):
  caplog.set_level(logging.INFO, logger="absl")
  old = change(run_config(), optimizer__learning_rate=1e-3)
  first, second = old.data.sources
  run = change(
    old,
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20),
    data__sources=(dataclasses.replace(first, weight=3.0), second),
  )
  before = start.check_resume(run, save(tmp_path / "run", old))
  assert before is not None
  start.log_resume(before, run, step=12, accepted=10)
  lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
  prefix = "changed since the last start: "
  assert [line.removeprefix(prefix) for line in lines if line.startswith(prefix)] == [
    "data.sources.captions.weight: 1.0 -> 3.0",
    "optimizer.learning_rate: 0.001 -> 0.002",
    "optimizer.warmup_steps: 2000 -> 20",
  ]
  assert lines[-1] == "lr at step 12 was 5e-06, is 0.001"
  caplog.clear()
  start.log_resume(before, old, step=12, accepted=10)
  assert not caplog.records


def test_rows_beyond_the_window_of_imported_params_are_warned_of(source, tmp_path, caplog):
  copy = shutil.copytree(source, tmp_path / "run")
  for window, warned in ((None, False), (10**6, False), (8, True)):
    (copy / checkpoint.IMPORT).write_text(json.dumps({"window": window}))
    caplog.clear()
    check_init(run_config(), str(copy))
    assert ("see the last 8 positions only" in caplog.text) == warned
