# SPDX-License-Identifier: Apache-2.0
"""Writes settings.json: the keys of `transformers`' config classes, with their defaults.

`tests/convert/config_keys_test.py` compares `mm1_jax/convert/settings.py` with it, and, where
`transformers` is installed, it with the classes. To see what a new release brings:

  python3 -m venv /tmp/torchenv
  /tmp/torchenv/bin/pip install transformers
  /tmp/torchenv/bin/python tests/goldens/make_settings.py
"""

import dataclasses
import json
import pathlib
from typing import Any

import transformers

FILE = pathlib.Path(__file__).parent / "settings.json"
CLASSES = {
  "llama": "LlamaConfig",
  "mistral": "MistralConfig",
  "qwen2": "Qwen2Config",
  "qwen3": "Qwen3Config",
  "mixtral": "MixtralConfig",
  "qwen3_moe": "Qwen3MoeConfig",
  "clip_vision_model": "CLIPVisionConfig",
  "siglip_vision_model": "SiglipVisionConfig",
}


def keys(name: str) -> dict[str, Any]:
  """Returns the fields of a class with their defaults, and what else it writes to a file."""
  made = getattr(transformers, name)
  fields = {field.name: field.default for field in dataclasses.fields(made)}
  return dict(sorted((dict.fromkeys(made().to_dict()) | fields).items()))


def main() -> None:
  values = {"transformers": transformers.__version__}
  values |= {kind: keys(name) for kind, name in CLASSES.items()}
  FILE.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
  main()
