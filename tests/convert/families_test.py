# SPDX-License-Identifier: Apache-2.0
"""Imported weights against the libraries that they come from: `transformers` and `open_clip`.

The folders and the outputs expected are of `tests/goldens/make_convert.py`.
"""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from mm1_jax import checkpoint
from mm1_jax.config import RunConfig
from mm1_jax.convert import ConvertError, importer
from mm1_jax.convert.importer import Imported, import_weights
from mm1_jax.models.decoder import Decoder
from mm1_jax.models.vit import ViT
from mm1_jax.sharding import abstract_state

pytestmark = pytest.mark.compiles

TOLERANCE = 1e-5  # of the largest value; measured: 1e-6
DENSE = ["llama2", "llama3", "llama_one_kv_head", "mistral", "qwen2", "qwen3"]
DECODERS = [*DENSE, "mixtral", "qwen3_moe", "qwen3_moe_top_1"]
ENCODERS = ["clip", "siglip", "open_clip"]


def expected(folder: pathlib.Path) -> dict[str, np.ndarray]:
  with np.load(folder / "expected.npz") as file:
    return dict(file)


def in_float32(run: RunConfig):
  return dataclasses.replace(run.model, dtype="float32", remat="none")


def module(make, part: str, imported: Imported):
  """Returns the part with exactly the params that were imported."""
  mesh = next(iter(imported.params.values())).sharding.mesh
  with jax.set_mesh(mesh):
    abstract = abstract_state(make, mesh)
    params = {name.removeprefix(f"{part}."): x for name, x in imported.params.items()}
    assert params.keys() == checkpoint.to_names(abstract).keys()
    return checkpoint.from_names(abstract, params)


@jax.jit
def logits(decoder: Decoder, tokens, positions):
  hidden = decoder(decoder.embed(tokens), positions, jax.numpy.ones_like(tokens)).hidden
  return decoder.logits(hidden)


def worst(ours, theirs) -> float:
  ours = np.asarray(ours, np.float64)
  assert ours.shape == theirs.shape
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("family", DECODERS)
def test_decoder_equals_transformers(family, weights, sample_tokenizer, monkeypatch):
  """Fails for another RoPE, scaling, bias, norm, order of gate and up, expert, or row of words."""
  monkeypatch.setattr(importer, "_vocabulary", lambda *_: None)  # tokens are numbers here
  imported = import_weights(decoder=weights / family, fsdp=4)
  report = imported.reports["decoder"]
  assert report.unused == report.missing == []
  model = in_float32(imported.run)
  assert model.decoder.vocab_size == 128  # of 83
  decoder = module(lambda: Decoder(jax.random.key(0), model), "decoder", imported)
  ref = expected(weights / family)
  tokens = np.repeat(ref["tokens"], 2, axis=0)  # 4 rows for 4 devices
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  with jax.set_mesh(decoder.embedding[...].sharding.mesh):
    ours = np.asarray(logits(decoder, tokens, positions))[::2, ::6, :83]
  difference = worst(ours, ref["logits"])
  print(f"parity: {family}: {difference:.1e}")
  assert difference < TOLERANCE


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("family", ENCODERS)
def test_encoder_equals_its_library(family, layer, weights):
  """Fails for another activation, patch order, pixel scale, class token, or resize of positions."""
  imported = import_weights(vit=weights / family, feature_layer=layer, fsdp=2)
  report = imported.reports["vit"]
  assert report.missing == []
  blocks = re.compile(r"(visual\.transformer\.resblocks|(^|vision_model\.)encoder\.layers)\.[01]\.")
  assert not [name for name in report.unused if blocks.match(name)]
  model = in_float32(imported.run)
  vit = module(lambda: ViT(jax.random.key(0), model), "vit", imported)
  ref = expected(weights / family)
  run = jax.jit(lambda vit, images: vit(images))
  for key in ("", "_large") if family == "open_clip" else ("",):
    with jax.set_mesh(vit.patch[...].sharding.mesh):
      features = run(vit, ref[f"images{key}"])
    theirs = ref[f"features{layer}{key}"]
    difference = worst(np.asarray(features).reshape(theirs.shape), theirs)
    print(f"parity: {family}{key} layer {layer}: {difference:.1e}")
    assert difference < TOLERANCE


@pytest.mark.parametrize(
  ("family", "top_k", "norm", "message"),
  [
    ("mixtral", 1, None, "num_experts_per_tok 1 of a mixtral"),
    ("qwen3_moe", 1, True, "num_experts_per_tok 1 of a qwen3_moe"),
    ("qwen3_moe", 2, False, "norm_topk_prob False with num_experts_per_tok 2"),
    ("qwen3_moe", 2, None, "norm_topk_prob"),
  ],
)
def test_experts_of_other_weights_are_refused(
  family, top_k, norm, message, weights, tmp_path, monkeypatch
):
  """Of two and more experts ours sum to 1, as Mixtral's; a single one counts by its probability."""
  monkeypatch.setattr(importer, "_vocabulary", lambda *_: None)
  folder = shutil.copytree(weights / family, tmp_path / family)
  settings = json.loads((folder / "config.json").read_text())
  settings |= {"num_experts_per_tok": top_k}
  settings.pop("norm_topk_prob", None)
  settings |= {} if norm is None else {"norm_topk_prob": norm}
  (folder / "config.json").write_text(json.dumps(settings))
  with pytest.raises(ConvertError, match=message):
    import_weights(decoder=folder)
