# SPDX-License-Identifier: Apache-2.0
r"""Does an export answer as the run does? In an environment with nothing but what it says it needs.

  python -m bench.convert.exports --checkpoint=runs/demo/sft --workdir=runs/exports

Twenty held-out pictures of the shipped sample, and two questions about two pictures each, are
answered greedily by the run, and by each of its exports: in a process of a fresh virtual
environment (`--python` names one that is there instead). What our `generate` says must be the same
text. Where nothing of ours is installed, the process writes tokens and their logits, too, which our
model then reads at once: each token must be the likeliest that may be said, and no logit may be off
by more than 1e-4 of the largest.

All are in float32 but Orbax, which is in bfloat16: there, our model's params are rounded as well.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, reshard

from mm1_jax import checkpoint, cli
from mm1_jax.config import SourceConfig
from mm1_jax.configs import common
from mm1_jax.convert.export import exporter
from mm1_jax.convert.export.format import ExportOptions
from mm1_jax.data.sources import Source
from mm1_jax.inference.model import Model
from mm1_jax.inference.prompts import Request
from mm1_jax.models.mm1 import IN_FLOAT32
from mm1_jax.sharding import LAYOUT

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
NUM_PICTURES = 20
MAX_NEW_TOKENS = 48
LARGEST = 1e-4  # difference of a logit, of the largest one
PROMPT = "Describe the image."


class Fresh(NamedTuple):
  """How an export runs without this tree: `python PROGRAM EXPORT QUESTIONS OUT.npz TOKENS`."""

  program: str
  packages: tuple[str, ...]  # as pip takes them; EXPORT is the export
  dtype: str = "float32"


FRESH = {
  "huggingface": Fresh("run_huggingface.py", ("torch", "transformers", "pillow")),
  "stablehlo": Fresh("run_stablehlo.py", ("-r", "EXPORT/requirements.txt")),
  "safetensors": Fresh("run_mm1_jax.py", (str(ROOT),)),
  "orbax": Fresh("run_mm1_jax.py", (str(ROOT),), "bfloat16"),
}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--checkpoint", required=True, metavar="RUN", help="a run of conversations")
  add("--workdir", type=pathlib.Path, required=True, help="exports, environments and answers")
  add("--format", nargs="*", default=[*FRESH], help="those to check (all)")
  add("--python", help="of an environment that is there, instead of fresh ones")
  args = parser.parse_args()
  model = Model.load(args.checkpoint)
  questions = args.workdir / "questions"
  write_questions(questions)
  print("| format | same text | same tokens | largest difference |\n|---|---|---|---|")
  for name in args.format:
    out, answers = args.workdir / name, args.workdir / f"{name}.npz"
    fresh = FRESH[name]
    exporter.export(args.checkpoint, out, name, ExportOptions(fresh.dtype))
    packages = [part.replace("EXPORT", str(out)) for part in fresh.packages]
    python = args.python or make_environment(args.workdir / f"venv_{name}", packages)
    # From elsewhere, so that nothing of this tree can be imported.
    files = (path.resolve() for path in (out, questions, answers))
    command = [python, "-I", HERE / fresh.program, *files, MAX_NEW_TOKENS]
    subprocess.run([*map(str, command)], check=True, cwd=args.workdir)
    like = model if fresh.dtype == "float32" else rounded(model)
    said = like.generate(prompts(questions), max_new_tokens=MAX_NEW_TOKENS)
    (args.workdir / f"{name}.json").write_text(json.dumps(said, indent=2) + "\n")
    row = (name, *compare(like, questions, said, np.load(answers)))
    print(f"| {' | '.join(row)} |", flush=True)


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


def make_environment(folder: pathlib.Path, packages: list[str]) -> str:
  """Returns the Python of a fresh virtual environment with some packages, of our versions."""
  python = folder.absolute() / "bin" / "python"
  if not python.exists():
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", *packages], check=True)
  return str(python)


def rounded(model: Model) -> Model:
  """Returns the model with its params in bfloat16, but those that are computed with in float32."""
  params = checkpoint.to_names(model.params)
  for name, x in params.items():
    if name.split(".")[-1] not in IN_FLOAT32:
      params[name] = x.astype(jnp.bfloat16).astype(x.dtype)
  return Model(checkpoint.from_names(model.params, params), model.run, model.mesh)


def compare(
  model: Model, questions: pathlib.Path, said: list[str], answers: Mapping[str, np.ndarray]
) -> tuple[str, str, str]:
  """Returns how many texts and how many answers' tokens are ours, and how far logits are off.

  Raises:
    AssertionError: not all are, or too far.
  """
  num = len(said)
  if "texts" in answers:
    texts = sum(answers["texts"] == said)
    assert texts == num, texts
    return f"{texts} of {num}", "", ""
  texts = tokens = 0
  worst = 0.0
  space = " " if model.encoder.template.assistant.before.endswith(" ") else ""
  for i, request in enumerate(map(model.encode, prompts(questions))):
    assert answers[f"prompt_{i}"].tolist() == request.ids, f"question {i}: other ids of the prompt"
    ids, theirs = answers[f"tokens_{i}"], answers[f"logits_{i}"]
    texts += model.tokenizer.decode(ids.tolist()).removeprefix(space) == said[i]
    ours = read_answer(model, request, ids)
    known = np.isfinite(theirs)  # some programs bar what may not be said
    worst = max(worst, float(np.abs(ours - theirs)[known].max() / np.abs(ours).max()))
    allowed = np.where(model.answers.allowed, ours, -np.inf)
    tokens += bool((allowed.argmax(axis=1) == ids).all())
  assert (texts, tokens) == (num, num), (texts, tokens, worst)
  assert worst <= LARGEST, worst
  return f"{texts} of {num}", f"{tokens} of {num}", f"{worst:.1e}"


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


if __name__ == "__main__":
  cli.run(main)
