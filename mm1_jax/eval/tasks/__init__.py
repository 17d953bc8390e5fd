# SPDX-License-Identifier: Apache-2.0
"""All benchmarks by name, one file for each kind; a file of one's own is a task, too."""

import difflib

from etils import epath

from mm1_jax import untrusted
from mm1_jax.eval.task import EvalError, Item, Task
from mm1_jax.eval.tasks import (
  captions,
  choices,
  documents,
  files,
  grounding,
  judged,
  own,
  pairs,
  records,
  text,
  vqa,
  yes_no,
)

KINDS = (captions, vqa, choices, yes_no, documents, pairs, grounding, judged, text)
TASKS: dict[str, Task] = {task.name: task for kind in KINDS for task in kind.TASKS}


def get_task(name: str) -> Task:
  """Returns the task of a name, of a file, FILE.jsonl or FILE.tsv, or of shards, records:NAME.

  Raises:
    EvalError: there is none, with the names that are near.
  """
  if name in TASKS:
    return TASKS[name]
  if name.startswith(records.PREFIX):
    return records.get_task(name)
  if name.lower().endswith((".jsonl", ".tsv")):
    return own.file_task(epath.Path(name))
  near = difflib.get_close_matches(name.lower(), TASKS, n=3) or sorted(TASKS)
  raise EvalError(
    f"there is no task '{name}'; near it: {', '.join(near)}. A file, FILE.jsonl or FILE.tsv, is a "
    f"task, too, and so are shards, records:NAME."
  )


def read_items(task: Task, folder: epath.PathLike, split: str = "") -> list[Item]:
  """Returns the items of a task's split, from FOLDER/NAME if that is there, else from FOLDER.

  Args:
    task: what to read.
    folder: of the official files of several tasks, or of this one.
    split: the task's own if "".

  Raises:
    EvalError: there is no such split, or a file is missing or damaged.
  """
  split = split or task.split
  if split not in task.splits:
    raise EvalError(f"{task.name} has no split '{split}'; it has: {', '.join(task.splits)}.")
  folder = files.below(epath.Path(folder), task.name)
  with untrusted.of_form(f"a file of {task.name} in '{folder}' is not of its form", EvalError):
    return list(task.read(folder, split))
