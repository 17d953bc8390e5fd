# SPDX-License-Identifier: Apache-2.0
"""Exports of a tiny run: what is in the folders, that it is the run's, and what is refused."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from mm1_jax.config import LoRAConfig, SourceConfig
from mm1_jax.data.sources import Source as Records
from mm1_jax.data.tokenizer import Tokenizer

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens" / "export"  # by make_export.py
EXPORTED = ["moe", "dense", "llava", "llava_one_kv_head", "switch"]


@pytest.fixture(scope="module")
def params():
  from tests.helpers.exports import make_params, run_config

  return make_params(run_config())


@pytest.fixture(scope="module")
def workdir(params, tmp_path_factory):
  from tests.helpers.exports import run_config, save_run

  path = tmp_path_factory.mktemp("runs") / "small"
  save_run(path, run_config(), params)
  return path


def export(path, out, name="safetensors", **options):
  from mm1_jax.convert.export import exporter
  from mm1_jax.convert.export.format import ExportOptions

  return exporter.export(path, out, name, ExportOptions(**options))


@pytest.fixture(scope="module")
def folders(workdir, tmp_path_factory):
  """Exports under our own names, by dtype."""
  out = tmp_path_factory.mktemp("exports")
  for dtype in ("float32", "bfloat16", "int8"):
    export(workdir, out / dtype, dtype=dtype, max_shard_gb=3e-5)
  return out


@pytest.fixture(scope="module")
def hub(workdir, tmp_path_factory):
  """A Hugging Face folder."""
  out = tmp_path_factory.mktemp("exports") / "hub"
  export(workdir, out, "huggingface", dtype="float32")
  return out


def read_all(folder):
  tensors = {}
  for file in sorted(folder.glob("*.safetensors")):
    tensors |= safetensors.numpy.load_file(file)
  return tensors


def test_tensors_are_the_runs_blocks(folders, params):
  tensors = read_all(folders / "float32")
  stacked = params["decoder.units.layers.1.mlp.gate"]
  for block in range(2):
    name = f"decoder.units.{block}.layers.1.mlp.gate"
    np.testing.assert_array_equal(tensors[name], stacked[block])
  np.testing.assert_array_equal(tensors["decoder.head"], params["decoder.head"])
  assert sum(x.size for x in tensors.values()) == sum(x.size for x in params.values())


def test_stacks_are_read_by_so_many_bytes(workdir, params, monkeypatch):
  from mm1_jax.convert.export import run_reader

  run, sizes = run_reader.RunReader(workdir), []
  read = run_reader.RunReader._read

  def counted(self, array, name, group):
    sizes.append(len(group))
    return read(self, array, name, group)

  monkeypatch.setattr(run_reader.RunReader, "_read", counted)
  for limit, largest in ((1, 1), (1 << 30, 2)):
    monkeypatch.setattr(run_reader, "READ_BYTES", limit)
    sizes.clear()
    for part, value in run.read():
      ours = params[part.name] if part.block is None else params[part.name][part.block]
      np.testing.assert_array_equal(value, ours)
    assert max(sizes) == largest


def test_bfloat16_keeps_what_is_computed_with_in_float32(folders):
  tensors = read_all(folders / "bfloat16")
  assert tensors["decoder.units.0.layers.1.mlp.gate"].dtype.name == "bfloat16"
  for name in ("decoder.norm.scale", "decoder.units.1.layers.1.mlp.router", "vit.positions"):
    assert tensors[name].dtype == np.float32


def test_int8_is_within_half_a_step_of_each_output_channel(folders, params):
  tensors = read_all(folders / "int8")
  cases = {  # name: dims that are summed over
    "decoder.units.0.layers.1.mlp.down": (1,),
    "decoder.units.0.layers.0.attention.out": (0, 1),
    "decoder.units.0.layers.0.attention.query": (0,),
    "decoder.embedding": (1,),
  }
  for name, dims in cases.items():
    ours = params[name.replace("units.0.", "units.")]
    ours = ours if name == "decoder.embedding" else ours[0]
    quantized, scale = tensors[name], tensors[f"{name}.int8_scale"]
    assert quantized.dtype == np.int8
    np.testing.assert_allclose(scale, np.abs(ours).max(axis=dims, keepdims=True) / 127, rtol=1e-6)
    assert (np.abs(quantized * scale - ours) <= 0.5001 * scale).all()
    assert np.abs(quantized).max() == 127
  assert "decoder.units.0.layers.1.mlp.router.int8_scale" not in tensors


def test_shards_are_bounded_and_indexed(folders):
  folder = folders / "float32"
  index = json.loads((folder / "model.safetensors.index.json").read_text())
  tensors = read_all(folder)
  assert index["weight_map"].keys() == tensors.keys()
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
  for file in set(index["weight_map"].values()):
    sizes = [x.nbytes for x in safetensors.numpy.load_file(folder / file).values()]
    assert sum(sizes) <= 3e4 or len(sizes) == 1


@pytest.mark.slow  # a program for each shape
def test_an_export_comes_back_as_a_run(folders, params, tmp_path):
  from mm1_jax import checkpoint
  from mm1_jax.convert.__main__ import main
  from mm1_jax.convert.export.run_reader import RunReader

  out = tmp_path / "run"
  main(["import", f"--export={folders / 'int8'}", f"--out={out}", "--fsdp=1"])
  for part, value in RunReader(out).read():  # a run like any other
    ours = params[part.name] if part.block is None else params[part.name][part.block]
    np.testing.assert_allclose(value, ours, rtol=0, atol=np.abs(ours).max() / 127 * 0.51)
  report = json.loads((out / "import.json").read_text())["model"]
  assert (report["unused"], report["missing"]) == ([], [])
  assert checkpoint.read_run(out).data.chat_template == str(out / "chat_template.json")


def test_the_published_config_has_no_paths_of_data(folders):
  from mm1_jax.checkpoint import read_run

  text = (folders / "int8" / "config.json").read_text()
  assert "captions-train" not in text
  assert read_run(folders / "int8").model == read_run(folders / "float32").model


def test_the_card_tells_data_figures_and_licences(hub):
  card = (hub / "README.md").read_text()
  assert "| captions | 100.0% |" in card
  assert "| loss/captions | 2.5 | 7 |" in card
  assert "CC0/Public-Domain" in card
  assert "CC-BY-4.0" in card
  assert "\nStep 7, " in card


def test_the_manifest_lists_every_file(hub, tmp_path):
  from mm1_jax.convert import ConvertError
  from mm1_jax.convert.export import manifest

  copy = tmp_path / "copy"
  shutil.copytree(hub, copy)
  assert manifest.check(copy)["step"] == 7
  weights = copy / "model.safetensors"
  data = bytearray(weights.read_bytes())
  data[-1] ^= 1
  weights.write_bytes(data)
  with pytest.raises(ConvertError, match=r"model\.safetensors' is not the file that was exported"):
    manifest.check(copy)
  weights.unlink()
  with pytest.raises(ConvertError, match=r"lacks 'model\.safetensors'"):
    manifest.check(copy)
  (copy / "manifest.json").unlink()
  with pytest.raises(ConvertError, match="no finished export"):
    manifest.check(copy)


def test_ids_of_tokenizer_json_are_the_models(hub):
  from tests.helpers.exports import SAMPLE

  tokenizer = Tokenizer(str(SAMPLE / "tokenizer.model"))
  built = tokenizers.Tokenizer.from_file(str(hub / "tokenizer.json"))
  built.encode_special_tokens = True
  num = 0
  for name in ("text", "sft", "captions", "interleaved"):
    records = Records(SourceConfig(name, str(SAMPLE / f"{name}-heldout-*")))
    for index in range(0, len(records), 5):
      record = records[index]
      turns = record.get("turns") or [record]
      for text in (i["text"] for turn in turns for i in turn["content"] if "text" in i):
        text, num = text[:2000], num + len(text[:2000])
        ids = tokenizer.encode(text)
        assert built.encode(text, add_special_tokens=False).ids == ids
        assert built.decode(ids) == text
  assert num > 20_000


def test_what_is_not_empty_is_left_alone(workdir, tmp_path):
  from mm1_jax.convert import ConvertError

  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(ConvertError, match="is there already"):
    export(workdir, tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
  (tmp_path / "a.unfinished").mkdir()
  with pytest.raises(ConvertError, match="was cut off; delete it"):
    export(workdir, tmp_path / "a")


def test_a_failed_comparison_leaves_no_export(workdir, tmp_path, monkeypatch):
  from mm1_jax.convert import ConvertError
  from mm1_jax.convert.export import shards

  save = shards.save_file

  def corrupt(tensors, path, metadata):
    save({name: x + x.dtype.type(1) for name, x in tensors.items()}, path, metadata=metadata)

  monkeypatch.setattr(shards, "save_file", corrupt)
  for name in ("safetensors", "huggingface"):
    with pytest.raises(ConvertError, match="is not what was written"):
      export(workdir, tmp_path / name, name, dtype="float32")
  assert list(tmp_path.iterdir()) == []


def test_runs_that_cannot_be_exported_are_refused(workdir, params, tmp_path):
  from mm1_jax import checkpoint
  from mm1_jax.convert import ConvertError
  from tests.helpers.exports import run_config, save_run

  with pytest.raises(checkpoint.CheckpointError, match=r"has no config\.json"):
    export(workdir / "checkpoints", tmp_path / "out")
  empty = tmp_path / "empty"
  checkpoint.write_run_files(empty, run_config())
  with pytest.raises(checkpoint.CheckpointError, match="no checkpoint"):
    export(empty, tmp_path / "out")
  run = run_config()
  decoder = dataclasses.replace(run.model.decoder, lora=LoRAConfig(rank=2))
  model = dataclasses.replace(run.model, decoder=decoder)
  checkpoint.write_run_files(tmp_path / "lora", dataclasses.replace(run, model=model))
  with pytest.raises(ConvertError, match="merge_lora"):
    export(tmp_path / "lora", tmp_path / "out")
  broken = dict(params)
  broken["decoder.embedding"] = np.full_like(params["decoder.embedding"], np.nan)
  save_run(tmp_path / "nan", run, broken)
  with pytest.raises(ConvertError, match=r"decoder\.embedding has values that are not finite"):
    export(tmp_path / "nan", tmp_path / "out")
  other = {name: x for name, x in params.items() if name != "decoder.head"}
  save_run(tmp_path / "other", run, other)
  with pytest.raises(checkpoint.CheckpointError, match=r"decoder\.head is missing"):
    export(tmp_path / "other", tmp_path / "out")


def test_what_llava_has_not_is_refused_by_name(workdir, tmp_path):
  from mm1_jax.convert import ConvertError

  with pytest.raises(ConvertError, match=r"no model\.connector\.kind 'c_abstractor'") as error:
    export(workdir, tmp_path / "out", "llava")
  for name in ("model.decoder.moe", "model.decoder.qk_norm", "data.tiling", "data.image_fit"):
    assert f"no {name}" in str(error.value)
  assert list(tmp_path.iterdir()) == []


def test_options_that_a_format_lacks_are_refused(workdir, tmp_path):
  from mm1_jax.convert import ConvertError

  with pytest.raises(ConvertError, match="no --dtype=int8; it has float32, bfloat16"):
    export(workdir, tmp_path / "out", "huggingface", dtype="int8")
  with pytest.raises(ConvertError, match="must be positive"):
    export(workdir, tmp_path / "out", max_shard_gb=0)


@pytest.mark.parametrize("name", EXPORTED)
def test_tensors_are_those_of_the_pytorch_model(name, tmp_path):
  from tests.helpers.exports import make_params, run_config, save_run

  run = run_config(name)
  save_run(tmp_path / "run", run, make_params(run))
  form = "llava" if name.startswith("llava") else "huggingface"
  export(tmp_path / "run", tmp_path / "out", form, dtype="float32")
  tensors = read_all(tmp_path / "out")
  written = [f"{key} {x.shape}" for key, x in sorted(tensors.items())]
  assert written == np.load(GOLDENS / f"{name}.npz")["tensors"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_the_pytorch_model_computes_what_ours_does(name):
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, reshard

  from mm1_jax import checkpoint
  from mm1_jax.models.mm1 import MM1
  from mm1_jax.sharding import LAYOUT, abstract_state
  from tests.helpers import tiny
  from tests.helpers.exports import make_params, run_config

  golden, run, mesh = np.load(GOLDENS / f"{name}.npz"), run_config(name), tiny.mesh()
  like = abstract_state(lambda: MM1(jax.random.key(0), run.model), mesh)
  params = make_params(run)
  placed = {k: jax.device_put(params[k], x.sharding) for k, x in checkpoint.to_names(like).items()}
  tokens, images = golden["tokens"], golden["images"][None]

  def forward(model, tokens, images):
    num = tokens.shape[1]
    positions = reshard(jnp.arange(num)[None], LAYOUT.act_b)
    cache = model.decoder.init_cache(1, num)
    out = model.prefill(tokens, images, positions, jnp.ones_like(tokens), cache)
    return model.decoder.logits(out.hidden)

  with jax.set_mesh(mesh):
    rows = jax.device_put((tokens, images), NamedSharding(mesh, LAYOUT.act_b))
    options = {"xla_backend_optimization_level": 0}  # quick to compile
    run_once = jax.jit(forward, compiler_options=options)
    logits = run_once(checkpoint.from_names(like, placed), *rows)
  wanted = golden["logits"]
  ours = np.asarray(logits)[0, ::24]
  assert np.abs(ours - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("version", ["4.57.6", "4.0.0.dev0", "5.0.0", "5.24.0", "10.1"])
def test_the_folder_says_which_transformers_it_needs(version, hub, tmp_path):
  """Of an older one, each call fails in another place."""
  (tmp_path / "transformers.py").write_text(
    f'__version__ = "{version}"\nclass PretrainedConfig: pass\n'
  )
  command = [sys.executable, "-c", "import configuration_mm1"]
  env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{hub}"}
  ended = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
  if version.startswith("4."):
    assert f"needs transformers 5 or later, but {version} is installed" in ended.stderr
  assert (ended.returncode == 0) == (not version.startswith("4."))
  for name in ("modeling_mm1.py", "processing_mm1.py"):
    assert "from .configuration_mm1 import" in (hub / name).read_text()
  assert "transformers>=5" in (hub / "requirements.txt").read_text().splitlines()
  assert "`transformers>=5`" in (hub / "README.md").read_text()
  assert json.loads((hub / "config.json").read_text())["transformers_version"] == "5.24.0"


def test_llava_says_its_positions_as_transformers_4_and_5_read_them():
  """Version 4 knows nothing of `rope_parameters`, and would take its defaults without a word."""
  from mm1_jax.config import RopeScaling
  from mm1_jax.convert import settings
  from mm1_jax.convert.export import llava
  from tests.helpers.exports import run_config

  run = run_config("llava")
  for scaling in (None, RopeScaling()):
    decoder = dataclasses.replace(run.model.decoder, rope_theta=3e4, rope_scaling=scaling)
    model = dataclasses.replace(run.model, decoder=decoder)
    text = llava.config(dataclasses.replace(run, model=model), "float32")["text_config"]
    assert settings.rope("llama", settings.read("llama", text)) == (3e4, scaling)
    del text["rope_parameters"]
    assert settings.rope("llama", settings.read("llama", text)) == (3e4, scaling)
