# SPDX-License-Identifier: Apache-2.0
"""Statements about two pictures: NLVR2."""

from collections.abc import Iterator
from typing import Any

from etils import epath

from mm1_jax.eval.task import Item, Task
from mm1_jax.eval.tasks import files, prompts
from mm1_jax.eval.tasks.scoring import is_accepted, mean_score

NLVR2 = {"train": "train.json", "val": "dev.json", "test": "test1.json", "test2": "test2.json"}
SOURCE = "https://github.com/lil-lab/nlvr (nlvr2/data; pictures on request)"


def read_nlvr2(folder: epath.Path, split: str) -> list[Item]:
  """JSON lines; `test` is test-P, which papers report."""
  path = files.find(folder, [name := files.choose(NLVR2, split), f"data/{name}"], SOURCE)
  part = name.removesuffix(".json")
  pictures = files.below(folder, part, f"images/{part}", "images")

  def make(s: Any) -> Iterator[Item]:
    pair = s["identifier"].rsplit("-", 1)[0]
    # Pictures of training are in folders by number.
    place = f"{s['directory']}/{pair}" if "directory" in s else pair
    both = tuple(files.picture(pictures, f"{place}-img{i}.png") for i in (0, 1))
    yield Item(s["identifier"], s["sentence"], both, (s["label"],))

  return files.items(path, files.read_rows(path), make)


TASKS = (
  Task(
    name="nlvr2",
    title="NLVR2",
    read=read_nlvr2,
    splits=tuple(NLVR2),
    split="test",
    forms={
      "sft": prompts.chat(
        lambda i: f"{i.question}\nIs this true of the two images? {prompts.SHORT}"
      )
    },
    score=mean_score({"accuracy": is_accepted}),
    metric="exact match of True or False, case and punctuation ignored",
    source=SOURCE,
    files=(NLVR2["test"],),
  ),
)
