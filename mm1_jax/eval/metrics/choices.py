# SPDX-License-Identifier: Apache-2.0
"""Which choice a reply names: each benchmark's own rules, and circular evaluation.

A parser returns the letter, or None where its rules find none. Letters are those of the choices'
order: A is the first.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from mm1_jax.eval.metrics.limits import LONGEST_PAIRED, cut

_UPPERCASE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def first_letter(reply: str) -> str | None:
  """Returns the first character, in upper case (SEED)."""
  return cut(reply).strip()[:1].upper() or None


def science_qa(reply: str) -> str | None:
  """Returns the letter of a reply that is one, or begins with an upper-case one and a full stop.

  LLaVA's rule: all else is wrong.
  """
  reply = cut(reply).strip()
  if len(reply) == 1:
    return reply.lower().upper()
  return reply[0] if len(reply) > 1 and reply[0].isupper() and reply[1] == "." else None


# --- MMBench ---

# What may surround a letter, in the order that MMBench's program tries.
_SURROUNDED = ["{}.", "{},", "{}:", "{})", "{}).", "({})", "({})."]
_SURROUNDED += [":{}", ":{},", ":{}.", ":{})", ":{})."]


def can_infer(reply: str, choices: Mapping[str, str]) -> str | None:
  """Returns the letter that MMBench's rules infer; its program asks GPT-3.5 where they find none.

  The only word that is one of the letters A to E; else the only one with a certain punctuation
  beside it; else the only choice that is part of the reply, in lower case. In a reply of more than
  3 words an "A" may be an article: words alone then say nothing.

  Args:
    reply: the model's.
    choices: text by letter.
  """
  reply = cut(reply)
  return _inferred_letter(reply) or _inferred_text(reply, choices)


def _inferred_letter(reply: str) -> str | None:
  words = reply.split()
  known, long = set(words), len(words) > 3
  for form in ["{}", *_SURROUNDED]:
    found = [letter for letter in "ABCDE" if form.format(letter) in known]
    if len(found) == 1 and not (form == "{}" and "A" in known and long):
      return found[0]
  return None


def _inferred_text(reply: str, choices: Mapping[str, str]) -> str | None:
  reply = reply.lower()
  found = [letter for letter, text in choices.items() if str(text).lower() in reply]
  return found[0] if len(found) == 1 else None


def circular(correct_by_rotation: Sequence[Sequence[bool]]) -> np.ndarray:
  """Returns 1.0 for each question that is right in all rotations of its choices, else 0.0.

  Args:
    correct_by_rotation: for each question, whether each of its rotations is right.

  Raises:
    ValueError: a question has no rotations.
  """
  if not all(len(rotations) for rotations in correct_by_rotation):
    raise ValueError("a question has no rotations, so circular accuracy says nothing of it")
  return np.array([float(all(rotations)) for rotations in correct_by_rotation])


# --- MMMU ---


def mmmu_choice(reply: str, options: Sequence[str], rng: np.random.Generator) -> str:
  """Returns the letter that MMMU's program finds in a reply: (A), else A and a space, else A.

  Else, in a reply of more than 5 words, the option that it contains, in lower case. Of several the
  last. If there is none a random letter, as in MMMU's program: `rng` makes it repeatable.
  """
  reply = cut(reply)
  for mark in ",.!?;:'":
    reply = reply.strip(mark)
  reply = f" {reply} "
  letters = dict(zip(_UPPERCASE, options, strict=False))
  for form, last in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
    if found := [letter for letter in letters if form.format(letter) in reply]:
      return max(found, key=lambda letter: reply.rfind(last.format(letter)))
  if len(reply.split()) > 5:
    lower = reply.lower()
    if found := [letter for letter, text in letters.items() if text.lower() in lower]:
      return max(found, key=lambda letter: lower.rfind(letters[letter].lower()))
  return str(rng.choice(list(letters)))


# What the end of a line with an answer may begin with.
_INDICATORS = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
_TRIVIAL = set(":,.!?;'")
_NUMBERS = [
  re.compile(pattern)
  for pattern in (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # with commas
    r"-?\d++(?:\.\d++)?[eE][+-]?\d+",  # with an exponent
    r"-?(?:\d++\.\d++|\.\d++|\d++\b)(?![eE][+-]?\d+)(?![,\d])",  # others
  )
]


def mmmu_open(reply: str) -> list[str | float]:
  """Returns what may be the answer in a reply to an open question, by MMMU's rules.

  The ends of lines after "is", "answer" and the like, or else the whole reply, and the numbers in
  them; in lower case, numbers as floats of 2 decimals, a single character with a space on either
  side. Only the first `limits.LONGEST_PAIRED` characters are read.
  """
  texts = _key_parts(cut(reply, LONGEST_PAIRED).strip().strip(".").lower())
  numbers = [number for text in texts for form in _NUMBERS for number in form.findall(text)]
  return list(dict.fromkeys(form for text in texts + numbers for form in _mmmu_forms(text)))


def mmmu_open_accuracy(reply: str, truths: Sequence[str]) -> float:
  """Returns 1.0 if a candidate of `mmmu_open` contains a truth, or is its number; else 0.0."""
  accepted = [form for truth in truths for form in _mmmu_forms(truth)]
  parts = [form for form in accepted if isinstance(form, str)]
  for candidate in mmmu_open(reply):
    if isinstance(candidate, str):
      if any(part in candidate for part in parts):
        return 1.0
    elif candidate in accepted:
      return 1.0
  return 0.0


def _key_parts(reply: str) -> list[str]:
  parts, lines = [], reply.split("\n")
  for i, line in enumerate(lines):
    # The last line may be an equation.
    indicators = [*_INDICATORS, "="] if i == len(lines) - 1 else _INDICATORS
    ends = [line.rpartition(word)[2].strip() for word in indicators if word in line]
    # The shortest that is not empty; an empty one gives way to any that follows.
    end = ""
    for candidate in ends:
      if not end or len(candidate) < len(end):
        end = candidate
    if end and end not in _TRIVIAL:
      parts.append(end)
  return parts or [reply]


def _mmmu_forms(text: str) -> list[str | float]:
  text = text.strip()
  try:
    return [round(float(text.replace(",", "")), 2)]
  except ValueError:
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
