# SPDX-License-Identifier: Apache-2.0
"""The command: its files, its mistakes, and that it continues where it was killed."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from mm1_jax.config import EvalTaskConfig
from mm1_jax.eval.__main__ import main
from mm1_jax.eval.evaluate import Settings, evaluate
from mm1_jax.eval.in_training import TaskEvaluator
from mm1_jax.eval.task import EvalError
from mm1_jax.inference.model import Model

pytestmark = pytest.mark.compiles

ROOT = pathlib.Path(__file__).parents[2]


def write_many(folder: pathlib.Path, pictures: list[bytes], num: int) -> pathlib.Path:
  for i, picture in enumerate(pictures):
    (folder / f"{i}.png").write_bytes(picture)
  rows = [
    {"id": str(i), "image": f"{i % 2}.png", "question": f"What is {i}?", "answer": "a"}
    for i in range(num)
  ]
  path = folder / "mine.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def start(
  run: pathlib.Path, path: pathlib.Path, out: pathlib.Path, **environment: str
) -> subprocess.Popen:
  """Starts an evaluation as a process."""
  flags = [f"--checkpoint={run}", f"--tasks={path}", f"--out={out}", "--batch-size=32"]
  return subprocess.Popen(
    [sys.executable, "-m", "mm1_jax.eval", *flags],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": "", **environment},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.fixture
def questions(tmp_path, pictures) -> pathlib.Path:
  """Questions of one's own, one of them about a picture that is not there."""
  folder = tmp_path / "data"
  folder.mkdir()
  for i, picture in enumerate(pictures):
    (folder / f"{i}.png").write_bytes(picture)
  rows = [
    {"id": str(i), "image": f"{i % 2}.png", "question": f"What is {i}?", "answer": "bread"}
    for i in range(12)
  ]
  rows[5]["image"] = "gone.png"
  for i in range(4):
    rows[i] |= {"source": "quarry", "answer": "stone" if i else "bread"}
  path = folder / "mine.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def test_all_files_of_an_evaluation(dense_workdir, questions, tmp_path, capsys):
  out = tmp_path / "out"
  flags = [f"--checkpoint={dense_workdir}", f"--tasks={questions}", f"--out={out}"]
  main([*flags, "--shots=0,2", "--controls=own,other,frequent", "--trials=2"])
  values = json.loads((out / "results.json").read_text())
  found = {(r["shots"], r["control"]): r for r in values["results"]}
  assert [*found] == [
    *((0, control) for control in ("own", "other", "frequent")),
    *((2, control) for control in ("own", "other")),
  ]
  own = found[0, "own"]
  assert own["items"] == 12
  assert [d["id"] for d in own["dropped"]] == ["5"]
  assert "gone.png" in own["dropped"][0]["problem"]
  assert own["values"]["accuracy"]["n"] == 11
  # Of the items' own source: 8 of 12 say bread, and the 4 of the other source stone.
  assert found[0, "frequent"]["values"]["accuracy"]["mean"] == pytest.approx(11 / 12)
  assert len(found[2, "own"]["trials"]) == 2
  # Those that were shown the missing picture are dropped, too.
  assert all("gone.png" in d["problem"] for d in found[2, "own"]["dropped"])
  assert values["run"]["step"] == 1
  rows = [json.loads(line) for line in (out / own["files"][0]).read_text().splitlines()]
  assert [row["id"] for row in rows] == [str(i) for i in range(12)]
  assert {"reply", "score", "right"} <= rows[0].keys()
  assert "gone.png" in rows[5]["problem"]
  for name in ("results.md", "results.html"):
    assert "mine.jsonl" in (out / name).read_text()
  said = capsys.readouterr()
  assert "11 (1)" in said.out
  assert re.search(r"12 of 12 items, [\d.]+ a second", said.err)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([], "--tasks=NAME,NAME is needed"),
    (["--tasks=vqa_v2"], "no task 'vqa_v2'; near it: vqav2"),
    (["--tasks=coco", "--shots=x"], "--shots"),
    (["--tasks=coco", "--form=chat"], "no form 'chat'; it has mm1, openflamingo, sft"),
    (["--tasks=coco", "--split=dev"], "no split 'dev'; it has"),
    (["--tasks=coco", "--controls=none"], "no control 'none'"),
    (["--tasks=pope", "--form=sft", "--shots=4"], "no demonstrations"),
    (["--tasks=coco"], r"no dataset_coco.json.*Download it from"),
    (["--tasks=gone.jsonl"], "'gone.jsonl' is not there"),
    (["--tasks=coco", "--sample"], "leave out --tasks"),
    (["--tasks=piqa", "--control=own"], "did you mean --controls"),
  ],
)
def test_a_mistake_is_told(dense_workdir, flags, message):
  from mm1_jax.config import UserError

  with pytest.raises(UserError, match=f"(?s){message}"):
    main([f"--checkpoint={dense_workdir}", *flags])


def test_two_tasks_of_one_name_are_refused(dense_workdir, tmp_path):
  paths = [tmp_path / name / "mine.jsonl" for name in "ab"]
  for path in paths:
    path.parent.mkdir()
    path.write_text('{"id": "1", "question": "a?", "answer": "b"}\n')
  with pytest.raises(EvalError, match=r"two tasks are called 'mine.jsonl'"):
    main([f"--checkpoint={dense_workdir}", f"--tasks={paths[0]},{paths[1]}"])


def test_in_a_run_what_cannot_be_asked_is_told_at_its_start_or_counted(dense_model, questions):
  cfg = EvalTaskConfig("mine", task=str(questions), data=str(questions.parent), limit=12)
  evaluator = TaskEvaluator(dense_model.run, cfg)
  found = evaluator(dense_model.params, dense_model.mesh)
  assert found["eval_tasks/mine/dropped"] == 1  # gone.png
  assert found["eval_tasks/mine/accuracy"] == 0
  with pytest.raises(EvalError, match=r"10 demonstrations are asked for, and item .* may see 6"):
    TaskEvaluator(dense_model.run, dataclasses.replace(cfg, shots=10))
  for picture in questions.parent.glob("*.png"):
    picture.unlink()
  with pytest.raises(EvalError, match=r"eval_tasks.mine: no item can be asked; the first: .*png"):
    TaskEvaluator(dense_model.run, cfg)


def test_pictures_are_what_their_control_is_about(dense_workdir, tmp_path):
  path = tmp_path / "text.jsonl"
  path.write_text('{"id": "1", "question": "a?", "answer": "b"}\n' * 1)
  flags = [f"--checkpoint={dense_workdir}", f"--tasks={path}", f"--out={tmp_path / 'out'}"]
  with pytest.raises(EvalError, match="has no pictures, so it has no control 'blind'"):
    main([*flags, "--controls=blind"])


def test_a_model_of_text_is_not_asked_about_pictures(dense_model, questions):
  data = dataclasses.replace(dense_model.run.data, images_per_row=0)
  run = dataclasses.replace(dense_model.run, data=data)
  model = Model(dense_model.params, run, dense_model.mesh)
  with pytest.raises(
    EvalError, match=r"mine.jsonl shows pictures, and the model was trained on none"
  ):
    list(evaluate(model, Settings((str(questions),)), questions.parent))
  assert list(evaluate(model, Settings((str(questions),), controls=("blind",)), questions.parent))


@pytest.mark.long
def test_two_processes_leave_the_same_results_as_one(dense_workdir, tmp_path, pictures):
  path, results = write_many(tmp_path, pictures, 600), []
  for num in (1, 2):
    with socket.socket() as s:
      s.bind(("localhost", 0))
      port = s.getsockname()[1]
    processes = [
      start(dense_workdir, path, tmp_path / str(num), **(
        {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(num),
         "JAX_PROCESS_ID": str(i)} if num > 1 else {}
      )) for i in range(num)
    ]  # fmt: skip
    for process in processes:
      _, err = process.communicate()
      assert process.returncode == 0, err
    results.append((tmp_path / str(num) / "results.json").read_bytes())
  assert results[0] == results[1]
  assert len(list((tmp_path / "2" / "replies").iterdir())) == 3


@pytest.mark.slow
def test_killed_and_started_again_it_leaves_the_same_results(dense_workdir, tmp_path, pictures):
  path = write_many(tmp_path, pictures, 700)  # three chunks
  killed, whole = tmp_path / "killed", tmp_path / "whole"
  process = start(dense_workdir, path, killed)
  while not list((killed / "replies").glob("*.json")) and process.poll() is None:
    time.sleep(0.02)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  kept = {p.name: p.stat().st_mtime_ns for p in (killed / "replies").glob("*.json")}
  assert 1 <= len(kept) < 3
  for out in (killed, whole):
    process = start(dense_workdir, path, out)
    _, err = process.communicate()
    assert process.returncode == 0, err
  for name in ("results.json", "results.md"):
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
  (items,) = (killed / "items").iterdir()
  assert items.read_bytes() == (whole / "items" / items.name).read_bytes()
  after = {p.name: p.stat().st_mtime_ns for p in (killed / "replies").glob("*.json")}
  assert kept.items() <= after.items()  # what was there is not asked again
