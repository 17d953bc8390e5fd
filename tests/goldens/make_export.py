# SPDX-License-Identifier: Apache-2.0
"""Writes export/NAME.npz: what the exported PyTorch model computes, and what its tensors are.

`tests/convert/export_test.py` compares our forward pass and our exports with them, so that CI needs
no PyTorch. The runs are those of `tests/helpers/exports.py`. To renew them:

  pip install -c constraints.txt -e '.[goldens]'
  python -m tests.goldens.make_export

An .npz holds `tokens`, `images` (uint8), every 24th position's `logits`, and `tensors`, a line
NAME SHAPE for each.
"""

import pathlib
import tempfile

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mm1_jax.convert.export import exporter
from mm1_jax.convert.export.format import ExportOptions
from tests.helpers import exports

HERE = pathlib.Path(__file__).parent
EVERY = 24
TURN = {"type": "text", "text": "What is this? It stands in front of a house, as dogs do."}


def main() -> None:
  for name in exports.MODELS:
    run = exports.run_config(name)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
      workdir, out = pathlib.Path(folder) / "run", pathlib.Path(folder) / "out"
      exports.save_run(workdir, run, exports.make_params(run))
      form = "llava" if name.startswith("llava") else "huggingface"
      exporter.export(workdir, out, form, ExportOptions("float32"))
      model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
      processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    turns = [{"role": "user", "content": [{"type": "image", "image": image}, TURN]}]
    inputs = processor.apply_chat_template(
      turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
      logits = model(**inputs).logits[0, ::EVERY].numpy()
    pixels = inputs["pixel_values"].numpy().transpose(0, 2, 3, 1)
    std, mean = (np.float32(x) for x in ((0.26862954, 0.26130258, 0.27577711), MEAN))
    tied = model.config.tie_word_embeddings
    np.savez_compressed(
      HERE / "export" / f"{name}.npz",
      tokens=inputs["input_ids"].numpy().astype(np.int32),
      images=np.rint((pixels * std + mean) * 255).astype(np.uint8),
      logits=logits.astype(np.float32),
      tensors=[
        f"{key} {tuple(x.shape)}"
        for key, x in sorted(model.state_dict().items())
        if not (tied and key == "lm_head.weight")
      ],
    )


MEAN = (0.48145466, 0.4578275, 0.40821073)

if __name__ == "__main__":
  (HERE / "export").mkdir(exist_ok=True)
  main()
