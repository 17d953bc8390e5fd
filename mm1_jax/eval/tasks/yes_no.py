# SPDX-License-Identifier: Apache-2.0
"""Questions that yes or no answers: POPE, MME."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from mm1_jax.eval.metrics import yes_no
from mm1_jax.eval.metrics.statistics import Estimate, bootstrap, estimate
from mm1_jax.eval.task import EvalError, Item, Reply, Scores, Task
from mm1_jax.eval.tasks import answer_files, files, prompts, scoring, vlmevalkit

POPE_KINDS = ("random", "popular", "adversarial")
POPE_SOURCE = (
  "https://github.com/AoiDragon/POPE (output/coco; pictures: COCO val2014), or POPE.tsv of "
  "VLMEvalKit"
)
MME_SOURCE = (
  "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models (branch Evaluation), or "
  "MME.tsv of VLMEvalKit"
)
MME_ASKS = " Please answer yes or no."
RESAMPLES = 300  # of F1's standard error


# --- POPE ---


def read_pope(folder: epath.Path, split: str) -> list[Item]:
  """Three files, whose questions count together; ids begin with the kind."""
  names = [f"coco_pope_{kind}.json" for kind in POPE_KINDS]
  path = files.find(folder, [names[0], f"coco/{names[0]}", "POPE.tsv"], POPE_SOURCE)
  if path.suffix == ".tsv":
    return vlmevalkit.read(path)
  paths = {
    files.find(path.parent, [n], POPE_SOURCE): kind
    for n, kind in zip(names, POPE_KINDS, strict=True)
  }
  pictures = files.coco_pictures(folder, "val2014")

  def rows(path: epath.Path) -> Iterator[tuple[str, Any]]:
    return ((paths[path], row) for row in files.read_rows(path))

  def make(pair: tuple[str, Any]) -> Iterator[Item]:
    kind, q = pair
    picture = files.picture(pictures, q["image"])
    id, details = f"{kind}/{q['question_id']}", {"category": kind}
    yield Item(id, q["text"], (picture,), (q["label"],), details=details)

  return files.all_items(paths, rows, make)


def pope_score(items: Sequence[Item], replies: Sequence[Reply]) -> Scores:
  """Returns the mean F1 of the kinds, as papers do, and the scores over all questions.

  F1 is no mean of items: an item's value is whether it is right, and errors are bootstrapped.
  """
  answers = scoring.texts(items, replies)
  truths = [item.answers[0] for item in items]
  said = [yes_no.exactly(answer) for answer in answers]
  yes = np.array([word == "yes" for word in said])
  true = np.array([truth.strip().lower() == "yes" for truth in truths])
  kinds = np.array([item.details.get("category", "") for item in items])
  right = np.array(
    [word == truth.strip().lower() for word, truth in zip(said, truths, strict=True)]
  )

  def mean_f1(at: np.ndarray) -> float:
    return float(
      np.mean([_f1(yes[i], true[i]) for k in set(kinds) if len(i := at[kinds[at] == k])])
    )

  n, all_items = len(items), np.arange(len(items))
  try:
    overall = yes_no.pope(answers, truths)
  except ValueError as e:
    raise EvalError(f"{e}.") from e
  values = {"f1": Estimate(mean_f1(all_items), bootstrap(mean_f1, n, 0, RESAMPLES), n)}
  values["accuracy"] = estimate(right.astype(float))
  for name in ("precision", "recall", "yes_share"):
    values[name] = Estimate(overall[name], np.nan, n)
  values["f1_of_all"] = Estimate(overall["f1"], np.nan, n)
  for kind in sorted(set(kinds) - {""}):
    own = np.flatnonzero(kinds == kind)
    values[f"f1/{kind}"] = Estimate(_f1(yes[own], true[own]), np.nan, len(own))
  counts = scoring.seen(answers) | {"neither yes nor no": int(overall["neither"])}
  return Scores(values, right.astype(float), right, counts)


def _f1(yes: np.ndarray, true: np.ndarray) -> float:
  """Returns 2 hits / (said yes + truly yes), which is F1; 0 if there are none of both."""
  both = int(np.sum(yes)) + int(np.sum(true))
  return 2 * int(np.sum(yes & true)) / both if both else 0.0


# --- MME ---


def read_mme(folder: epath.Path, split: str) -> list[Item]:
  """Folders by category: pictures, and a text beside each with two lines, question TAB answer.

  Some categories have the pictures in `images/` and the texts in `questions_answers_YN/`.
  """
  if table := sorted(folder.glob("MME.tsv")):
    return _with_pictures(vlmevalkit.read(table[0]))
  root = files.below(folder, "MME_Benchmark_release_version", "MME_Benchmark")
  paths: dict[epath.Path, str] = {}
  for category in yes_no.PERCEPTION + yes_no.COGNITION:
    names = [f"{category}/questions_answers_YN/*.txt", f"{category}/*.txt"]
    paths |= dict.fromkeys(files.find_all(root, names, MME_SOURCE), category)

  def rows(path: epath.Path) -> Iterator[tuple[epath.Path, int, str]]:
    lines = [line for line in files.read_text(path).splitlines() if line.strip()]
    return ((path, number, line) for number, line in enumerate(lines))

  def make(row: tuple[epath.Path, int, str]) -> Iterator[Item]:
    path, number, line = row
    question, answer = line.strip().split("\t")
    place = root / paths[path]
    name = f"{paths[path]}/{path.stem}"
    details = {"category": paths[path], "group": name}
    picture = _picture_of(path.stem, files.below(place, "images"))
    yield Item(f"{name}/{number}", question, (picture,), (answer,), details=details)

  return files.all_items(paths, rows, make)


def _picture_of(stem: str, folder: epath.Path) -> epath.Path:
  jpg, png = (folder / f"{stem}.{suffix}" for suffix in ("jpg", "png"))
  return png if png.exists() else jpg


def _with_pictures(items: list[Item]) -> list[Item]:
  """Returns items with the picture's name, which pairs two questions."""
  for item in items:
    if "image_path" not in item.details or "category" not in item.details:
      raise EvalError(f"item '{item.id}' of MME.tsv has no image_path or no category.")
  return [
    dataclasses.replace(item, details={**item.details, "group": item.details["image_path"]})
    for item in items
  ]


def mme_text(item: Item) -> str:
  return f"{item.question.strip().replace(MME_ASKS, '')}\n{prompts.SHORT}"


def mme_score(items: Sequence[Item], replies: Sequence[Reply]) -> Scores:
  """Returns perception and cognition, sums of the categories' scores, and these.

  A category's score is the mean over its pictures of 100 x (share of right questions + whether both
  are); errors of sums are of independent categories.
  """
  answers = scoring.texts(items, replies)
  truths = [item.answers[0] for item in items]
  categories = [item.details["category"] for item in items]
  pictures = [item.details["group"] for item in items]
  try:
    totals = yes_no.mme(answers, truths, categories, pictures)
  except ValueError as e:
    raise EvalError(f"{e}. MME is scored over whole pictures: choose whole categories.") from e
  right = np.array(
    [
      yes_no.by_prefix(answer) == truth.lower().strip(" .")
      for answer, truth in zip(answers, truths, strict=True)
    ]
  )
  found = {c: _category(c, categories, pictures, right) for c in dict.fromkeys(categories)}
  values = {}
  for name, members in (("perception", yes_no.PERCEPTION), ("cognition", yes_no.COGNITION)):
    own = [found[c] for c in members if c in found]
    error = float(np.sqrt(sum(e.standard_error**2 for e in own)))
    values[name] = Estimate(totals[name], error if own else np.nan, sum(e.n for e in own))
  values |= found | {"accuracy": estimate(right.astype(float))}
  counts = scoring.seen(answers) | {"neither yes nor no": int(totals["neither"])}
  return Scores(values, right.astype(float), right, counts)


def _category(
  category: str, categories: Sequence[str], pictures: Sequence[str], right: np.ndarray
) -> Estimate:
  """Returns a category's score over its pictures."""
  of: dict[str, list[bool]] = {}
  for c, picture, ok in zip(categories, pictures, right, strict=True):
    if c == category:
      of.setdefault(picture, []).append(bool(ok))
  return estimate([100.0 * (sum(both) / len(both) + all(both)) for both in of.values()])


TASKS = (
  Task(
    name="pope",
    title="POPE",
    read=read_pope,
    splits=("test",),
    split="test",
    forms={"sft": prompts.chat(lambda i: f"{i.question.strip()}\n{prompts.SHORT}", 128)},
    score=pope_score,
    metric="F1, mean of random, popular and adversarial; yes is positive, other answers are wrong",
    submission=answer_files.vlmevalkit("POPE"),
    source=POPE_SOURCE,
    files=tuple(f"coco_pope_{kind}.json" for kind in POPE_KINDS),
  ),
  Task(
    name="mme",
    title="MME",
    read=read_mme,
    splits=("test",),
    split="test",
    forms={"sft": prompts.chat(mme_text)},
    score=mme_score,
    metric="points: accuracy + accuracy of pictures, summed over 10 (perception) and 4 categories",
    submission=answer_files.vlmevalkit("MME"),
    source=MME_SOURCE,
    files=("existence/*.txt",),
  ),
)
