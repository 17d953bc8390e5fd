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
