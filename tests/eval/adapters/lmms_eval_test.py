# SPDX-License-Identifier: Apache-2.0
"""lmms-eval scores our models: the plug-in, its own tasks and command line, on files made here.

lmms-eval brings PyTorch, so this runs in an environment of its own, see CONTRIBUTING.
"""

import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: the extra lmms-eval")
os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

from lmms_eval import evaluator
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager

from mm1_jax.eval import likelihood
from mm1_jax.eval.adapters.lmms_eval import LmmsEval, LmmsEvalSimple
from mm1_jax.eval.task import EvalError
from mm1_jax.inference.prompts import PromptError

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "bread"]
UTILS = """
import PIL.Image

def pictures(doc):
  return [PIL.Image.open(doc["picture"]).convert("RGB")]

def choices(doc):
  return doc["choices"]

def messages(doc, lmms_eval_specific_kwargs=None):
  parts = [{"type": "text", "text": "see "}, {"type": "image", "url": doc["picture"]}]
  return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}]
"""
CHOICES = """
output_type: multiple_choice
doc_to_visual: !function tiny_utils.pictures
doc_to_text: "{{question}}"
doc_to_choice: !function tiny_utils.choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ANSWERS = """
output_type: generate_until
doc_to_visual: !function tiny_utils.pictures
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {until: ["."], max_new_tokens: 6, temperature: 0, top_p: 1.0, num_beams: 1}
metric_list: [{metric: exact_match}]
"""
MESSAGES = ANSWERS + "doc_to_messages: !function tiny_utils.messages\n"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
  rng, folder, found = np.random.default_rng(3), tmp_path_factory.mktemp("pictures"), []
  for i in range(6):
    picture = folder / f"{i}.png"
    PIL.Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(picture)
    choices = [" ".join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(3)]
    question = " ".join(rng.choice(WORDS, rng.integers(2, 9)))
    found.append(
      {"picture": str(picture), "question": question, "choices": choices, "answer": i % 3}
    )
  return found


@pytest.fixture
def folder(rows, tmp_path) -> pathlib.Path:
  """Tasks in files, as a user writes them."""
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (tmp_path / "tiny_utils.py").write_text(UTILS)
  where = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
  for name, text in {"choices": CHOICES, "answers": ANSWERS, "messages": MESSAGES}.items():
    (tmp_path / f"mm1_{name}.yaml").write_text(f"task: mm1_{name}\n{where}test_split: test\n{text}")
  return tmp_path


def run(lm: LmmsEval, folder: pathlib.Path, task: str) -> tuple[dict, list[dict]]:
  """Returns a task's scores, and what the harness logged of its documents, in order."""
  manager = TaskManager(include_path=str(folder), include_defaults=False)
  found = evaluator.simple_evaluate(
    lm, tasks=[f"mm1_{task}"], task_manager=manager, bootstrap_iters=0, batch_size=4
  )
  samples = sorted(found["samples"][f"mm1_{task}"], key=lambda sample: sample["doc_id"])
  return found["results"][f"mm1_{task}"], samples


def picture(row: dict) -> PIL.Image.Image:
  return PIL.Image.open(row["picture"])


def test_the_likeliest_choice_is_taken(model, folder, rows):
  results, _ = run(LmmsEvalSimple(model), folder, "choices")
  best, worst, best_norm = [], [], []
  for row in rows:
    texts = [f" {choice}" for choice in row["choices"]]
    asked = likelihood.continuations(model, [picture(row), row["question"]], texts)
    sums = np.array([one.log_prob for one in likelihood.log_likelihoods(model, asked)])
    best.append(sums.argmax() == row["answer"])
    worst.append(sums.argmin() == row["answer"])
    best_norm.append((sums / [len(c) for c in row["choices"]]).argmax() == row["answer"])
  assert np.mean(best) != np.mean(worst)  # so log-probabilities instead of losses would show
  assert results["acc,none"] == np.mean(best)
  assert results["acc_norm,none"] == np.mean(best_norm)


@pytest.mark.parametrize("kind", [LmmsEval, LmmsEvalSimple])
def test_answers_are_the_models_own(kind, model, folder, rows):
  _, samples = run(kind(model, batch_size=4), folder, "answers")
  prompts = [[picture(row), row["question"]] for row in rows]
  expected = model.generate(prompts, max_new_tokens=6, stop=["."])
  assert [sample["resps"][0][0] for sample in samples] == expected


def test_messages_alternate_texts_and_pictures(model, folder, rows):
  _, samples = run(LmmsEval(model), folder, "messages")
  prompts = [["see ", picture(row), row["question"]] for row in rows]
  expected = model.generate(prompts, max_new_tokens=6, stop=["."])
  assert [sample["resps"][0][0] for sample in samples] == expected


def ask(lm: LmmsEval, kwargs: dict, *messages: dict) -> list[str]:
  """Returns the answer to messages, asked for as the harness does."""
  lm.task_dict = {"task": {"test": [list(messages)]}}
  metadata = {"task": "task", "doc_id": 0, "repeats": 1}
  args = ("", lambda doc: doc, kwargs, 0, "task", "test")
  return lm.generate_until([Instance("generate_until", args, 0, metadata)])


def say(role: str, *parts: str | PIL.Image.Image) -> dict:
  content = [
    {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": part}
    for part in parts
  ]
  return {"role": role, "content": content}


def test_several_turns_are_a_conversation(model):
  turns = [say("user", "the fox"), say("assistant", "jumps"), say("user", "over")]
  expected = model.generate(
    [[{"role": t["role"], "content": t["content"][0]["text"]} for t in turns]], max_new_tokens=5
  )
  assert ask(LmmsEval(model), {"max_new_tokens": 5}, *turns) == expected


def test_an_answer_ends_where_the_model_does(model):
  text = " ".join(WORDS * 9)
  room = model.room(model.encode([text]))
  assert 0 < room < 128
  expected = model.generate([[text]], max_new_tokens=room - room % 64 or room)
  assert ask(LmmsEval(model), {"max_new_tokens": 16384}, say("user", text)) == expected


def test_what_is_not_offered_is_refused(model, pictures):
  lm = LmmsEval(model)
  with pytest.raises(EvalError, match=r"repetition_penalty=1\.2, which is not offered"):
    ask(lm, {"repetition_penalty": 1.2}, say("user", "a"))
  with pytest.raises(EvalError, match="task, test document 0 has video"):
    ask(lm, {}, {"role": "user", "content": [{"type": "video", "url": "a.mp4"}]})
  with pytest.raises(EvalError, match=r"the address 'http://a/b\.png'; only files are read"):
    ask(lm, {}, {"role": "user", "content": [{"type": "image", "url": "http://a/b.png"}]})
  with pytest.raises(PromptError, match="task, test document 0: the prompt takes"):
    ask(lm, {}, say("user", PIL.Image.open(io.BytesIO(pictures[0])), " ".join(WORDS * 40)))
  with pytest.raises(EvalError, match="likelihoods need --force_simple"):
    lm.loglikelihood([])
  with pytest.raises(EvalError, match="several rounds"):
    lm.generate_until_multi_round([])


def test_it_is_found_by_its_name():
  assert get_model("mm1_jax") is LmmsEval
  assert get_model("mm1_jax", force_simple=True) is LmmsEvalSimple


@pytest.mark.slow
def test_the_command_line_evaluates_a_checkpoint(workdir, folder):
  out = folder / "out"
  flags = [f"--model_args=checkpoint={workdir}", "--batch_size=4", f"--include_path={folder}"]
  flags += ["--tasks=mm1_choices,mm1_answers", "--force_simple", f"--output_path={out}"]
  done = subprocess.run(
    [sys.executable, "-m", "lmms_eval", "--model=mm1_jax", *flags, "--verbosity=DEBUG"],
    **{"capture_output": True, "text": True, "check": False, "cwd": folder},
  )
  assert done.returncode == 0, done.stdout + done.stderr
  (file,) = out.rglob("*results.json")
  results = json.loads(file.read_text())["results"]
  assert 0 <= results["mm1_choices"]["acc,none"] <= 1
  assert "mm1_answers" in results
