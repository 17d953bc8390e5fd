# SPDX-License-Identifier: Apache-2.0
"""Replies that every metric reads, and what our metrics make of each.

`bench/metrics_peers.py` gives the same replies to other projects' code and records its answers in
`peers.json`; the tests here compare. Texts are drawn by `random.Random`, so that a seed is enough
to have them again.
"""

import hashlib
import json
import pathlib
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mm1_jax.eval.metrics import boxes, choices, strings, vqa, yes_no
from mm1_jax.eval.metrics.captions import ptb_tokenize

RECORDED = pathlib.Path(__file__).parent / "peers.json"
SEED, NUM_RANDOM = 18, 1000

# What random replies are made of: everything that some rule of some metric looks at.
_PIECES = [
  *["A", "B", "C", "D", "E", "(A)", "(B)", "(C)", "A.", "B.", "C.", "D)", "A:", ":B", "(D).", "b"],
  *["yes", "no", "Yes", "No", "YES.", "No,", "y", "n", "not", "none", "true", "the answer is"],
  *[
    "The answer is",
    "Answer:",
    "so",
    "is",
    "thus",
    "therefore",
    "could be",
    "final",
    "result",
    "=",
  ],
  *[
    "a",
    "an",
    "the",
    "A",
    "one",
    "two",
    "three",
    "ten",
    "zero",
    "dont",
    "isnt",
    "couldn'tve",
    "its",
  ],
  *[
    "somebody'd",
    "yall'd've",
    "let's",
    "o'clock",
    "dog's",
    "it's",
    "can't",
    "cannot",
    "Im",
    "won't",
  ],
  *["1", "12", "1,000", "1,,2", "3.5", "0.5", ".5", "2.", "5%", "12.6%", "1e3", "-4", "3/4", "$5"],
  *["10th", "1990s", "+7", "nan", "inf", "1_000", "0", "0.0", "100", "4.9", "5.1", "٣", "²", "½"],
  *["cat", "dog", "Dog", "red car", "a man riding a wave", "white and black", "U.S.", "Mr. Smith"],
  *[
    "e.g.",
    "etc.",
    "well-known",
    "and/or",
    "AT&T",
    "C++",
    "http://a.b/c",
    "x@y.com",
    "#tag",
    "@me",
  ],
  *[".", ",", "?", "!", ";", ":", "'", '"', "-", "--", "...", "(", ")", "[", "]", "{", "}", "/"],
  *[
    "\\",
    "*",
    "&",
    "%",
    "_",
    "<",
    ">",
    "`",
    "\u201c",
    "\u201d",
    "\u2019",
    "\u2013",
    "…",
    "é",
    "ß",
    "İ",
    "中文",
    "😀",
  ],
  *['"cat".', 'The answer is "dog".', "<image>", "\x07", "\u200b", "\u00a0", "\n", "\t", "  "],
]
_JOINTS = [" ", " ", " ", "", "  ", "\n", ", "]


class Case(NamedTuple):
  reply: str
  truths: tuple[str, ...]  # ten
  options: tuple[str, ...]  # four, all different


def random_strings(seed: int = SEED, n: int = NUM_RANDOM) -> list[str]:
  """Returns texts of 0 to 12 pieces; the first are empty, blank, and all punctuation."""
  draw = random.Random(seed)
  texts = ["", " ", "\n\t", "?!.,;:'\"-()[]{}/\\*&%_<>`"]
  while len(texts) < n:
    text = ""
    for _ in range(draw.randrange(13)):
      text += _PIECES[draw.randrange(len(_PIECES))] + _JOINTS[draw.randrange(len(_JOINTS))]
    texts.append(text)
  return texts


def cases(texts: Sequence[str], seed: int = SEED) -> list[Case]:
  """Returns a case for each text: the reply, ten truths of which many are near it, and options."""
  draw = random.Random(seed)
  distinct = list(dict.fromkeys(texts))

  def any_text() -> str:
    return texts[draw.randrange(len(texts))]

  def near(text: str) -> str:
    words = text.split()
    changes = [text, text.lower(), text.strip(" .,?!"), " ".join(words), " ".join(words[:-1])]
    return changes[draw.randrange(len(changes))]

  found = []
  for text in texts:
    few = [near(text), near(text), any_text()]
    agree = draw.randrange(4) == 0  # ten equal truths are treated apart
    truths = [few[0]] * 10 if agree else [few[draw.randrange(len(few))] for _ in range(10)]
    start = draw.randrange(len(distinct))
    options = [distinct[(start + k) % len(distinct)] for k in range(4)]
    reply = text
    if draw.randrange(4) == 0:  # an option within a sentence
      reply = f"{text} I think that it must be {options[draw.randrange(4)]}"
    found.append(Case(reply, tuple(truths), tuple(options)))
  return found


def box_replies(seed: int = SEED, n: int = NUM_RANDOM) -> list[tuple[str, list[float]]]:
  """Returns replies with a box in brackets or a damaged one, and the true box of each."""
  draw = random.Random(seed)
  found = []
  for _ in range(n):
    x, y = draw.randrange(80) / 100, draw.randrange(80) / 100
    true = [x, y, x + 0.05 + draw.randrange(15) / 100, y + 0.05 + draw.randrange(15) / 100]
    near = [min(max(value + (draw.randrange(9) - 4) / 100, 0), 1) for value in true]
    text = ", ".join(f"{value:.2f}" for value in near)
    forms = [f"[{text}]", f"It is at [{text}].", f"[{text}", f"[ {text} ] and [0.1, 0.2, 0.3, 0.4]"]
    found.append((forms[draw.randrange(len(forms))], [round(value, 4) for value in true]))
  return found


def yes_no_replies(seed: int = SEED, n: int = NUM_RANDOM) -> list[str]:
  """Returns replies of which most are yes or no in some form."""
  draw = random.Random(seed)
  forms = ["yes", "Yes", "yes.", "Yes, it is", "no", "No", "No.", "no ", "not", "maybe", "n", ""]
  return [forms[draw.randrange(len(forms))] for _ in range(n)]


def mme_questions(n: int) -> list[tuple[str, str]]:
  """Returns the category and picture of each of n questions, an even number."""
  categories = yes_no.PERCEPTION + yes_no.COGNITION
  return [(categories[i // 2 % len(categories)], f"{i // 2}.jpg") for i in range(n)]


def likelihoods(seed: int = SEED, n: int = 200) -> tuple[list[str], list[float]]:
  """Returns texts and their log-probabilities."""
  draw = random.Random(seed)
  return random_strings(seed, n), [-draw.randrange(1, 5000) / 100 for _ in range(n)]


def one_line(text: str) -> str:
  """Returns a text as one line of a file, which the Java tokenizer reads line by line."""
  return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", " ", text)


def digest(tokens: Sequence[str]) -> str:
  """Returns a short name of tokens: the recorded file has no room for all of them."""
  return hashlib.sha256(" ".join(tokens).encode("utf-8", "surrogatepass")).hexdigest()[:8]


def mmmu_letter(case: Case) -> str:
  """Returns the letter that MMMU's rules find; "?" where it is drawn at random."""
  drawn = {
    choices.mmmu_choice(case.reply, case.options, np.random.default_rng(seed)) for seed in range(8)
  }
  return drawn.pop() if len(drawn) == 1 else "?"


def lettered(case: Case) -> dict[str, str]:
  return dict(zip("ABCD", case.options, strict=True))


def math_vista(case: Case) -> str:
  """Returns the digest of the answer as a choice, an integer, and a float of 2 decimals."""
  kinds = [(case.options, "text"), ((), "integer"), ((), "float")]
  found = [
    strings.math_vista_normalize(
      strings.math_vista_extract(case.reply, options, kind), options, kind, 2
    )
    for options, kind in kinds
  ]
  return digest(list(map(str, found)))


# What is compared with a recorded answer for each case.
OURS: dict[str, Callable[[Case], Any]] = {
  "vqa official": lambda c: vqa.vqa_accuracy(c.reply, c.truths, "official"),
  "vqa openflamingo": lambda c: vqa.vqa_accuracy(c.reply, c.truths, "openflamingo"),
  "vqa lmms": lambda c: vqa.vqa_accuracy(c.reply, c.truths, "lmms"),
  "vqa textvqa": lambda c: vqa.vqa_accuracy(c.reply, c.truths, "textvqa"),
  "anls": lambda c: strings.anls(c.reply, c.truths[:3]),
  "anls docvqa": lambda c: strings.anls(c.reply, c.truths[:3]),
  "edit distance": lambda c: strings.edit_distance(c.reply, c.truths[0]),
  "exact match lm_eval": lambda c: strings.exact_match(c.reply, c.truths, "lm_eval"),
  "relaxed accuracy": lambda c: strings.relaxed_accuracy(c.reply, c.truths[0]),
  "mathvista": math_vista,
  "mmmu choice": mmmu_letter,
  "mmmu open": lambda c: choices.mmmu_open_accuracy(c.reply, [c.truths[0]]),
  "mmbench": lambda c: choices.can_infer(c.reply, lettered(c)),
  "scienceqa": lambda c: "".join(
    letter for letter in "ABCDE" if choices.science_qa(c.reply) == letter
  ),
  "seed": lambda c: choices.first_letter(c.reply),
  "yes/no exactly": lambda c: yes_no.exactly(c.reply),
  "yes/no by prefix": lambda c: yes_no.by_prefix(c.reply),
  "yes/no by word": lambda c: yes_no.by_word(c.reply),
  "ptb tokens": lambda c: digest(ptb_tokenize(one_line(c.reply))),
}


def equal(ours: Any, theirs: Any) -> bool:
  """Whether two answers are the same, numbers to the 5 decimals that are recorded."""
  if isinstance(ours, (float, int)) and isinstance(theirs, (float, int)):
    return abs(ours - theirs) < 1e-5
  return ours == theirs


def recorded() -> dict[str, Any]:
  return json.loads(RECORDED.read_text())


def refcoco(replies: Sequence[tuple[str, list[float]]]) -> list[float]:
  return [boxes.refcoco(reply, np.array(true)) for reply, true in replies]
