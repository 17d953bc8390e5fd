# SPDX-License-Identifier: Apache-2.0
"""All benchmarks by name, one file for each kind; a file of one's own is a task, too."""

import difflib

from etils import epath

from mm1_jax.eval.task import EvalError, Task
from mm1_jax.eval.tasks import (
  captions,
  choices,
  documents,
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
