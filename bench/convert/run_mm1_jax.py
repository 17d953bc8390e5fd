# SPDX-License-Identifier: Apache-2.0
"""Answers questions with an export that needs this package, installed.

See `bench.convert.exports`.

python bench/convert/run_mm1_jax.py EXPORT QUESTIONS OUT.npz MAX_NEW_TOKENS
"""

import json
import pathlib
import sys

import numpy as np

from mm1_jax.convert import importer
from mm1_jax.inference.model import Model


def main(export: str, questions: str, out: str, max_new_tokens: str) -> None:
  run, folder = pathlib.Path(export), pathlib.Path(questions)
  if not (run / "checkpoints").exists():
    imported = importer.import_export(run)
    run = run.with_name(f"{run.name}_run")
    importer.write(imported, run)
  model = Model.load(run)
  listed = json.loads((folder / "questions.json").read_text())
  prompts = [[*(folder / name for name in q["images"]), q["text"]] for q in listed]
  np.savez(out, texts=model.generate(prompts, max_new_tokens=int(max_new_tokens)))


if __name__ == "__main__":
  main(*sys.argv[1:])
