# SPDX-License-Identifier: Apache-2.0
r"""Does an export answer as the run does? In an environment with nothing but what it says it needs.

  python -m bench.exports --checkpoint=runs/demo/sft --workdir=runs/exports

Twenty held-out pictures of the shipped sample, and two questions about two pictures each, are
answered greedily by the run, and by each of its exports in float32: in a process of a fresh virtual
environment (`--python` names one that is there instead), which writes its tokens and their logits.
Our model then reads those tokens at once: each must be the likeliest that may be said, and no logit
may be off by more than 1e-4 of the largest. What our `generate` says must be the same text.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, reshard

from configs import common
from mm1_jax import cli
from mm1_jax.config import SourceConfig
from mm1_jax.convert import importer
from mm1_jax.convert.export import exporter
from mm1_jax.convert.export.format import Options
from mm1_jax.data.sources import Source
from mm1_jax.inference.model import Model
from mm1_jax.inference.prompts import Request
from mm1_jax.sharding import LAYOUT

HERE = pathlib.Path(__file__).parent
NUM_PICTURES = 20
MAX_NEW_TOKENS = 48  # as in the programs that run in the fresh environments
LARGEST = 1e-4  # difference of a logit, of the largest one
PROMPT = "Describe the image."


class Fresh(NamedTuple):
  """How an export runs without us: `python PROGRAM EXPORT QUESTIONS OUT.npz`."""

  program: str
  packages: tuple[str, ...]


FRESH = {"huggingface": Fresh("run_huggingface.py", ("torch", "transformers", "pillow"))}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--checkpoint", required=True, metavar="RUN", help="a run of conversations")
  add("--workdir", type=pathlib.Path, required=True, help="exports, environments and answers")
  add("--format", nargs="*", default=[*FRESH, "safetensors"], help="those to check (all)")
  add("--python", help="of an environment that is there, instead of fresh ones")
  args = parser.parse_args()
  model = Model.load(args.checkpoint)
  questions = args.workdir / "questions"
  write_questions(questions)
  said = model.generate(prompts(questions), max_new_tokens=MAX_NEW_TOKENS)
  (args.workdir / "ours.json").write_text(json.dumps(said, indent=2) + "\n")
  print(
    f"| format | same text of {len(said)} | same tokens | largest difference |\n|---|---|---|---|"
  )
  for name in args.format:
    out = args.workdir / name
    exporter.export(args.checkpoint, out, name, Options("float32"))
    if name in FRESH:
      python = args.python or make_environment(args.workdir / f"venv_{name}", FRESH[name].packages)
      program, answers = HERE / FRESH[name].program, args.workdir / f"{name}.npz"
      # From elsewhere, so that nothing of this tree can be imported.
      command = [python, "-I", program.resolve(), out.resolve(), questions.resolve()]
      subprocess.run([*map(str, command), str(answers.resolve())], check=True, cwd=args.workdir)
      row = compare(model, questions, said, np.load(answers))
    else:
      row = compare_imported(model, out, args.workdir / f"{name}_run", questions, said)
    print(f"| {name} | {row[0]} | {row[1]} | {row[2]} |", flush=True)


def write_questions(folder: pathlib.Path) -> None:
  """Writes pictures, and questions.json: [{"images": [a file's name, ...], "text": ...}, ...]."""
  folder.mkdir(parents=True, exist_ok=True)
  source = Source(SourceConfig("captions", str(common.SAMPLE / "captions-heldout-*")))
  stride = len(source) // NUM_PICTURES
  questions = []
  for i in range(NUM_PICTURES):
    content = source[i * stride]["content"]
    image = next(item["image"] for item in content if "image" in item)
    (folder / f"{i:02d}.jpg").write_bytes(image)
    questions.append({"images": [f"{i:02d}.jpg"], "text": PROMPT})
  for pair in (["00.jpg", "01.jpg"], ["02.jpg", "03.jpg"]):
    questions.append({"images": pair, "text": "What do the two images have in common?"})
  (folder / "questions.json").write_text(json.dumps(questions, indent=2) + "\n")


def prompts(questions: pathlib.Path) -> list[list]:
  """Returns the questions as `Model.generate` takes them."""
  listed = json.loads((questions / "questions.json").read_text())
  return [[*(questions / name for name in q["images"]), q["text"]] for q in listed]


def make_environment(folder: pathlib.Path, packages: tuple[str, ...]) -> str:
  """Returns the Python of a fresh virtual environment with some packages, of our versions."""
  python = folder / "bin" / "python"
  if not python.exists():
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", HERE.parent / "constraints.txt", *packages], check=True)
  return str(python)


def compare(
  model: Model, questions: pathlib.Path, said: list[str], answers: dict[str, np.ndarray]
) -> tuple[int, int, str]:
  """Returns how many texts and how many answers' tokens are ours, and how far logits are off.

  Raises:
    AssertionError: not all are, or too far.
  """
  texts = tokens = 0
  worst = 0.0
  space = " " if model.encoder.template.assistant.before.endswith(" ") else ""
  for i, request in enumerate(map(model.encode, prompts(questions))):
    assert answers[f"prompt_{i}"].tolist() == request.ids, f"question {i}: other ids of the prompt"
    ids, theirs = answers[f"tokens_{i}"], answers[f"logits_{i}"]
    texts += model.tokenizer.decode(ids.tolist()).removeprefix(space) == said[i]
    ours = read_answer(model, request, ids)
    worst = max(worst, float(np.abs(ours - theirs).max() / np.abs(ours).max()))
    allowed = np.where(model._allowed, ours, -np.inf)
    tokens += bool((allowed.argmax(axis=1) == ids).all())
  num = len(said)
  assert (texts, tokens) == (num, num), (texts, tokens, worst)
  assert worst <= LARGEST, worst
  return texts, tokens, f"{worst:.1e}"


def read_answer(model: Model, request: Request, ids: np.ndarray) -> np.ndarray:
  """Returns our logits at each token of an answer, float32[n, V], read all at once."""
  row = np.array([*request.ids, *ids[:-1]], np.int32)
  size = -len(row) % 64  # so that answers share programs
  tokens, images = np.pad(row, (0, size))[None], np.stack(request.images)[None]
  segments = (np.arange(tokens.shape[1]) < len(row)).astype(np.int32)[None]
  with jax.set_mesh(model.mesh):
    place = NamedSharding(model.mesh, LAYOUT.act_b)
    logits = _forward(model.params, *jax.device_put((tokens, images, segments), place))
  return np.asarray(logits)[0, len(request.ids) - 1 : len(row)]


@jax.jit
def _forward(params, tokens, images, segments):
  num = tokens.shape[1]
  positions = reshard(jnp.arange(num)[None], LAYOUT.act_b)
  out = params.prefill(tokens, images, positions, segments, params.decoder.init_cache(1, num))
  return params.decoder.logits(out.hidden)


def compare_imported(
  model: Model, out: pathlib.Path, workdir: pathlib.Path, questions: pathlib.Path, said: list[str]
) -> tuple[int, int, str]:
  """Imports an export under our own names, and answers with it: all must be the same."""
  importer.write(importer.import_export(out, fsdp=1), workdir)
  imported = Model.load(workdir)
  equal = all(_equal(model, imported))
  same = sum(
    a == b
    for a, b in zip(
      imported.generate(prompts(questions), max_new_tokens=MAX_NEW_TOKENS), said, strict=True
    )
  )
  assert equal
  assert same == len(said), same
  return same, same, "0, params are equal"


def _equal(one: Model, other: Model) -> Iterator[bool]:
  for x, y in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
    yield bool(np.array_equal(np.asarray(x), np.asarray(y)))


if __name__ == "__main__":
  cli.run(main)
