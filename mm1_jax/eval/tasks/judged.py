# SPDX-License-Identifier: Apache-2.0
"""Long answers that GPT-4 judges: LLaVA-Bench (in the wild), MM-Vet. Only answer files are written.

A score by another judge would not be the benchmark's.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from mm1_jax.eval.task import EvalError, Item, Reply, Task
from mm1_jax.eval.tasks import answer_files, files, prompts, vlmevalkit

LLAVA_SOURCE = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
MM_VET_SOURCE = "https://github.com/yuweihao/MM-Vet (mm-vet.zip)"
JUDGED = "judged by GPT-4: write the answer file"


def read_llava_bench(folder: epath.Path, split: str) -> list[Item]:
  path = files.find(folder, ["questions.jsonl"], LLAVA_SOURCE)
  pictures = files.below(folder, "images")

  def make(q: Any) -> Iterator[Item]:
    picture = files.picture(pictures, q["image"])
    details = {"category": q["category"]}
    yield Item(str(q["question_id"]), q["text"], (picture,), details=details)

  return files.items(path, files.read_rows(path), make)


def read_mm_vet(folder: epath.Path, split: str) -> list[Item]:
  path = files.find(folder, ["mm-vet.json", "MMVet.tsv"], MM_VET_SOURCE)
  if path.suffix == ".tsv":
    return vlmevalkit.read(path)
  pictures = files.below(folder, "images")
  value = files.read_json(path)
  if not isinstance(value, dict):
    raise EvalError(f"'{path}' is not of the form of its benchmark: no object of questions.")

  def make(pair: tuple[str, Any]) -> Iterator[Item]:
    id, q = pair
    picture = files.picture(pictures, q["imagename"])
    details = {"capability": q["capability"]}
    yield Item(id, q["question"], (picture,), (q["answer"],), details=details)

  return files.items(path, value.items(), make)


def write_llava_bench(
  items: Sequence[Item], replies: Sequence[Reply], folder: epath.Path
) -> list[epath.Path]:
  """JSON lines, as LLaVA's `model_vqa.py` writes them and its `eval_gpt_review_bench.py` reads."""
  lines = [
    {
      "question_id": answer_files.number(item.id),
      "prompt": item.question,
      "text": answer,
      "answer_id": item.id,
      "model_id": "mm1_jax",
      "metadata": {},
    }
    for item, answer in answer_files.answered(items, replies)
  ]
  path = folder / "llava_bench_answers.jsonl"
  path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
  return [path]


def write_mm_vet(
  items: Sequence[Item], replies: Sequence[Reply], folder: epath.Path
) -> list[epath.Path]:
  """The object that MM-Vet's notebook reads, or VLMEvalKit's file if items are of its TSV."""
  if items and "row" in items[0].details:
    return answer_files.vlmevalkit("MMVet")(items, replies, folder)
  answers = {item.id: answer for item, answer in answer_files.answered(items, replies)}
  return [answer_files.write_json(folder / "mm_vet_answers.json", answers)]


TASKS = (
  Task(
    name="llava_bench",
    title="LLaVA-Bench (in the wild)",
    read=read_llava_bench,
    splits=("test",),
    split="test",
    forms={"sft": prompts.chat(lambda item: item.question, 1024)},
    score=None,
    metric=JUDGED,
    submission=write_llava_bench,
    source=LLAVA_SOURCE,
    files=("questions.jsonl",),
  ),
  Task(
    name="mm_vet",
    title="MM-Vet",
    read=read_mm_vet,
    splits=("test",),
    split="test",
    forms={"sft": prompts.chat(lambda item: item.question, 1024)},
    score=None,
    metric=JUDGED,
    submission=write_mm_vet,
    source=MM_VET_SOURCE,
    files=("mm-vet.json",),
  ),
)
