# SPDX-License-Identifier: Apache-2.0
"""Scores of yes/no questions: POPE's and MME's."""

import re
from collections.abc import Sequence

import numpy as np

from mm1_jax.eval.metrics.limits import cut
from mm1_jax.eval.metrics.vqa import OFFICIAL_THOUSANDS, without_punctuation

PERCEPTION = (
  "existence",
  "count",
  "position",
  "color",
  "posters",
  "celebrity",
  "scene",
  "landmark",
  "artwork",
  "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_FULL_STOP = re.compile(r"(?<!\d)\.(?!\d)")


def exactly(reply: str) -> str | None:
  """Returns "yes" or "no" if the reply is that and nothing else (lmms-eval's POPE)."""
  reply = cut(reply).lower().strip()
  return reply if reply in ("yes", "no") else None


def by_prefix(reply: str) -> str | None:
  """Returns what the first four characters contain, full stops removed; "y" is yes (MME)."""
  reply = cut(reply).lower().strip().replace(".", "")
  if len(reply) == 1:
    return {"y": "yes", "n": "no"}.get(reply)
  return next((word for word in ("yes", "no") if word in reply[:4]), None)


def by_word(reply: str) -> str | None:
  """Returns which of the two is a word of the reply, if not both are (VLMEvalKit)."""
  words = set(without_punctuation(cut(reply).lower(), OFFICIAL_THOUSANDS, _FULL_STOP).split())
  found = words & {"yes", "no"}
  return found.pop() if len(found) == 1 else None


READINGS = {"exactly": exactly, "by_prefix": by_prefix, "by_word": by_word}


def pope(
  answers: Sequence[str], truths: Sequence[str], reading: str = "exactly"
) -> dict[str, float]:
  """Returns POPE's scores over all questions; "yes" is positive.

  An answer that is neither yes nor no is wrong; if the truth is yes it is a miss. lmms-eval leaves
  such misses out of recall and so of F1.

  Args:
    answers: the model's.
    truths: "yes" or "no" each, in any case.
    reading: a name of `READINGS`.

  Returns:
    "accuracy", "precision", "recall", "f1" and "yes_share" (of the answers), 0 to 1, and "neither",
    a count. A share of nothing is 0.

  Raises:
    ValueError: no questions, other lengths, or a truth that is neither yes nor no.
  """
  if len(answers) != len(truths) or not len(truths):
    raise ValueError(f"POPE needs an answer a question: {len(answers)} for {len(truths)}")
  true = np.array([_truth(truth) == "yes" for truth in truths])
  said = [READINGS[reading](answer) for answer in answers]
  yes, no = (np.array([word == kind for word in said]) for kind in ("yes", "no"))
  hits = int(np.sum(yes & true))
  precision, recall = _share(hits, int(np.sum(yes))), _share(hits, int(np.sum(true)))
  return {
    "accuracy": float(np.mean(np.where(true, yes, no))),
    "precision": precision,
    "recall": recall,
    "f1": _share(2 * precision * recall, precision + recall),
    "yes_share": float(np.mean(yes)),
    "neither": int(np.sum(~yes & ~no)),
  }


def mme(
  answers: Sequence[str],
  truths: Sequence[str],
  categories: Sequence[str],
  pictures: Sequence[str],
) -> dict[str, float]:
  """Returns MME's scores: accuracy of questions plus accuracy of pictures, in percent.

  Args:
    answers: the model's, read `by_prefix`.
    truths: "Yes" or "No" each.
    categories: of `PERCEPTION` and `COGNITION`.
    pictures: the picture's name; each has two questions within its category, and counts as right
      if both are.

  Returns:
    For each category present "CATEGORY/accuracy", "CATEGORY/accuracy+" (0 to 100) and "CATEGORY",
    their sum (0 to 200); "perception" (2000 with all ten) and "cognition" (800 with all four), sums
    of those present; and "neither", a count of answers.

  Raises:
    ValueError: lengths differ, a picture has not two questions, a category or truth is unknown.
  """
  lengths = {len(answers), len(truths), len(categories), len(pictures)}
  if len(lengths) != 1:
    raise ValueError(f"MME needs an answer, category and picture a question: lengths {lengths}")
  pairs: dict[str, dict[str, list[bool]]] = {}
  neither = 0
  for answer, truth, category, picture in zip(answers, truths, categories, pictures, strict=True):
    if category not in PERCEPTION + COGNITION:
      raise ValueError(f"{category!r} is no category of MME: {', '.join(PERCEPTION + COGNITION)}")
    said = by_prefix(answer)
    neither += said is None
    pairs.setdefault(category, {}).setdefault(picture, []).append(said == _truth(truth))
  scores: dict[str, float] = {}
  for category, of_pictures in pairs.items():
    for picture, right in of_pictures.items():
      if len(right) != 2:
        raise ValueError(f"{picture} of {category} has {len(right)} questions; MME's have 2")
    both = np.array(list(of_pictures.values()))
    accuracy, plus = 100 * float(np.mean(both)), 100 * float(np.mean(np.all(both, axis=1)))
    scores |= {f"{category}/accuracy": accuracy, f"{category}/accuracy+": plus}
    scores[category] = accuracy + plus
  return scores | {
    "perception": sum(scores.get(category, 0.0) for category in PERCEPTION),
    "cognition": sum(scores.get(category, 0.0) for category in COGNITION),
    "neither": neither,
  }


def _truth(text: str) -> str:
  word = exactly(text.replace(".", ""))
  if word is None:
    raise ValueError(f"the truth of a yes/no question is {text[:40]!r}")
  return word


def _share(part: float, whole: float) -> float:
  return part / whole if whole else 0.0
