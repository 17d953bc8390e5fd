# SPDX-License-Identifier: Apache-2.0
"""Damaged and misleading weights: one clear error that names the tensor or the file."""

import json
import pickle
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mm1_jax.config import UserError
from mm1_jax.convert import ConvertError, importer
from mm1_jax.convert.importer import import_weights
from mm1_jax.convert.tensors import INDEX, Tensors
from tests.helpers import fuzz

SHARD = "model-00002-of-00004.safetensors"


@pytest.fixture
def folder(weights, tmp_path, monkeypatch):
  """A copy of the sharded Mixtral."""
  monkeypatch.setattr(importer, "_vocabulary", lambda *_: None)
  return shutil.copytree(weights / "mixtral", tmp_path / "mixtral")


def test_truncated_shard(folder):
  data = (folder / SHARD).read_bytes()
  (folder / SHARD).write_bytes(data[: len(data) // 2])
  with pytest.raises(ConvertError, match=rf"{SHARD}' is truncated, or no safetensors"):
    import_weights(decoder=folder)


def test_missing_shard(folder):
  (folder / SHARD).unlink()
  with pytest.raises(ConvertError, match=rf"1 of 4 shards .* missing: {SHARD}"):
    import_weights(decoder=folder)


def test_index_that_lies(folder):
  index = json.loads((folder / INDEX).read_text())
  index["weight_map"]["model.nothing.weight"] = SHARD
  (folder / INDEX).write_text(json.dumps(index))
  with pytest.raises(ConvertError, match=rf"'model.nothing.weight' is in '{SHARD}', but it is not"):
    Tensors(folder)


def test_index_that_names_another_shard(folder):
  index = json.loads((folder / INDEX).read_text())
  name = next(n for n, file in index["weight_map"].items() if file != SHARD)
  index["weight_map"][name] = SHARD
  (folder / INDEX).write_text(json.dumps(index))
  with pytest.raises(ConvertError, match=f"tensor '{name}' is in '{SHARD}', but it is in"):
    Tensors(folder)


def test_index_that_points_out_of_its_folder(folder):
  (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
  with pytest.raises(ConvertError, match=r"names '../../secret.safetensors', which is no"):
    Tensors(folder)


@pytest.mark.parametrize("shape", [(32, 2, 16), (16, 32)])
def test_wrong_shape(folder, shape):
  name = "model.layers.0.self_attn.k_proj.weight"
  file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
  tensors = load_file(file)
  assert tensors[name].shape == (16, 32)
  # The same numbers, transposed, would go unseen by a reshape.
  tensors[name] = np.ascontiguousarray(tensors[name].T.reshape(32, *shape[1:-1], -1))
  save_file(tensors, file)
  with pytest.raises(ConvertError, match=rf"'{name}' of '{file.name}' has shape \(32,"):
    import_weights(decoder=folder)


def test_missing_tensor(folder):
  name = "model.norm.weight"
  index = json.loads((folder / INDEX).read_text())
  file = folder / index["weight_map"].pop(name)
  (folder / INDEX).write_text(json.dumps(index))
  tensors = load_file(file)
  del tensors[name]
  save_file(tensors, file)
  with pytest.raises(ConvertError, match=f"tensor '{name}' is missing"):
    import_weights(decoder=folder)


class Bomb:
  def __reduce__(self):
    return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pickle_is_never_opened(weights, tmp_path, name):
  (tmp_path / name).write_bytes(pickle.dumps(Bomb(), protocol=2))
  shutil.copy(weights / "clip" / "config.json", tmp_path)
  with pytest.raises(ConvertError, match=f"{name}.*pickle|pickles only: {name}"):
    import_weights(vit=tmp_path)


def test_values_that_are_not_finite(folder):
  name = "model.norm.weight"
  file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
  tensors = load_file(file)
  tensors[name][3] = np.nan
  save_file(tensors, file)
  with pytest.raises(ConvertError, match=f"tensor '{name}' of .* not finite"):
    import_weights(decoder=folder)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("model_type", "gemma2"),
    ("hidden_act", "gelu"),
    ("attention_bias", True),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
  ],
)
def test_what_our_decoder_has_not_is_refused_by_name(folder, key, value):
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**config, key: value}))
  shown = "yarn" if key == "rope_parameters" else str(value)
  with pytest.raises(ConvertError, match=shown):
    import_weights(decoder=folder)


def edit(file, add=(), drop=()) -> None:
  """Changes the tensors of a file."""
  tensors = load_file(file) | dict(add)
  save_file({name: x for name, x in tensors.items() if name not in drop}, file)


def configure(folder, **values) -> None:
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | values))


@pytest.fixture
def llama(weights, tmp_path, monkeypatch):
  """Of one file, with a head."""
  monkeypatch.setattr(importer, "_vocabulary", lambda *_: None)
  return shutil.copytree(weights / "llama3", tmp_path / "llama3")


def test_a_head_that_differs_from_the_embedding_it_is_tied_to(llama):
  configure(llama, tie_word_embeddings=True)
  with pytest.raises(ConvertError, match=r"true, but 'lm_head\.weight' differs .* to false"):
    import_weights(decoder=llama)
  file = llama / "model.safetensors"
  edit(file, {"lm_head.weight": load_file(file)["model.embed_tokens.weight"]})
  assert import_weights(decoder=llama).run.model.decoder.tie_embeddings


def test_a_head_that_is_missing(llama):
  edit(llama / "model.safetensors", drop=["lm_head.weight"])
  with pytest.raises(ConvertError, match=r"not true, but .* has no 'lm_head\.weight'"):
    import_weights(decoder=llama)


LAYER = "model.layers.1"


@pytest.mark.parametrize(
  "name",
  [
    f"{LAYER}.self_attn.q_proj.bias",
    f"{LAYER}.self_attn.q_norm.weight",
    f"{LAYER}.mlp.gate_proj.lora_A.weight",
    f"{LAYER}.mlp.gate_proj.weight_scale",
    "model.layers.2.mlp.up_proj.weight",
    "model.embed_positions.weight",
    "score.weight",
  ],
)
def test_a_tensor_that_is_left_over_is_an_error(llama, name):
  edit(llama / "model.safetensors", {name: np.ones(4, np.float32)})
  with pytest.raises(ConvertError, match=f"1 tensors that the config has no place for.*{name}"):
    import_weights(decoder=llama)


def test_tables_of_angles_may_be_left_over(llama):
  name = f"{LAYER}.self_attn.rotary_emb.inv_freq"
  edit(llama / "model.safetensors", {name: np.ones(4, np.float32)})
  assert import_weights(decoder=llama).reports["decoder"].unused == [name]


@pytest.mark.parametrize("kind", ["clip", "siglip", "open_clip"])
def test_a_tensor_of_an_encoder_that_is_left_over(weights, tmp_path, kind):
  folder = shutil.copytree(weights / kind, tmp_path / kind)
  (file,) = folder.glob("*.safetensors")
  roots = {"clip": "vision_model.encoder.layers", "siglip": "encoder.layers"}
  root = roots.get(kind, "visual.transformer.resblocks")
  # What a block past the feature layer has is of no use, nor what is after the blocks.
  edit(file, {f"{root}.2.scale": np.ones(4, np.float32)})
  import_weights(vit=folder, feature_layer=-2)
  with pytest.raises(ConvertError, match=rf"no place for.*{root}\.2\.scale"):
    import_weights(vit=folder)
  edit(file, {f"{root}.3.scale": np.ones(4, np.float32)}, drop=[f"{root}.2.scale"])
  with pytest.raises(ConvertError, match=rf"no place for.*{root}\.3\.scale"):
    import_weights(vit=folder, feature_layer=-2)


def test_of_several_files_the_one_that_transformers_reads(llama):
  """Mistral's folders have the same weights twice, under other names."""
  (llama / "consolidated.safetensors").write_bytes(b"other")
  import_weights(decoder=llama)
  (llama / INDEX).write_text("{}")
  import_weights(decoder=llama)
  shutil.move(llama / "model.safetensors", llama / "model.fp16.safetensors")
  (llama / INDEX).unlink()
  with pytest.raises(ConvertError, match=r"several \.safetensors files"):
    import_weights(decoder=llama)
  (llama / "model.fp16.safetensors").unlink()
  shutil.copy(llama.parent / "llama3" / "config.json", llama / "params.json")
  (llama / "config.json").unlink()
  save_file({"norm.weight": np.ones(4, np.float32)}, llama / "consolidated.safetensors")
  with pytest.raises(ConvertError, match="its maker's own format"):
    import_weights(decoder=llama)


def test_open_clip_beside_a_clip_of_transformers(weights, tmp_path):
  """Which config describes the weights is seen from their names."""
  folder = shutil.copytree(weights / "open_clip", tmp_path / "both")
  shutil.copy(weights / "clip" / "config.json", folder)
  assert importer._open(folder).kind == "open_clip"
  shutil.copy(weights / "clip" / "model.safetensors", folder)
  assert importer._open(folder).kind == "clip"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_where_a_folder_is_meant(llama, name):
  assert importer._open(llama / name).kind == "llama"


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD])
def test_a_file_of_a_folder_of_shards(folder, name):
  assert len(list(importer._open(folder / name).tensors)) > 20


def test_a_file_of_weights_has_its_tokenizer_beside_it(weights, tmp_path, sample_tokenizer):
  folder = shutil.copytree(weights / "llama3", tmp_path / "llama3")
  shutil.copy(sample_tokenizer, folder / "tokenizer.model")
  for path in (folder, folder / "model.safetensors", folder / "config.json"):
    words = importer._vocabulary(path, None)
    assert words is not None
    assert "tokenizer.model" in words.files
  (folder / "tokenizer_config.json").write_text("{}")
  assert importer._vocabulary(None, folder / "tokenizer_config.json") is not None


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda f: (f / "model.gguf").write_bytes(b"GGUF"), "as GGUF only"),
    (lambda f: (f / "snapshots" / "abc").mkdir(parents=True), "give the folder '.*abc'"),
  ],
)
def test_what_a_folder_without_weights_seems_to_be(tmp_path, make, message):
  make(tmp_path)
  with pytest.raises(ConvertError, match=message):
    import_weights(decoder=tmp_path)


def test_a_gguf(tmp_path):
  (tmp_path / "a.gguf").write_bytes(b"GGUF")
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(ConvertError, match="is a GGUF file"):
    import_weights(decoder=tmp_path / "a.gguf")


KINDS = ("clip", "llama3", "mixtral", "open_clip", "qwen3_moe", "siglip")


@pytest.mark.parametrize("kind", KINDS)
def test_changed_configs_by_seed(weights, tmp_path, kind):
  """Of each, an error or a config; of some, also all that comes after it."""
  folder = shutil.copytree(weights / kind, tmp_path / kind)
  part = "vit" if kind in ("clip", "siglip", "open_clip") else "decoder"
  file = folder / (importer.OPEN_CLIP if kind == "open_clip" else importer.HF)

  def read(data: bytes) -> None:
    file.write_bytes(data)
    importer._run_config({part: importer._open(folder)}, None, -1)

  cases = fuzz.mutations(file.read_bytes(), 300, seed=KINDS.index(kind))
  assert fuzz.strays(cases, read, UserError) == []


def test_changed_configs_are_refused_or_imported(folder):
  def read(data: bytes) -> None:
    (folder / "config.json").write_bytes(data)
    import_weights(decoder=folder)

  cases = fuzz.mutations((folder / "config.json").read_bytes(), 20, seed=0)
  assert fuzz.strays(cases, read, UserError) == []


def test_changed_indices_by_seed(folder):
  def read(data: bytes) -> None:
    (folder / INDEX).write_bytes(data)
    Tensors(folder)

  cases = fuzz.mutations((folder / INDEX).read_bytes(), 200, seed=0)
  assert fuzz.strays(cases, read, UserError) == []
