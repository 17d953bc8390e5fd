# SPDX-License-Identifier: Apache-2.0
"""Our scores and times beside lm-evaluation-harness's `hf` model, on the same weights and items.

  python -m bench.eval.lm_eval_peers --weights=SmolLM2-135M-Instruct.Q4_1.gguf --work=/tmp/real \
      --data=FOLDER --limit=100

FOLDER has arc-easy.jsonl, piqa.jsonl and others of `TASKS`, lines of question, choices and
answer_index. Each task is scored by our own evaluation, by the harness with our model, and by the
harness with its own `hf` model, in float32 and without `<s>`, item by item. Then choices of PIQA
and short answers are timed by turns, after a pass that compiles. Needs the extras `convert`,
`lm-eval` and `goldens`, and `gguf` for such a file.
"""

import argparse
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import lm_eval
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from bench.convert.real_weights import to_folder, write_run
from mm1_jax import cli
from mm1_jax.eval.adapters.lm_eval import LmEval
from mm1_jax.eval.evaluate import Settings, evaluate
from mm1_jax.inference.model import Model

ASKED = 'doc_to_text: "Question: {{question}}\\nAnswer:"'
CHOICES = "doc_to_choice: choices\ndoc_to_target: answer_index"
# By the name of our task: the file, and the harness's prompt in a task's YAML.
TASKS = {
  "arc_easy": ("arc-easy.jsonl", f"{ASKED}\n{CHOICES}"),
  "arc_challenge": ("arc-challenge.jsonl", f"{ASKED}\n{CHOICES}"),
  "piqa": ("piqa.jsonl", f"{ASKED}\n{CHOICES}"),
  "social_iqa": ("social_i_qa.jsonl", f'doc_to_text: "Q: {{{{question}}}}\\nA:"\n{CHOICES}'),
  "boolq": ("boolq.jsonl", f"{ASKED}\n{CHOICES}"),
  "openbookqa": ("openbookqa.jsonl", f"doc_to_text: question\n{CHOICES}"),
  "winogrande": (
    "winogrande.jsonl",
    "doc_to_text: answer_index\n"
    "doc_to_choice: \"{{[question.split('_')[0] + choices[0], question.split('_')[0] + "
    'choices[1]]}}"\n'
    "doc_to_target: \"{{question.split('_', 1)[1].strip()}}\"",
  ),
}
METRICS = "metric_list: [{metric: acc}, {metric: acc_norm}]"
SHORT = (
  'doc_to_text: "Question: {{question}}\\nShort answer:"\n'
  'doc_to_target: "{{choices[answer_index]}}"\n'
  'generation_kwargs: {until: ["\\n", "."], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]'
)
SEQ_LEN = 512
TURNS = 2


class Spent(NamedTuple):
  """Time of one pass. On a machine that others use, seconds of its CPUs tell more."""

  wall: float
  cpu: float

  def __str__(self) -> str:
    return f"{self.wall:.1f} ({self.cpu:.1f})"


class Clock:
  """Adds up the time between its uses in `with`."""

  def __init__(self):
    self.spent = Spent(0.0, 0.0)

  def __enter__(self) -> None:
    self._start = time.perf_counter(), time.process_time()

  def __exit__(self, *error) -> None:
    now = time.perf_counter(), time.process_time()
    self.spent = Spent(*(s + b - a for s, a, b in zip(self.spent, self._start, now, strict=True)))


class Scored(NamedTuple):
  """What one side gives for a task's items, in order."""

  spent: Spent
  log_probs: list[list[float]]  # of each item's choices


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--weights", type=pathlib.Path, required=True)
  add("--work", type=pathlib.Path, required=True, help="folder for what is made")
  add("--data", type=pathlib.Path, required=True)
  add("--tasks", default=",".join(TASKS), help="of those, separated by commas (all)")
  add("--limit", type=int, default=100, help="items of each task, evenly spread (100)")
  add("--timed", type=int, default=100, help="items that are timed; 0 times none (100)")
  add("--hf-batch", type=int, default=8, help="of the hf model (8)")
  add("--threads", type=int, help="of PyTorch; on a machine that others use, 1 may be fastest")
  args = parser.parse_args()
  os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
  if args.threads is not None:
    torch.set_num_threads(args.threads)
  work = args.work / args.weights.stem
  folder = to_folder(args.weights, work / "hf")
  if not (work / "run").exists():
    write_run(folder, work / "run")
  model = Model.load(work / "run")
  ours = LmEval(model, bos=False)
  theirs = HFLM(
    pretrained=str(folder),
    **{"dtype": "float32", "device": "cpu", "batch_size": args.hf_batch, "max_length": SEQ_LEN},
  )
  print(f"{args.weights.name}, float32; PyTorch has {torch.get_num_threads()} threads")
  if args.tasks:
    compare(model, ours, theirs, args.tasks.split(","), args.data, work, args.limit)
  if args.timed:
    time_both(ours, theirs, args.data, work, args.timed)


def compare(
  model: Model,
  ours: LmEval,
  theirs: HFLM,
  names: list[str],
  data: pathlib.Path,
  work: pathlib.Path,
  limit: int,
) -> None:
  """Prints a row for each task: scores of the three, items that differ, times."""
  made = work / "items"
  print(
    "| task | items | acc: own, ours in lm-eval, hf | acc_norm | other answers (acc, norm) |",
    end="",
  )
  print(" largest difference of log p | seconds (of CPUs): own, ours in lm-eval, hf |")
  print("|---|---|---|---|---|---|---|")
  for name in names:
    file, prompt = TASKS[name]
    rows = write_items(data / file, made, limit)
    write_task(made, name, file, f"output_type: multiple_choice\n{prompt}\n{METRICS}")
    sides = [
      own(model, name, made),
      in_harness(ours, name, made),
      in_harness(theirs, name, made),
    ]
    lengths = [None, [[len(c) for c in row["choices"]] for row in rows]]
    right = [
      [correct(side.log_probs, rows, length) for side in sides] for length in lengths
    ]  # metric, side, item
    shares = [", ".join(f"{np.mean(side):.4f}" for side in of_metric) for of_metric in right]
    other = [
      max(int((side != of_metric[2]).sum()) for side in of_metric[:2]) for of_metric in right
    ]
    off = max(
      abs(x - y)
      for side in sides[:2]
      for a, b in zip(side.log_probs, sides[2].log_probs, strict=True)
      for x, y in zip(a, b, strict=True)
    )
    if name == "winogrande":  # contexts differ, continuations do not
      shares[1] = "-"
    seconds = ", ".join(str(side.spent) for side in sides)
    print(
      f"| {name} | {len(rows)} | {shares[0]} | {shares[1]} | {other[0]}, {other[1]} | {off:.1e} | "
      f"{seconds} |",
      flush=True,
    )


def correct(log_probs: list[list[float]], rows: list[dict], lengths: list | None) -> np.ndarray:
  """Returns whether each item's likeliest choice is right, per character if lengths are given."""
  found = []
  for i, (sums, row) in enumerate(zip(log_probs, rows, strict=True)):
    values = np.array(sums) / (lengths[i] if lengths else 1)
    found.append(values.argmax() == row["answer_index"])
  return np.array(found)


def write_items(path: pathlib.Path, made: pathlib.Path, limit: int) -> list[dict]:
  """Copies items, evenly spread, and returns them."""
  lines = path.read_text().splitlines()
  kept = [lines[i * len(lines) // limit] for i in range(limit)] if limit < len(lines) else lines
  made.mkdir(parents=True, exist_ok=True)
  (made / path.name).write_text("".join(f"{line}\n" for line in kept))
  return [json.loads(line) for line in kept]


def write_task(made: pathlib.Path, name: str, file: str, text: str) -> None:
  (made / f"{name}.yaml").write_text(
    f"task: local_{name}\ndataset_path: json\ntest_split: test\n"
    f"dataset_kwargs: {{data_files: {{test: {made / file}}}}}\n{text}\n"
  )


def own(model: Model, name: str, made: pathlib.Path) -> Scored:
  """Scores a task without the harness."""
  clock, settings = Clock(), Settings(tasks=(name,), form="text", bos=False)
  with clock:
    (result,) = evaluate(model, settings, made)
  assert not result.dropped, result.dropped[0].problem
  return Scored(clock.spent, [[x.log_prob for x in a.reply] for a in result.scored])  # pyright: ignore


def in_harness(lm, name: str, made: pathlib.Path) -> Scored:
  """Scores a task by the harness."""
  spent, samples = run(lm, name, made)
  return Scored(spent, [[float(r[0][0]) for r in s["resps"]] for s in samples])


def run(lm, name: str, made: pathlib.Path) -> tuple[Spent, list[dict]]:
  """Returns the time that a model takes for a task, and what was logged, in order.

  Reading the files and building the requests are not timed.
  """
  manager = TaskManager(include_path=str(made), include_defaults=False)
  clock = Clock()

  def timed(method: Callable) -> Callable:
    def call(requests):
      with clock:
        return method(requests)

    return call

  methods = {key: getattr(lm, key) for key in ("loglikelihood", "generate_until")}
  for key, method in methods.items():
    setattr(lm, key, timed(method))
  try:
    found = lm_eval.simple_evaluate(
      lm, tasks=[f"local_{name}"], task_manager=manager, bootstrap_iters=0
    )
  finally:
    for key in methods:
      delattr(lm, key)
  samples = found["samples"][f"local_{name}"]
  return clock.spent, sorted(samples, key=lambda sample: sample["doc_id"])


def time_both(
  ours: LmEval, theirs: HFLM, data: pathlib.Path, work: pathlib.Path, limit: int
) -> None:
  """Prints the times of choices and of short answers, by turns."""
  made = work / "timed"
  write_items(data / "piqa.jsonl", made, limit)
  choices = f"output_type: multiple_choice\n{TASKS['piqa'][1]}\n{METRICS}"
  write_task(made, "choices", "piqa.jsonl", choices)
  write_items(data / "openbookqa.jsonl", made, limit)
  write_task(made, "answers", "openbookqa.jsonl", f"output_type: generate_until\n{SHORT}")
  print(
    f"| {limit} items, warm | ours | hf | faster | answers that differ |\n|---|---|---|---|---|"
  )
  for name in ("choices", "answers"):
    run(ours, name, made)  # compiles
    times: dict[str, list[Spent]] = {"ours": [], "hf": []}
    found = {}
    for _ in range(TURNS):
      for side, lm in (("ours", ours), ("hf", theirs)):
        spent, samples = run(lm, name, made)
        times[side].append(spent)
        found[side] = [sample["filtered_resps"] for sample in samples]
    differ = "-"
    if name == "answers":
      pairs = zip(found["ours"], found["hf"], strict=True)
      differ = str(sum(a[0].strip() != b[0].strip() for a, b in pairs))
    best = {
      side: [min(column) for column in zip(*spent, strict=True)] for side, spent in times.items()
    }
    wall, cpu = (b / a for a, b in zip(best["ours"], best["hf"], strict=True))
    shown = [", ".join(map(str, spent)) for spent in times.values()]
    print(
      f"| {name} | {shown[0]} | {shown[1]} | {wall:.1f}x ({cpu:.1f}x) | {differ} |",
      flush=True,
    )


if __name__ == "__main__":
  cli.run(main)
