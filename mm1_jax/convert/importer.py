# SPDX-License-Identifier: Apache-2.0
"""Open weights to a checkpoint that `train.init_from` takes, and the config that it needs.

The folder that comes out is laid out like a run's: `checkpoints/0/params`, `config.json`, the
tokenizer and the chat template; and `import.json`, which says what became of every tensor, and what
of the model is not kept.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from mm1_jax import checkpoint, untrusted
from mm1_jax.config import (
  ConfigError,
  ConnectorConfig,
  DataConfig,
  DecoderConfig,
  ModelConfig,
  RunConfig,
  VisionConfig,
)
from mm1_jax.convert import ConvertError, chat, families, settings, unfinished, vocabulary
from mm1_jax.convert.export import folder as export
from mm1_jax.convert.export import run_reader
from mm1_jax.convert.load import Report, load
from mm1_jax.convert.placement import params_mesh
from mm1_jax.convert.settings import Settings
from mm1_jax.convert.tensors import Tensors, find, shorten
from mm1_jax.convert.vocabulary import Vocabulary
from mm1_jax.data.template import ChatTemplate
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import abstract_state

OPEN_CLIP, HF = "open_clip_config.json", "config.json"


class PartWeights(NamedTuple):
  """Weights of an encoder or a decoder, with the config that comes with them."""

  settings: Settings
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
  template: ChatTemplate | None = None  # the model's own
  window: int | None = None  # positions that its layers see back, where ours see all
  notes: tuple[str, ...] = ()  # what is not kept, or was not read


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
  rows = families.Words(words.own, words.new) if words else None
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
        cfg = run.model.vision
        pieces = families.vision_pieces(part.kind, cfg, part.tensors)
      else:
        cfg = run.model.decoder
        pieces = families.decoder_pieces(part.kind, cfg, part.tensors, rows)
      unused = functools.partial(families.without_effect, part.kind, cfg, part.tensors)
      loaded, reports[name] = load(part.tensors, pieces, of_part, unused)
      params |= loaded
      logging.info("%s of %s: %s", name, part.kind, reports[name])
    if fill:
      params |= _random(run, {k: x for k, x in abstract.items() if k not in params})
  template, lost = (None, "") if words is None else _template(words)
  notes = (*_notes(parts, words), *([lost] if lost else []))
  for note in notes:
    logging.warning("%s", note)
  return Imported(run, params, reports, words, template, _window(parts), notes)


def import_export(folder: pathlib.Path, *, dtype: str = "float32", fsdp: int = -1) -> Imported:
  """Reads what `python -m mm1_jax.convert export --format=safetensors` wrote, onto a mesh.

  Args:
    folder: of the export.
    dtype: what params are kept in; of int8, what its scales make of it.
    fsdp: devices that params are split over; -1 takes all.

  Raises:
    CheckpointError, ConvertError: the folder is no such export, or damaged.
  """
  folder = folder.parent if folder.is_file() else folder
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
  """Writes the folder, which has its name when it is whole.

  Raises:
    CheckpointError: `out` is a run already.
    ConvertError: it is there, and not empty.
  """
  checkpoint.refuse_run(out)
  with unfinished.folder(out) as working:
    run = imported.run
    if imported.vocabulary is None and run.data.tokenizer:
      checkpoint.write_run_files(working, run)  # with the tokenizer it was exported with
    else:
      run = _write_words(imported, working, out)
      (working / checkpoint.CONFIG).write_text(json.dumps(run.to_dict(), indent=2) + "\n")
    reports = {name: dataclasses.asdict(report) for name, report in imported.reports.items()}
    about = {**reports, "window": imported.window, "notes": imported.notes}
    (working / checkpoint.IMPORT).write_text(json.dumps(about, indent=2) + "\n")
    checkpoint.save_params(working, 0, imported.params)


def _write_words(imported: Imported, working: pathlib.Path, out: pathlib.Path) -> RunConfig:
  """Writes the tokenizer and the template, and returns the config that names them in `out`."""
  data = imported.run.data
  if imported.vocabulary is not None:
    for name, content in imported.vocabulary.files.items():
      (working / name).write_bytes(content)
    data = dataclasses.replace(data, tokenizer=str(out / next(iter(imported.vocabulary.files))))
  if imported.template is not None:
    (working / checkpoint.TEMPLATE).write_text(imported.template.to_json())
    data = dataclasses.replace(data, chat=True, chat_template=str(out / checkpoint.TEMPLATE))
  return dataclasses.replace(imported.run, data=data)


def _open(path: pathlib.Path) -> PartWeights:
  """Returns the weights at a folder, or in a file, and the config beside them.

  Raises:
    ConvertError: there is none, or it cannot be read.
  """
  path = find(path)
  folder = path if path.is_dir() else path.parent
  if (folder / HF).exists():
    # Before the tensors are looked at: of quantised ones, each has another fault.
    settings.refuse_quantised(folder, untrusted.read_object(folder / HF, ConvertError))
  tensors = Tensors(path)
  # A folder may have both: the one that describes these tensors.
  names = (OPEN_CLIP, HF) if any(x.endswith("conv1.weight") for x in tensors) else (HF, OPEN_CLIP)
  file = next((folder / name for name in names if (folder / name).exists()), None)
  if file is None:
    raise ConvertError(
      f"'{folder}' has no {HF} and no {OPEN_CLIP} that describes the weights.{_hint(folder)}"
    )
  given = untrusted.read_object(file, ConvertError)
  kind = "open_clip" if "model_cfg" in given else given.get("model_type")
  if not isinstance(kind, str):
    raise ConvertError(f"'{file}' is no config of a model: its 'model_type' is {kind!r}.")
  return PartWeights({**given, "model_type": kind}, tensors)


def _hint(folder: pathlib.Path) -> str:
  """Returns what a folder without a config seems to be."""
  if (folder / "params.json").exists():
    return " It is in its maker's own format (params.json); take the folder for transformers."
  if (folder / "adapter_config.json").exists():
    return " It has adapters alone; merge them into their model with PEFT's merge_and_unload()."
  return ""


def _window(parts: dict[str, PartWeights]) -> int | None:
  decoder = parts.get("decoder")
  if decoder is None:
    return None
  return settings.window(settings.read(decoder.kind, decoder.settings))


def _notes(parts: dict[str, PartWeights], words: Vocabulary | None) -> Iterator[str]:
  """Yields what of a model is not kept."""
  window = _window(parts)
  if window is not None:
    yield (
      f"sliding_window {window} is not kept: ours sees all positions. Rows of up to {window} "
      "positions are as the model has them (data.seq_len)."
    )
  for name, part in parts.items():
    if part.kind == "open_clip":
      continue
    unread = settings.unread(*settings.of_vision(part.kind, part.settings))
    if unread:
      yield f"{HF} of --{name} has keys that transformers 5 does not know: {shorten(unread)}."
  if words is not None and "decoder" in parts:
    rows = families.vocab_size(parts["decoder"].tensors)
    if words.own > rows:
      yield (
        f"the tokenizer has {words.own} ids, the embedding {rows} rows: the last "
        f"{words.own - rows} ids begin as the mean of the others."
      )


def _template(words: Vocabulary) -> tuple[ChatTemplate | None, str]:
  """Returns the model's own chat template in our form, and what of it is not kept."""
  if words.chat is None:
    return None, ""
  template, lost = chat.translate(words.chat, words.bos, words.eos)
  if template is None:
    return None, (
      f"the model's chat template is not kept ({lost}); name one with data.chat_template, see "
      "docs/reference/templates.md."
    )
  return template, f"of the model's chat template: {lost}." if lost else ""


def _vocabulary(decoder: pathlib.Path | None, tokenizer: pathlib.Path | None) -> Vocabulary | None:
  """Returns the tokenizer at its path, or beside the decoder's weights."""
  if tokenizer is None:
    if decoder is None:
      return None
    tokenizer = decoder if decoder.is_dir() else decoder.parent
  return vocabulary.extend(tokenizer)


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
  window = _window(parts)
  connector = ConnectorConfig()
  connector = dataclasses.replace(
    connector, token_grid=tuple(map(min, zip(connector.token_grid, vision.grid, strict=True)))
  )
  image_id = words.image_id if words else ModelConfig.image_token_id
  model = ModelConfig(vision, connector, decoder, image_token_id=image_id)
  run = RunConfig(name="imported", model=model, data=DataConfig())
  return run if window is None else _within(run, window)


def _within(run: RunConfig, window: int) -> RunConfig:
  """Returns the run with rows of at most `window` positions, within which all is as it was."""
  data = dataclasses.replace(run.data, seq_len=min(run.data.seq_len, window))
  most = max(1, data.seq_len // run.image_positions)
  data = dataclasses.replace(data, images_per_row=min(data.images_per_row, most))
  try:
    return dataclasses.replace(run, data=data)
  except ConfigError as e:
    raise ConvertError(
      f"sliding_window is {window}, and a layer of ours sees all positions: {e}"
    ) from e


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
