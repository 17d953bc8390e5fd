# SPDX-License-Identifier: Apache-2.0
"""For every task: official files are read, damage is told, perfect answers score best."""

import json
import re

import numpy as np
import pytest
from etils import epath

from mm1_jax.config import UserError
from mm1_jax.eval import tasks
from mm1_jax.eval.task import EvalError, Item, Likelihood, Reply, Task
from mm1_jax.eval.tasks import choices
from tests.helpers import fuzz

NAMES = sorted(tasks.TASKS)
SCORED = [name for name in NAMES if tasks.TASKS[name].score]
BY_LETTER = ("scienceqa_img", "ai2d", "seed", "mmbench")


def reply(task: Task, item: Item, good: bool) -> Reply:
  """Returns the best reply to an item, or a bad one."""
  form = next(iter(task.forms.values()))
  if form.options:
    n = len(form.options(item))
    best = item.right if item.choices else 0
    one = lambda i: Likelihood(-1.0 if (i == best) == good else -50.0, good and i == best, 3)
    return tuple(one(i) for i in range(n))
  if not good:
    return "zzz"
  if item.choices and (task.name in BY_LETTER or task.name == "mmmu"):
    return choices.letter(item)
  return item.answers[0]


@pytest.mark.parametrize("name", NAMES)
def test_official_files_are_read_with_their_pictures(name, items):
  found = items(name)
  assert len(found) >= 2
  assert len({item.id for item in found}) == len(found)
  for item in found:
    assert item.answers or name == "llava_bench"
    assert all(isinstance(p, bytes) or p.is_file() for p in item.pictures)
    if item.choices:
      assert item.answers == (item.choices[item.right],)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named_with_its_page(name, tmp_path):
  task = tasks.TASKS[name]
  with pytest.raises(EvalError) as error:
    tasks.read_items(task, tmp_path)
  named = task.files[0].replace("SUBJECT", "*")
  assert named in str(error.value)
  assert task.source in str(error.value)
  assert f"'{tmp_path}' has no " in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_cut_off_is_told(name, official):
  folder = official(name)
  task = tasks.TASKS[name]
  # Each part of a benchmark by turns; lists of ids have no form that could be damaged, and the
  # diagrams of training are not read.
  kinds = {".json", ".jsonl", ".tsv", ".parquet", ".p", ".xml"}
  paths = [path for path in sorted(folder.rglob("*")) if path.suffix in kinds]
  paths = [path for path in paths if path.name != "3.png.json"]
  if name == "mme":
    paths = [folder / "MME_Benchmark_release_version/count/0001.txt"]
  assert paths
  for path in paths:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - max(5, len(whole) // 10)])
    with pytest.raises(EvalError, match=re.escape(path.name)):
      tasks.read_items(task, folder)
    path.write_bytes(whole)


@pytest.mark.parametrize("name", NAMES)
def test_a_split_that_is_not_there(name, tmp_path):
  with pytest.raises(EvalError, match=f"{name} has no split 'tset'; it has: "):
    tasks.read_items(tasks.TASKS[name], tmp_path, "tset")


@pytest.mark.parametrize("name", SCORED)
def test_perfect_answers_score_best_and_wrong_ones_worst(name, items):
  task, found = tasks.TASKS[name], items(name)
  assert task.score
  perfect = task.score(found, [reply(task, item, good=True) for item in found])
  wrong = task.score(found, [reply(task, item, good=False) for item in found])
  headline = next(iter(perfect.values))
  assert len(perfect.per_item) == len(wrong.per_item) == len(found)
  if name in ("coco", "nocaps", "textcaps"):
    assert perfect.values[headline].mean > 50
    assert np.all(perfect.per_item > wrong.per_item)
  else:
    assert perfect.values[headline].mean == pytest.approx(2000 if name == "mme" else 1)
    assert perfect.right is not None
    assert np.all(perfect.right)
  assert wrong.values[headline].mean == 0 if name != "mmmu" else wrong.values[headline].mean < 1
  for estimate in perfect.values.values():
    assert np.isfinite(estimate.mean)
    assert estimate.n > 0


@pytest.mark.parametrize("name", SCORED)
def test_empty_answers_are_counted_and_hostile_ones_scored(name, items):
  task, found = tasks.TASKS[name], items(name)
  assert task.score
  if next(iter(task.forms.values())).options:
    return
  for text in ("", " \n", "\0\x1b[31m", "?!.,;", "٣", "\ud800", "a " * 20_000, "(" * 20_000):
    scores = task.score(found, [text] * len(found))
    headline = next(iter(scores.values.values()))
    assert headline.mean < (2 if name == "mmmu" else 0.5)
    assert scores.counts["empty"] == (0 if text.strip() else len(found))


@pytest.mark.parametrize("name", SCORED)
def test_what_has_no_published_answer_is_not_scored(name, items):
  task, found = tasks.TASKS[name], items(name)
  hidden = Item("hidden", "?", details=found[0].details)
  with pytest.raises(EvalError, match=r"1 of .* no published answer, first 'hidden'"):
    task.score([*found, hidden], ["x"] * (len(found) + 1))
  with pytest.raises(EvalError, match="no item"):
    task.score([], [])


@pytest.mark.parametrize("name", NAMES)
def test_forms_and_submissions_work_on_all_items(name, items, tmp_path):
  task, found = tasks.TASKS[name], items(name)
  for form in task.forms.values():
    for item in found:
      content = form.prompt(item)
      shown = [part for part in content if not isinstance(part, str)]
      assert shown == list(item.pictures)
      assert "<image" not in "".join(part for part in content if isinstance(part, str))
      if form.demonstration:
        assert form.demonstration(item).endswith("\n")
      assert isinstance(form.clean(" a cat ", item), str)
    assert bool(form.chat) == (not form.demonstration and not form.options and name != "triviaqa")
  assert ({"mm1", "openflamingo"} <= set(task.forms)) == (task.demonstrations is not None)
  if task.submission:
    (path,) = task.submission(found, ["é \ud800"] * len(found), epath.Path(tmp_path))
    assert path.exists()
    assert "é ?" in path.read_text()
    with pytest.raises(EvalError, match="generated answers"):
      task.submission(found, [()] * len(found), epath.Path(tmp_path))


def test_each_task_says_what_it_is():
  for name, task in tasks.TASKS.items():
    assert name == task.name == name.lower()
    assert task.split in task.splits
    assert task.demonstrations in (None, *task.splits)
    assert "https://" in task.source
    assert task.metric
    assert task.files


def test_a_name_that_is_nearly_right():
  assert tasks.get_task("vqav2").title == "VQAv2"
  with pytest.raises(EvalError, match=r"no task 'vqa2'; near it: .*vqav2"):
    tasks.get_task("vqa2")
  with pytest.raises(EvalError, match=r"no task 'wxyz'; near it: ai2d, arc_challenge, .*webqs"):
    tasks.get_task("wxyz")


def test_a_folder_of_several_benchmarks_has_one_for_each(tmp_path, official):
  official("piqa")
  official("social_iqa")
  assert len(tasks.read_items(tasks.get_task("piqa"), tmp_path)) == 2
  assert tasks.read_items(tasks.get_task("social_iqa"), str(tmp_path))[0].id == "0"


def test_the_sets_of_a_hub_in_parquet_read_as_the_official_ones(official, tmp_path):
  """ARC as lm-eval downloads it: flat, with columns of lists."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  folder = official("arc_easy")
  lines = (folder / "ARC-Easy/ARC-Easy-Test.jsonl").read_text().splitlines()
  rows = []
  for row in map(json.loads, lines):
    question = row["question"]
    names = ("text", "label")
    choices = {name: [choice[name] for choice in question["choices"]] for name in names}
    rows.append({**row, "question": question["stem"], "choices": choices})
  hub = tmp_path / "hub" / "ARC-Easy"
  hub.mkdir(parents=True)
  pq.write_table(pa.Table.from_pylist(rows), hub / "test-00000-of-00001.parquet")
  task = tasks.get_task("arc_easy")
  assert tasks.read_items(task, hub.parent) == tasks.read_items(task, folder)


@pytest.mark.parametrize("name", NAMES)
def test_changed_files_by_seed(official, name):
  folder, task = official(name), tasks.get_task(name)
  paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
  for path in [path for path in paths if path.suffix not in (".png", ".jpg")]:
    good = path.read_bytes()

    def read(data: bytes, path=path) -> None:
      path.write_bytes(data)
      tasks.read_items(task, folder)

    assert fuzz.strays(fuzz.mutations(good, 40, seed=1), read, UserError) == []
    path.write_bytes(good)
