# SPDX-License-Identifier: Apache-2.0
"""Accuracy of answers to questions that ten people answered (VQA, https://visualqa.org/evaluation).

An answer is right as far as three people gave it: min(1, matches / 3), averaged over the sets that
leave one person out. What counts as the same answer differs between programs, so each way has a
name, which belongs beside the number:

| name | the answer | people's answers |
|---|---|---|
| official | both steps | punctuation, and only if the ten differ |
| openflamingo | both steps, if the ten differ | both steps, if the ten differ |
| lmms | both steps | both steps |
| textvqa | lower case, no "," and "?", both steps | the same |
| paligemma | lower case | lower case; all ten count, none is left out |

The first is VQA's own program; `lmms` is lmms-eval's of VQAv2, `textvqa` its of TextVQA, VizWiz and
OK-VQA; `paligemma` is big_vision's of OK-VQA.

The steps are punctuation, then digits and articles: `normalize` does both. VQA's test server uses
other rules for punctuation.
"""

import re
from collections.abc import Sequence

from mm1_jax.eval.metrics.limits import cut

_MARKS = ';/[]"{}()=+\\_->' + "<@`,?!"
OFFICIAL_THOUSANDS = re.compile(r"\d,\d")
_THOUSANDS = re.compile(r"\d,+\d")  # lmms-eval's also finds "1,,000"
# The official pattern begins with (?!<=\d), a slip for a look-behind that is true of every full
# stop: any that is not before a digit goes. Its flags are passed as the count: 32 at most go.
_FULL_STOP, _FULL_STOPS = re.compile(r"\.(?!\d)"), 32
_ARTICLES = {"a", "an", "the"}
_DIGITS = {"none": "0"} | {
  word: str(i)
  for i, word in enumerate(
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
  )
}
# What a contraction becomes if one of its apostrophes is missing.
_WITH_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
  word[:i] + word[i + 1 :]: word
  for word in _WITH_APOSTROPHES.split()
  for i, letter in enumerate(word)
  if letter == "'"
} | {"somebody'd": "somebodyd"}  # a slip of the official table


def normalize(text: str) -> str:
  """Returns an answer as lmms-eval's VQAv2 compares it: punctuation, then digits and articles."""
  return _digits_and_articles(without_punctuation(_on_one_line(text), _THOUSANDS))


def vqa_accuracy(answer: str, truths: Sequence[str], normalization: str = "lmms") -> float:
  """Returns how far an answer is right, 0 to 1.

  Args:
    answer: the model's; of a longer one only the first `limits.LONGEST` characters are read.
    truths: what people answered, ten in the official files.
    normalization: a name of the table above.

  Raises:
    ValueError: there are no truths, or the normalisation has another name.
  """
  if normalization not in NORMALIZATIONS:
    raise ValueError(f"normalization is {normalization!r}, not one of {sorted(NORMALIZATIONS)}")
  if not truths:
    raise ValueError("an answer without truths has no VQA accuracy")
  answer, truths = NORMALIZATIONS[normalization](cut(answer), list(truths))
  matches, n = truths.count(answer), len(truths)
  if normalization == "paligemma":
    return min(1.0, matches / 3)
  # Of the n sets that leave one truth out, `matches` lack one that the answer agrees with.
  return (matches * min(1, (matches - 1) / 3) + (n - matches) * min(1, matches / 3)) / n


def _official(answer: str, truths: list[str]) -> tuple[str, list[str]]:
  if len(set(truths)) > 1:
    truths = [without_punctuation(truth, OFFICIAL_THOUSANDS) for truth in truths]
  return _digits_and_articles(without_punctuation(_on_one_line(answer), OFFICIAL_THOUSANDS)), truths


def _openflamingo(answer: str, truths: list[str]) -> tuple[str, list[str]]:
  answer, truths = _on_one_line(answer), [_on_one_line(truth) for truth in truths]
  if len(set(truths)) == 1:
    return answer, truths

  def both(text: str) -> str:
    return _digits_and_articles(without_punctuation(text, OFFICIAL_THOUSANDS))

  return both(answer), [both(truth) for truth in truths]


def _lmms(answer: str, truths: list[str]) -> tuple[str, list[str]]:
  return normalize(answer), [normalize(truth) for truth in truths]


def _textvqa(answer: str, truths: list[str]) -> tuple[str, list[str]]:
  def words(text: str) -> str:
    return normalize(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())

  return words(answer), [words(truth) for truth in truths]


def _paligemma(answer: str, truths: list[str]) -> tuple[str, list[str]]:
  return answer.lower(), [truth.lower() for truth in truths]


NORMALIZATIONS = {
  "official": _official,
  "openflamingo": _openflamingo,
  "lmms": _lmms,
  "textvqa": _textvqa,
  "paligemma": _paligemma,
}


def _on_one_line(text: str) -> str:
  return text.replace("\n", " ").replace("\t", " ").strip()


def without_punctuation(
  text: str, thousands: re.Pattern[str], full_stop: re.Pattern[str] = _FULL_STOP
) -> str:
  """Removes each mark that has a space beside it, makes the others spaces, and drops full stops.

  Where `thousands` finds a comma between digits all marks go: so it is in the official rules.
  """
  all_go, changed = thousands.search(text), text
  for mark in _MARKS:
    goes = all_go or f"{mark} " in text or f" {mark}" in text
    changed = changed.replace(mark, "" if goes else " ")
  return full_stop.sub("", changed, count=_FULL_STOPS)


def _digits_and_articles(text: str) -> str:
  words = (_DIGITS.get(word, word) for word in text.lower().split())
  return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
