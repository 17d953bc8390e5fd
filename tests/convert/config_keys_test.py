# SPDX-License-Identifier: Apache-2.0
"""What becomes of each key of a config.json, beside the classes of `transformers`."""

import json
import pathlib
import shutil

import pytest

from mm1_jax.convert import ConvertError, importer, settings
from mm1_jax.convert.importer import import_weights

GOLDEN = pathlib.Path(__file__).parent.parent / "goldens" / "settings.json"  # by make_settings.py
KINDS = [*settings.TABLES]
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_transformers_has_its_place(kind):
  """Also the values that it takes where a file leaves a key out."""
  keys = json.loads(GOLDEN.read_text())[kind]
  table = settings.TABLES[kind]
  assert not keys.keys() - table.keys()
  defaults = {key: (table[key].default, value) for key, value in keys.items()}
  assert {key: pair for key, pair in defaults.items() if pair[0] != pair[1]} == {}
  assert all(setting.use for setting in table.values())


def test_the_keys_are_those_of_the_installed_transformers():
  pytest.importorskip("transformers")
  from tests.goldens import make_settings

  golden = json.loads(GOLDEN.read_text())
  for kind, name in make_settings.CLASSES.items():
    assert make_settings.keys(name) == golden[kind], "run tests/goldens/make_settings.py"


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_is_taken_as_its_type_or_refused_by_name(kind):
  """A text is no number, an object no list: each would be taken for something else."""
  checked = {key: s for key, s in settings.TABLES[kind].items() if s.check is not None}
  assert len(checked) > 5
  for key in checked:
    with pytest.raises(ConvertError, match=rf"^{key} is 'false'; only .* can be imported"):
      settings.read(kind, {key: "false"})
  assert settings.read(kind, {"hidden_size": 64.0})["hidden_size"] == 64
  with pytest.raises(ConvertError, match="hidden_size is inf"):
    settings.read(kind, {"hidden_size": float("inf")})


@pytest.mark.parametrize(
  ("given", "theta", "factor"),
  [
    ({"rope_theta": 5e5}, 5e5, None),
    ({"rope_parameters": {"rope_theta": 2e3}, "rope_theta": 5e5}, 2e3, None),
    ({"rope_scaling": LLAMA3, "rope_theta": 5e5}, 5e5, 8),
    # A llama3 that was added beside what transformers 5 had written.
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": LLAMA3}
     | {"rope_theta": 5e5}, 5e5, 8),
    ({"rope_parameters": LLAMA3 | {"rope_theta": 7e4}, "rope_scaling": None}, 7e4, 8),
    ({"rope_scaling": {**LLAMA3, "rope_type": None, "type": "llama3"}}, 1e4, 8),
    ({"rope_scaling": {"type": "linear", "factor": 1.0}}, 1e4, None),
    ({}, 1e4, None),
  ],
)  # fmt: skip
def test_rope_is_read_in_the_order_of_transformers(given, theta, factor):
  rope = settings.rope("llama", settings.read("llama", given))
  assert rope.theta == theta
  assert (rope.scaling and rope.scaling.factor) == factor


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"rope_parameters": {"rope_theta": 2e3}, "rope_scaling": {"rope_type": "yarn", "factor": 4}},
     "rope_scaling: RoPE of type 'yarn'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rope_parameters: .*'yarn'"),
    ({"rope_scaling": '{"rope_type": "yarn"}'}, "rope_scaling is .*an object"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer to layer"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": "8"}}, "factor in rope_scaling is '8'"),
    ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 128}, "make them equal"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta in rope_parameters"),
  ],
)  # fmt: skip
def test_other_positions_are_refused(given, message):
  with pytest.raises(ConvertError, match=message):
    settings.rope("llama", settings.read("llama", given))


@pytest.mark.parametrize(
  ("kind", "given", "window"),
  [
    ("llama", {"sliding_window": 16}, None),  # it has none, whatever a file says
    ("mistral", {"sliding_window": 16}, 16),
    ("mistral", {}, 4096),
    ("mistral", {"sliding_window": None}, None),
    ("mixtral", {"sliding_window": 16}, 16),
    ("mixtral", {}, None),
    ("qwen2", {"sliding_window": 16}, None),
    ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}, 16),
    ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "num_hidden_layers": 28}, None),
    ("qwen3", {"sliding_window": 16, "use_sliding_window": True}
     | {"layer_types": ["full_attention", "sliding_attention"]}, 16),
    ("qwen3_moe", {"sliding_window": 16, "use_sliding_window": True}, 16),
  ],
)  # fmt: skip
def test_windows_are_those_of_transformers(kind, given, window):
  assert settings.window(settings.read(kind, given)) == window


def test_the_first_clips_have_their_config_twice():
  given = {
    "vision_config": {"hidden_size": 8, "hidden_act": "quick_gelu"},
    "vision_config_dict": {"hidden_act": "gelu"},
  }
  kind, inner = settings.of_vision("clip", given)
  read = settings.read(kind, inner)
  assert (read["hidden_act"], read["hidden_size"]) == ("gelu", 768)
  with pytest.raises(ConvertError, match="vision_config is 'x'"):
    settings.of_vision("siglip", {"vision_config": "x"})


@pytest.fixture
def mistral(weights, tmp_path, monkeypatch):
  monkeypatch.setattr(importer, "_vocabulary", lambda *_: None)
  return shutil.copytree(weights / "mistral", tmp_path / "mistral")


def change(folder: pathlib.Path, **values) -> None:
  file = folder / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize(
  "says",
  [
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq"},
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
  ],
)
def test_quantised_weights_are_refused_by_their_config(mistral, key, says):
  change(mistral, **{key: says})
  (mistral / "model.safetensors").write_bytes(b"")  # the config is looked at first
  with pytest.raises(ConvertError, match=rf"{key} says .* quantised \({says['quant_method']}\)"):
    import_weights(decoder=mistral)


@pytest.mark.parametrize("name", settings.QUANTISED)
def test_quantised_weights_are_refused_by_the_file_beside(mistral, name):
  (mistral / name).write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
  with pytest.raises(ConvertError, match=rf"{name} says .* quantised \(FP8\)"):
    import_weights(decoder=mistral)


def test_a_window_is_said_and_kept_within(mistral, tmp_path):
  change(mistral, sliding_window=200)
  imported = import_weights(decoder=mistral)
  assert (imported.window, imported.run.data.seq_len) == (200, 200)
  assert "sliding_window 200 is not kept" in imported.notes[0]
  importer.write(imported, tmp_path / "out")
  assert json.loads((tmp_path / "out" / "import.json").read_text())["window"] == 200
  change(mistral, sliding_window=16)
  with pytest.raises(ConvertError, match=r"sliding_window is 16.*data\.seq_len"):
    import_weights(decoder=mistral)


def test_keys_that_transformers_does_not_know_are_named(mistral):
  change(mistral, logit_scale=2.0)
  assert "not know: logit_scale." in " ".join(import_weights(decoder=mistral).notes)


def test_sizes_and_names_that_do_not_agree(mistral, weights):
  change(mistral, vocab_size=84)
  with pytest.raises(ConvertError, match="vocab_size is 84, but the embedding has 83 rows"):
    import_weights(decoder=mistral)
  moe = shutil.copytree(weights / "qwen3_moe", mistral.parent / "moe")
  change(moe, num_experts=4, num_local_experts=5)
  with pytest.raises(ConvertError, match="num_experts is 4, and num_local_experts 5"):
    import_weights(decoder=moe)
