# SPDX-License-Identifier: Apache-2.0
"""A folder that `transformers` loads: `--format=huggingface`.

The model and its processor are ours, in PyTorch, and travel with the weights:

  AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
  AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
"""

import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from mm1_jax.config import RunConfig
from mm1_jax.convert import ConvertError
from mm1_jax.convert.export import card, shards, vocabulary
from mm1_jax.convert.export.format import ExportOptions
from mm1_jax.convert.export.huggingface import names
from mm1_jax.convert.export.huggingface.jinja import to_jinja
from mm1_jax.convert.export.run_reader import RunReader
from mm1_jax.convert.tensors import Tensors
from mm1_jax.data.template import ChatTemplate
from mm1_jax.data.tokenizer import TOKENIZER_CONFIG

DTYPES: tuple[str, ...] = ("float32", "bfloat16")
REQUIREMENTS = ("numpy", "pillow", "safetensors", "torch", "transformers>=5")
CODE = ("configuration_mm1.py", "modeling_mm1.py", "pictures_mm1.py", "processing_mm1.py")
USE = """\
It needs torch, transformers 5 (`transformers>=5`, 5.24.0 was tested) and pillow; nothing is
downloaded.

```python
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
turns = [{"role": "user", "content": [
  {"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "Describe the image."}]}]
inputs = processor.apply_chat_template(
  turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs)[:, inputs["input_ids"].shape[1]:]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```
"""


def check(reader: RunReader, options: ExportOptions) -> None:
  """Raises ConvertError if the tokenizer cannot be written as tokenizer.json with the same ids."""
  tokenizer_files(reader)


def write(reader: RunReader, out: pathlib.Path, options: ExportOptions) -> None:
  for name in CODE:
    shutil.copyfile(pathlib.Path(__file__).parent / name, out / name)
  template = reader.encoder().template
  for name, data in tokenizer_files(reader).items():
    (out / name).write_bytes(data)
  (out / "chat_template.jinja").write_text(to_jinja(template))
  (out / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n")
  _write_json(out / "config.json", names.config(reader.run, options.dtype))
  _write_json(out / "generation_config.json", generation_config(reader))
  _write_json(out / "processor_config.json", processor_config(reader, template))
  (out / card.NAME).write_text(card.text(reader, options, USE))
  shards.write(_tensors(reader, options.dtype), out, options.max_shard_gb, {"format": "pt"})


def compare(reader: RunReader, out: pathlib.Path, options: ExportOptions) -> str:
  tensors, unread = Tensors(out), 0
  for part, value in reader.read():
    theirs, layout = names.tensors(part, reader.run.model)
    read = layout.load([tensors.read(name) for name in theirs], part.shape)
    if not np.array_equal(read, part.cast(value, options.dtype)):
      raise ConvertError(f"'{out}': {part.path} is not what was written; is the disk full?")
    unread += len(theirs)
  if unread != len(list(tensors)):
    raise ConvertError(f"'{out}' has {len(list(tensors))} tensors, but {unread} were written.")
  return f"{unread} tensors read back, equal to the run's"


def generation_config(reader: RunReader) -> dict[str, Any]:
  """Returns how the model answers: greedily, never with a symbol that is not the end."""
  tokenizer, answers = reader.tokenizer, reader.answers()
  return {
    "bos_token_id": tokenizer.bos_id,
    "eos_token_id": sorted(answers.ends),
    "pad_token_id": tokenizer.pad_id,
    "suppress_tokens": np.flatnonzero(~answers.allowed).tolist(),
    "max_new_tokens": 128,
    "do_sample": False,
  }


def processor_config(reader: RunReader, template: ChatTemplate) -> dict[str, Any]:
  """Returns the processor's settings besides the tokenizer."""
  run: RunConfig = reader.run
  tokenizer, tiling = reader.tokenizer, run.data.tiling
  settings = {
    "image_size": list(run.model.vision.image_size),
    "image_fit": run.data.image_fit,
    "max_pixels": run.data.max_image_pixels,
    "tiling": vars(tiling) if tiling else None,
    "tokens_per_image": run.model.connector.num_tokens,
    "image_delimiters": run.data.image_delimiters,
    "image_token_id": tokenizer.image_id,
    "image_start_id": tokenizer.image_start_id,
    "image_end_id": tokenizer.image_end_id,
    "space_mark_ids": vocabulary.space_mark_ids(tokenizer),
    "symbols": tokenizer.symbols,
    "template": json.loads(template.to_json()),
  }
  return {
    "processor_class": "MM1Processor",
    "auto_map": {"AutoProcessor": "processing_mm1.MM1Processor"},
    "settings": settings,
  }


def tokenizer_files(reader: RunReader) -> dict[str, bytes]:
  """Returns tokenizer.json and tokenizer_config.json of a run."""
  path = epath.Path(reader.run.data.tokenizer)
  beside = path.parent / TOKENIZER_CONFIG
  config = beside.read_bytes() if beside.exists() else b""
  return vocabulary.files(reader.tokenizer, path.read_bytes(), config)


def _tensors(reader: RunReader, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
  for part, value in reader.read():
    theirs, layout = names.tensors(part, reader.run.model)
    stored = layout.store(part.cast(value, dtype))
    yield from zip(theirs, stored, strict=True)


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
