# SPDX-License-Identifier: Apache-2.0
"""Prompts that several benchmarks share, and what is cut off replies.

Few-shot prompts are OpenFlamingo's (open_flamingo/eval, 655f693): MM1's own were not published.
OpenFlamingo ends each demonstration with a token of its own, `<|endofchunk|>`, which is a newline
here. Form "mm1" is MM1's protocol (arXiv 2403.09611): greedy, no demonstrations at 0 shots; form
"openflamingo" has beams of 3 and two demonstrations without pictures at 0 shots.

A user's turn begins with its pictures, each on a line, as in the conversations that
`mm1_jax.data.build.official` makes for fine-tuning; its words are lmms-eval's (0.7.3). Where that
has no limit on a short reply, or one for long reasoning (MathVista, MMBench), it is 16 to 128
tokens here.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from mm1_jax.eval.task import Content, Form, Item

IMAGE = "<image>"  # where a picture goes, in the questions of some benchmarks
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
OPENFLAMINGO = {"num_beams": 3, "text_demonstrations": 2, "stop": ("\n",)}
_OTHER_PART = re.compile("Question|Answer|Short")


# --- A user's turn ---


def turn(item: Item, text: str) -> Content:
  """Returns a user's turn: pictures first, each on a line, or where the text has `<image>`."""
  return with_pictures(item, text, "\n")


def with_pictures(item: Item, text: str, after: str = "") -> Content:
  """Returns text with an item's pictures where it has `<image>`; if nowhere, they come first.

  Args:
    item: of the pictures.
    text: with `<image>` as often as there are pictures, or never.
    after: what follows each of the pictures that come first.
  """
  parts = text.split(IMAGE)
  if len(parts) == 1:
    parts = ["", *[after] * (len(item.pictures) - 1), after + text] if item.pictures else [text]
  content: Content = [parts[0]]
  for picture, part in zip(item.pictures, parts[1:], strict=True):
    content += [picture, part]
  return [part for part in content if part != ""]


def lettered(choices: Sequence[str]) -> str:
  """Returns choices as lines: A. the first."""
  return "\n".join(f"{chr(65 + i)}. {choice}" for i, choice in enumerate(choices))


def chat(text: Callable[[Item], str], max_new_tokens: int = 16) -> Form:
  """Returns the form of a user's turn; `text` makes the words of an item."""
  return Form(lambda item: turn(item, text(item)), chat=True, max_new_tokens=max_new_tokens)


def short_answer(max_new_tokens: int = 16, before: str = "", capital: bool = False) -> Form:
  """Returns the form of a question that wants a word or a phrase.

  Args:
    max_new_tokens: of the reply.
    before: a line between the question and the one that asks for a short answer.
    capital: whether only the question's first letter is a capital.
  """

  def text(item: Item) -> str:
    question = item.question.capitalize() if capital else item.question
    return "\n".join([question, *([before] if before else []), SHORT])

  return chat(text, max_new_tokens)


def letter(max_new_tokens: int = 16) -> Form:
  """Returns the form of a multiple-choice question that wants a letter."""
  return chat(lambda i: f"{i.question}\n{lettered(i.choices)}\n{LETTER}", max_new_tokens)


# --- Few-shot ---


def vqa_shots(max_new_tokens: int = 5) -> Mapping[str, Form]:
  """Returns the few-shot forms of visual questions.

  Args:
    max_new_tokens: OpenFlamingo's; MM1's are not known, and 16 here.
  """

  def prompt(item: Item) -> Content:
    return with_pictures(item, f"Question:{item.question} Short answer:")

  def demonstration(item: Item) -> str:
    return f"{most_frequent(item.answers)}\n"

  mm1 = Form(prompt, None, demonstration, stop=("\n", ".", ",", "Question"), clean=short_part)
  flamingo = Form(
    prompt, None, demonstration, max_new_tokens=max_new_tokens, clean=short_part, **OPENFLAMINGO
  )
  return {"mm1": mm1, "openflamingo": flamingo}


def caption_shots() -> Mapping[str, Form]:
  """Returns the few-shot forms of captions; MM1's tokens are not known, and 64 here."""

  def prompt(item: Item) -> Content:
    return [*item.pictures, "Output:"]

  def demonstration(item: Item) -> str:
    return f"{item.answers[0].strip()}\n"

  mm1 = Form(prompt, None, demonstration, max_new_tokens=64, stop=("\n",), clean=caption_part)
  flamingo = Form(
    prompt, None, demonstration, max_new_tokens=20, clean=caption_part, **OPENFLAMINGO
  )
  return {"mm1": mm1, "openflamingo": flamingo}


def most_frequent(answers: Sequence[str]) -> str:
  """Returns the most frequent answer; of several the first."""
  return max(answers, key=answers.count)  # pyright: ignore[reportArgumentType]


def short_part(text: str, item: Item) -> str:
  """Returns a short answer without what a model says after it (OpenFlamingo's cuts)."""
  return _OTHER_PART.split(text, maxsplit=1)[0].split(", ", 1)[0].strip()


def caption_part(text: str, item: Item) -> str:
  """Returns a caption without the next one, and without quotes (OpenFlamingo's cuts)."""
  return text.split("Output", 1)[0].replace('"', "").strip()
