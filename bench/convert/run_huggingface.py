# SPDX-License-Identifier: Apache-2.0
"""Answers questions with an export, where nothing of ours is installed.

See `bench.convert.exports`.

python bench/convert/run_huggingface.py EXPORT QUESTIONS OUT.npz MAX_NEW_TOKENS
"""

import json
import pathlib
import sys

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


def main(export: str, questions: str, out: str, max_new_tokens: str) -> None:
  folder = pathlib.Path(questions)
  model = AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True)
  processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)
  results = {}
  for i, question in enumerate(json.loads((folder / "questions.json").read_text())):
    content = [{"type": "image", "path": str(folder / name)} for name in question["images"]]
    turns = [{"role": "user", "content": [*content, {"type": "text", "text": question["text"]}]}]
    inputs = processor.apply_chat_template(
      turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(
      **inputs, max_new_tokens=int(max_new_tokens), output_logits=True, return_dict_in_generate=True
    )
    prompt = inputs["input_ids"].shape[1]
    results[f"prompt_{i}"] = inputs["input_ids"][0].numpy()
    results[f"tokens_{i}"] = answer.sequences[0, prompt:].numpy()
    results[f"logits_{i}"] = torch.stack(answer.logits)[:, 0].numpy()
  foreign = sorted({"jax", "mm1_jax", "sentencepiece", "tensorflow"} & set(sys.modules))
  assert not foreign, foreign
  np.savez(out, **results)


if __name__ == "__main__":
  main(*sys.argv[1:])
