# SPDX-License-Identifier: Apache-2.0
"""Answer files that servers and judges read: JSON lists, and VLMEvalKit's TSV."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from mm1_jax.eval.task import EvalError, Item, Reply, Submission


def json_list(name: str, entry: Callable[[Item, str], Any]) -> Submission:
  """Returns what writes a JSON list of an entry for each item."""

  def write(
    items: Sequence[Item], replies: Sequence[Reply], folder: epath.Path
  ) -> list[epath.Path]:
    return [write_json(folder / name, [entry(i, a) for i, a in answered(items, replies)])]

  return write


def vlmevalkit(dataset: str) -> Submission:
  """Returns what writes the file that VLMEvalKit scores: `python run.py --mode eval`, with
  PRED_FORMAT=tsv in its environment.

  The file has the columns of the benchmark's TSV but the pictures, and `prediction`; VLMEvalKit
  looks for it as MODEL_DATASET.tsv in the model's folder.
  """

  def write(
    items: Sequence[Item], replies: Sequence[Reply], folder: epath.Path
  ) -> list[epath.Path]:
    rows = [{**_row(item), "prediction": answer} for item, answer in answered(items, replies)]
    text = io.StringIO()
    columns = dict.fromkeys(column for row in rows for column in row)
    table = csv.DictWriter(
      text, columns, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n"
    )
    table.writeheader()
    table.writerows(rows)
    path = folder / f"mm1_jax_{dataset}.tsv"
    path.write_text(text.getvalue())
    return [path]

  return write


def _row(item: Item) -> dict[str, Any]:
  """Returns an item's row of a TSV without pictures; of another file, what a TSV would have."""
  letters = {chr(65 + i): choice for i, choice in enumerate(item.choices)}
  answer = chr(65 + item.right) if item.right >= 0 else " ".join(item.answers[:1])
  row = item.details.get("row")
  return (
    dict(row) if row else {"index": item.id, "question": item.question, **letters, "answer": answer}
  )


def answered(items: Sequence[Item], replies: Sequence[Reply]) -> list[tuple[Item, str]]:
  """Returns items with their answers as text that can be written.

  Raises:
    EvalError: an item has likelihoods instead.
  """
  if any(not isinstance(reply, str) for reply in replies):
    raise EvalError("an answer file needs generated answers; likelihoods were compared instead.")
  # A lone surrogate cannot be written as UTF-8.
  clean = [str(reply).encode("utf-8", "replace").decode() for reply in replies]
  return list(zip(items, clean, strict=True))


def write_json(path: epath.Path, value: Any) -> epath.Path:
  path.write_text(json.dumps(value, ensure_ascii=False))
  return path


def number(id: str) -> int | str:
  """Returns an id as a number if it is one: servers compare `question_id` as they have it."""
  return int(id) if id.isascii() and id.isdigit() else id
