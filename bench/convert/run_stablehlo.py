# SPDX-License-Identifier: Apache-2.0
"""Answers questions with programs of JAX, where nothing of ours is installed.

See `bench.convert.exports`.

python bench/convert/run_stablehlo.py EXPORT QUESTIONS OUT.npz MAX_NEW_TOKENS
"""

import json
import pathlib
import sys

import numpy as np


def main(export: str, questions: str, out: str, max_new_tokens: str) -> None:
  folder = pathlib.Path(questions)
  sys.path.insert(0, export)
  from run import Exported  # pyright: ignore[reportMissingImports]  # the export's own

  exported, results = Exported(pathlib.Path(export)), {}
  for i, question in enumerate(json.loads((folder / "questions.json").read_text())):
    pixels = exported.pixels([folder / name for name in question["images"]])
    ids = exported.prompt(len(pixels), question["text"])
    tokens, rows = [], []
    for logits in exported.logits(ids, pixels):
      tokens.append(int(np.argmax(logits)))
      rows.append(logits)
      if tokens[-1] in exported.about["ends"] or len(tokens) == int(max_new_tokens):
        break
    results |= {f"prompt_{i}": ids, f"tokens_{i}": tokens, f"logits_{i}": rows}
  foreign = sorted({"flax", "mm1_jax", "orbax", "tensorflow", "torch"} & set(sys.modules))
  assert not foreign, foreign
  np.savez(out, **{name: np.asarray(x) for name, x in results.items()})


if __name__ == "__main__":
  main(*sys.argv[1:])
