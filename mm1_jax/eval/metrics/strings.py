# SPDX-License-Identifier: Apache-2.0
"""Whether a short answer is one of the accepted ones: exactly, nearly, or within 5 %."""

import re
import string
from collections.abc import Sequence

import numpy as np

from mm1_jax.eval.metrics.limits import LONGEST_PAIRED, cut

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# TriviaQA's program makes a space of each.
_MARKS_TO_SPACES = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4", " "))
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_LETTER = re.compile(r"\(([a-zA-Z])\)")


def exact_match(answer: str, truths: Sequence[str], normalization: str = "lm_eval") -> float:
  """Returns 1.0 if the answer is one of the accepted ones, else 0.0.

  Args:
    answer: the model's; only the first `limits.LONGEST` characters are read.
    truths: all that are accepted.
    normalization: "exact"; "lm_eval", lower case without ASCII punctuation, as lm-eval's TriviaQA
      and lmms-eval's GQA; or "triviaqa", as TriviaQA's own program: also without articles, and
      punctuation separates words.

  Raises:
    ValueError: the normalisation has another name.
  """
  if normalization not in NORMALIZATIONS:
    raise ValueError(f"normalization is {normalization!r}, not one of {sorted(NORMALIZATIONS)}")
  normalize = NORMALIZATIONS[normalization]
  return float(normalize(cut(answer)) in {normalize(truth) for truth in truths})


def _lm_eval(text: str) -> str:
  return text.lower().translate(_NO_PUNCTUATION)


def _triviaqa(text: str) -> str:
  return " ".join(_ARTICLE.sub(" ", text.lower().translate(_MARKS_TO_SPACES)).split())


NORMALIZATIONS = {"exact": str, "lm_eval": _lm_eval, "triviaqa": _triviaqa}


def anls(answer: str, truths: Sequence[str], threshold: float = 0.5) -> float:
  """Returns the normalised Levenshtein similarity to the nearest truth, 0 to 1 (DocVQA, InfoVQA).

  1 - distance / length of the longer, in lower case with spaces squeezed; 0 below the threshold.
  DocVQA's program divides by lengths before spaces are squeezed: blanks would earn points there.
  Only the first `limits.LONGEST_PAIRED` characters are compared. Source:
  https://arxiv.org/abs/1907.00490, equation 1.

  Raises:
    ValueError: there are no truths.
  """
  if not truths:
    raise ValueError("an answer without truths has no ANLS")
  best = max(_similarity(_squeezed(answer), _squeezed(truth), threshold) for truth in truths)
  return best if best >= threshold else 0.0


def _squeezed(text: str) -> str:
  return cut(" ".join(cut(text).lower().split()), LONGEST_PAIRED)


def _similarity(a: str, b: str, least: float) -> float:
  """Returns 1 - distance / longer length; 0 where lengths alone show that it is below `least`."""
  shorter, longer = sorted((len(a), len(b)))
  if not longer:
    return 1.0
  return 0.0 if shorter / longer < least else 1 - edit_distance(a, b) / longer


def edit_distance(a: str, b: str) -> int:
  """Returns how many characters to insert, delete or replace to make b of a (Levenshtein).

  Of texts longer than `limits.LONGEST_PAIRED` characters only the beginning is compared.
  """
  shorter, longer = sorted((cut(a, LONGEST_PAIRED), cut(b, LONGEST_PAIRED)), key=len)
  characters = np.array([ord(c) for c in longer], np.int32)
  steps = np.arange(len(longer) + 1)
  distances = steps  # of the beginning of `shorter` to each beginning of `longer`
  for i, character in enumerate(shorter):
    replaced = distances[:-1] + (characters != ord(character))
    best = np.concatenate([[i + 1], np.minimum(distances[1:] + 1, replaced)])
    # A character more of `longer` costs one insertion: the least to the left, and the way from it.
    distances = np.minimum.accumulate(best - steps) + steps
  return int(distances[-1])


def relaxed_accuracy(answer: str, truth: str) -> float:
  """Returns 1.0 if a number is within 5 % of the true one, or a text equals it; else 0.0 (ChartQA).

  "5%" is the number 0.05. If the truth is 0 or no number, texts are compared, in lower case.
  Source: https://arxiv.org/abs/2203.10244, section 5.1.
  """
  answer = cut(answer)
  number, true_number = _number(answer), _number(truth)
  if number is not None and true_number:
    return float(abs(number - true_number) / abs(true_number) <= 0.05)
  return float(answer.lower() == truth.lower())


def _number(text: str) -> float | None:
  try:
    return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
  except ValueError:
    return None


def math_vista_extract(reply: str, choices: Sequence[str], answer_type: str) -> str:
  """Returns the answer in a reply by MathVista's rules that need no other model.

  A choice, or a number of the type asked for; else what is quoted in: The answer is "...". Else the
  whole reply, where MathVista's program asks GPT-4 to extract the answer.
  """
  reply = cut(reply)
  if reply in choices:
    return reply
  kind = {"integer": int, "float": float}.get(answer_type)
  try:
    if kind:
      return str(kind(reply))
  except ValueError:
    pass
  for line in reply.split("\n"):
    _, said, rest = line.partition('The answer is "')
    quoted, ended, _ = rest.rpartition('".')
    if said and ended:
      return quoted
  return reply


def math_vista_normalize(
  answer: str, choices: Sequence[str], answer_type: str, precision: float | None = None
) -> str | None:
  """Returns an extracted answer as MathVista compares it with the truth, as text.

  Args:
    answer: from `math_vista_extract`.
    choices: of a multiple-choice question: the answer becomes the choice of the letter in it, or
      else the choice at the least edit distance.
    answer_type: "integer", "float", "list" or "text".
    precision: decimals of a float.

  Returns:
    The text; None if it is not of the type.
  """
  if choices:
    letters = _LETTER.findall(cut(answer, LONGEST_PAIRED))
    letter = letters[0].upper() if letters else answer.strip()
    if len(letter) == 1 and 0 <= ord(letter) - ord("A") < len(choices):
      return choices[ord(letter) - ord("A")]
    return min(choices, key=lambda choice: edit_distance(letter, choice))
  try:
    if answer_type == "integer":
      return str(int(float(answer)))
    if answer_type == "float":
      return str(round(float(answer), int(precision or 0)))
  except (ValueError, OverflowError):
    return None
  return answer
