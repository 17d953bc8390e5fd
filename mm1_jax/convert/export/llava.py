# SPDX-License-Identifier: Apache-2.0
"""A model that is exactly LLaVA, as `transformers` has it: `--format=llava`.

That is CLIP's encoder, two layers with a GELU between them, and Llama. The folder loads with
`LlavaForConditionalGeneration` and `LlavaProcessor`, without code of ours.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from mm1_jax.config import RunConfig
from mm1_jax.convert import ConvertError
from mm1_jax.convert.export import card, huggingface, shards
from mm1_jax.convert.export.format import ExportOptions
from mm1_jax.convert.export.huggingface import names
from mm1_jax.convert.export.huggingface.jinja import to_jinja
from mm1_jax.convert.export.run_reader import ParamPart, RunReader
from mm1_jax.convert.tensors import Tensors
from mm1_jax.data.tokenizer import IMAGE, IMAGE_END, IMAGE_START
from mm1_jax.models.vit import PIXEL_MEAN, PIXEL_STD

DTYPES: tuple[str, ...] = ("float32", "bfloat16")
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
# In LLaVA one table, the class token's row first.
POSITIONS = f"{names.VISION}.embeddings.position_embedding.weight"
IN_TABLE = ("vit.class_position", "vit.positions")
UNUSED_NORM = f"{names.VISION}.post_layernorm"  # it has one, after the features
PROJECTOR = "model.multi_modal_projector.linear"

USE = """\
It needs torch, transformers 5 (`transformers>=5`, 5.24.0 was tested) and pillow; nothing is
downloaded.

```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained(".")
processor = AutoProcessor.from_pretrained(".")
```
"""


def check(reader: RunReader, options: ExportOptions) -> None:
  """Raises ConvertError naming all that LLaVA does not have."""
  del options
  run, model = reader.run, reader.run.model
  vision, connector, decoder = model.vision, model.connector, model.decoder
  two_layers = connector.kind == "mlp" and connector.mlp_depth == 2
  has = {
    f"model.connector.kind '{connector.kind}' of {connector.mlp_depth} layers": not two_layers,
    "model.decoder.moe": decoder.moe is not None,
    "model.decoder.qk_norm": decoder.qk_norm,
    "model.decoder.qkv_bias": decoder.qkv_bias,
    "an encoder without class token (model.vision.class_token)": not vision.class_token,
    "an encoder without pre_norm (model.vision.pre_norm)": not vision.pre_norm,
    "a picture that is not square (model.vision.image_size)": len(set(vision.image_size)) > 1,
    "positions of another grid (model.vision.position_grid)": vision.position_grid != vision.grid,
    "data.tiling": run.data.tiling is not None,
    "data.image_fit 'pad'": run.data.image_fit == "pad",
  }
  lacks = [name for name, there in has.items() if there]
  if lacks:
    raise ConvertError(
      f"LLaVA in transformers has no {'; no '.join(lacks)}. --format=huggingface has all."
    )
  huggingface.check(reader, ExportOptions())


def write(reader: RunReader, out: pathlib.Path, options: ExportOptions) -> None:
  run, template = reader.run, reader.encoder().template
  for name, data in huggingface.tokenizer_files(reader).items():
    (out / name).write_bytes(data)
  picture = f"{IMAGE_START}{IMAGE}{IMAGE_END}" if run.data.image_delimiters else IMAGE
  (out / "chat_template.jinja").write_text(to_jinja(template, picture))
  (out / "requirements.txt").write_text("\n".join(huggingface.REQUIREMENTS) + "\n")
  side = run.model.vision.image_size[0]
  pictures = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": side, "width": side},
    "resample": 3,  # bicubic
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": PIXEL_MEAN,
    "image_std": PIXEL_STD,
  }
  processor = {
    "processor_class": "LlavaProcessor",
    "patch_size": run.model.vision.patch_size,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
    "image_token": IMAGE,
  }
  written = {
    "config.json": config(run, options.dtype),
    "generation_config.json": huggingface.generation_config(reader),
    "preprocessor_config.json": pictures,
    "processor_config.json": processor,
  }
  for name, values in written.items():
    (out / name).write_text(json.dumps(values, indent=2) + "\n")
  (out / card.NAME).write_text(card.text(reader, options, USE))
  shards.write(_tensors(reader, options.dtype), out, options.max_shard_gb, {"format": "pt"})


def compare(reader: RunReader, out: pathlib.Path, options: ExportOptions) -> str:
  tensors = Tensors(out)
  for part, value in reader.read():
    if part.name in IN_TABLE:
      rows = tensors.read(POSITIONS)
      read = rows[0] if part.name == IN_TABLE[0] else rows[1:].reshape(part.shape)
    else:
      theirs, layout = _names(part, reader)
      read = layout.load([tensors.read(name) for name in theirs], part.shape)
    wanted = value.astype(_numpy_type(options.dtype)).astype(np.float32)
    if not np.array_equal(read.astype(np.float32), wanted):
      raise ConvertError(f"'{out}': {part.path} is not what was written; is the disk full?")
  return f"{len(reader.parts)} params read back, equal to the run's"


def config(run: RunConfig, dtype: str) -> dict[str, Any]:
  """Returns config.json of a run's model."""
  vision, decoder = run.model.vision, run.model.decoder
  rope: dict[str, Any] = {"rope_type": "default", "rope_theta": decoder.rope_theta}
  if decoder.rope_scaling is not None:
    scaling = vars(decoder.rope_scaling).copy()
    original = scaling.pop("original_positions")
    rope |= {"rope_type": "llama3", "original_max_position_embeddings": original, **scaling}
  # Under the names of transformers 4 as well, which knows no others and would take its defaults.
  older = {"rope_theta": decoder.rope_theta, "rope_scaling": rope if decoder.rope_scaling else None}
  return {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "transformers_version": names.TESTED,
    "dtype": dtype,
    "image_token_index": run.model.image_token_id,
    "image_seq_length": run.model.connector.num_tokens,
    "projector_hidden_act": "gelu_pytorch_tanh",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -1,  # the blocks after ours are left out
    "multimodal_projector_bias": True,
    "tie_word_embeddings": decoder.tie_embeddings,
    "vision_config": {
      "model_type": "clip_vision_model",
      "image_size": vision.image_size[0],
      "patch_size": vision.patch_size,
      "hidden_size": vision.width,
      "num_hidden_layers": vision.num_blocks,
      "num_attention_heads": vision.num_heads,
      "intermediate_size": vision.mlp_dim,
      "hidden_act": ACTIVATIONS[vision.activation],
      "layer_norm_eps": vision.norm_eps,
    },
    "text_config": {
      "model_type": "llama",
      "vocab_size": decoder.vocab_size,
      "hidden_size": decoder.width,
      "num_hidden_layers": decoder.depth,
      "num_attention_heads": decoder.num_heads,
      "num_key_value_heads": decoder.num_kv_heads,
      "head_dim": decoder.head_dim,
      "intermediate_size": decoder.mlp_dim,
      "rms_norm_eps": decoder.norm_eps,
      "rope_parameters": rope,
      **older,
      "max_position_embeddings": run.data.seq_len,
      "tie_word_embeddings": decoder.tie_embeddings,
    },
  }


def _names(part: ParamPart, reader: RunReader) -> names.TorchTensors:
  theirs, layout = names.tensors(part, reader.run.model)
  for i in (0, 1):
    theirs = [
      name.replace(f"{names.CONNECTOR}.readout.{i}.", f"{PROJECTOR}_{i + 1}.") for name in theirs
    ]
  return names.TorchTensors(theirs, layout)


def _tensors(reader: RunReader, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
  kind, table = _numpy_type(dtype), {}
  for part, value in reader.read():
    if part.name in IN_TABLE:
      table[part.name] = value.astype(kind).reshape(-1, value.shape[-1])
      continue
    theirs, layout = _names(part, reader)
    yield from zip(theirs, layout.store(value.astype(kind)), strict=True)
  yield POSITIONS, np.concatenate([table[name] for name in IN_TABLE])
  width = reader.run.model.vision.width
  yield f"{UNUSED_NORM}.weight", np.ones(width, kind)
  yield f"{UNUSED_NORM}.bias", np.zeros(width, kind)


def _numpy_type(dtype: str) -> Any:
  """Returns the dtype of all weights, as transformers computes with one dtype."""
  return np.float32 if dtype == "float32" else ml_dtypes.bfloat16
