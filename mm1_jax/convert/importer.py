# SPDX-License-Identifier: Apache-2.0
"""Open weights to a checkpoint that `train.init_from` takes, and the config that it needs.

The folder that comes out is laid out like a run's: `checkpoints/0/params`, `config.json`, the
tokenizer; and `import.json`, which says what became of every tensor.
"""

import dataclasses
import json
import pathlib
from contextlib import AbstractContextManager
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from mm1_jax import checkpoint, untrusted
from mm1_jax.config import (
  ConnectorConfig,
  DataConfig,
  DecoderConfig,
  ModelConfig,
  RunConfig,
  VisionConfig,
)
from mm1_jax.convert import ConvertError, families, vocabulary
from mm1_jax.convert.export import folder as export
from mm1_jax.convert.export import run_reader
from mm1_jax.convert.load import Report, load
from mm1_jax.convert.placement import params_mesh
from mm1_jax.convert.tensors import Tensors
from mm1_jax.convert.vocabulary import Vocabulary
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import abstract_state

REPORT = "import.json"
OPEN_CLIP, HF = "open_clip_config.json", "config.json"


class PartWeights(NamedTuple):
  """Weights of an encoder or a decoder, with the config that comes with them."""

  settings: families.Settings
  tensors: Tensors

  @property
  def kind(self) -> str:
    return self.settings["model_type"]


class Imported(NamedTuple):
  """What was read, on the mesh."""

  run: RunConfig
  params: dict[str, jax.Array]  # by name
  reports: dict[str, Report]  # by part
  vocabulary: Vocabulary | None


def import_weights(
  *,
  vit: pathlib.Path | None = None,
  decoder: pathlib.Path | None = None,
  tokenizer: pathlib.Path | None = None,
  feature_layer: int = -1,
  dtype: str = "float32",
  fsdp: int = -1,
  fill: bool = False,
) -> Imported:
  """Reads open weights onto a mesh of all devices here.

  Args:
    vit: folder of an encoder's weights.
    decoder: folder of a decoder's weights.
    tokenizer: file or folder of the decoder's tokenizer, if it is not in the decoder's folder.
    feature_layer: see `VisionConfig`; blocks past it are not read.
    dtype: what params are kept in.
    fsdp: devices that params are split over; -1 takes all.
    fill: adds random params for the parts that are not read, so that the model is whole.

  Raises:
    ConvertError, ConfigError: the weights cannot be read, or fit no model of ours.
  """
  if vit is None and decoder is None:
    raise ConvertError("there is nothing to import; give --vit=FOLDER, --decoder=FOLDER, or both.")
  parts = {"vit": vit, "decoder": decoder}
  parts = {name: _open(path) for name, path in parts.items() if path is not None}
  words = _vocabulary(decoder, tokenizer)
  run = _run_config(parts, words, feature_layer)
  mesh = params_mesh(run, fsdp)
  model = abstract_state(lambda: MM1(jax.random.key(0), run.model), mesh)
  abstract = {
    name: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding)
    for name, x in checkpoint.to_names(model).items()
  }
  params, reports = {}, {}
  with jax.set_mesh(mesh):
    for name, part in parts.items():
      of_part = {key: x for key, x in abstract.items() if key.startswith(f"{name}.")}
      if name == "vit":
        pieces = families.vision_pieces(part.kind, run.model.vision, part.tensors)
      else:
        pieces = families.decoder_pieces(part.kind, run.model.decoder, part.tensors)
      loaded, reports[name] = load(part.tensors, pieces, of_part)
      params |= loaded
      logging.info("%s of %s: %s", name, part.kind, reports[name])
    if fill:
      params |= _random(run, {k: x for k, x in abstract.items() if k not in params})
  return Imported(run, params, reports, words)


def import_export(folder: pathlib.Path, *, dtype: str = "float32", fsdp: int = -1) -> Imported:
  """Reads what `python -m mm1_jax.convert export --format=safetensors` wrote, onto a mesh.

  Args:
    folder: of the export.
    dtype: what params are kept in; of int8, what its scales make of it.
    fsdp: devices that params are split over; -1 takes all.

  Raises:
    CheckpointError, ConvertError: the folder is no such export, or damaged.
  """
  run = checkpoint.read_run(folder)
  mesh = params_mesh(run, fsdp)
  model = abstract_state(lambda: MM1(jax.random.key(0), run.model), mesh)
  abstract = {
    name: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding)
    for name, x in checkpoint.to_names(model).items()
  }
  tensors = Tensors(folder)
  parts = [part for name, x in abstract.items() for part in run_reader.parts(name, x.shape)]
  with jax.set_mesh(mesh):
    params, report = load(tensors, [export.piece(tensors, part) for part in parts], abstract)
  logging.info("%s: %s", folder, report)
  return Imported(run, params, {"model": report}, None)


def write(imported: Imported, out: pathlib.Path) -> None:
  """Writes the folder; raises CheckpointError if `out` is a run already."""
  checkpoint.refuse_run(out)
  out.mkdir(parents=True, exist_ok=True)
  run = imported.run
  if imported.vocabulary is not None:
    for name, data in imported.vocabulary.files.items():
      (out / name).write_bytes(data)
    path = str(out / next(iter(imported.vocabulary.files)))
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=path))
  if imported.vocabulary is None and run.data.tokenizer:
    checkpoint.write_run_files(out, run)  # a whole model, with the tokenizer it was exported with
  else:
    (out / checkpoint.CONFIG).write_text(json.dumps(run.to_dict(), indent=2) + "\n")
  reports = {name: dataclasses.asdict(report) for name, report in imported.reports.items()}
  (out / REPORT).write_text(json.dumps(reports, indent=2) + "\n")
  checkpoint.save_params(out, 0, imported.params)


def _open(path: pathlib.Path) -> PartWeights:
  """Returns the weights at a folder, and the config beside them.

  Raises:
    ConvertError: there is none, or it cannot be read.
  """
  tensors = Tensors(path)
  folder = path if path.is_dir() else path.parent
  file = next((folder / name for name in (HF, OPEN_CLIP) if (folder / name).exists()), None)
  if file is None:
    raise ConvertError(f"'{folder}' has no {HF} and no {OPEN_CLIP} that describes the weights.")
  settings = untrusted.read_object(file, ConvertError)
  kind = "open_clip" if "model_cfg" in settings else settings.get("model_type")
  if not isinstance(kind, str):
    raise ConvertError(f"'{file}' is no config of a model: its 'model_type' is {kind!r}.")
  return PartWeights({**settings, "model_type": kind}, tensors)


def _vocabulary(decoder: pathlib.Path | None, tokenizer: pathlib.Path | None) -> Vocabulary | None:
  path = tokenizer or decoder
  return None if path is None else vocabulary.extend(path)


def _run_config(
  parts: dict[str, PartWeights], words: Vocabulary | None, feature_layer: int
) -> RunConfig:
  """Returns the config that the weights need; parts that are not read are at their defaults."""
  vision, decoder = VisionConfig(), DecoderConfig()
  if "vit" in parts:
    with _of_a_model("vit"):
      vision = families.vision_config(*parts["vit"], feature_layer)
  if "decoder" in parts:
    with _of_a_model("decoder"):
      tensors = parts["decoder"].tensors
      size = max(words.size if words else 0, families.vocab_size(tensors))
      decoder = families.decoder_config(*parts["decoder"], vocabulary.round_up(size))
  connector = ConnectorConfig()
  connector = dataclasses.replace(
    connector, token_grid=tuple(map(min, zip(connector.token_grid, vision.grid, strict=True)))
  )
  image_id = words.image_id if words else ModelConfig.image_token_id
  model = ModelConfig(vision, connector, decoder, image_token_id=image_id)
  return RunConfig(name="imported", model=model, data=DataConfig())


def _of_a_model(part: str) -> AbstractContextManager[None]:
  return untrusted.of_form(
    f"the config of the weights of --{part} is not of its form", ConvertError
  )


def _random(run: RunConfig, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """Returns fresh params for the names that are wanted; no other is computed."""

  def make() -> dict[str, jax.Array]:
    params = checkpoint.to_names(MM1(jax.random.key(run.train.seed), run.model))
    return {name: params[name].astype(x.dtype) for name, x in wanted.items()}

  return jax.jit(make)()
