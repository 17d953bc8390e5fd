# SPDX-License-Identifier: Apache-2.0
"""What the readers of official question sets share: conversations, prompts and boxes."""

import collections
from typing import Any

from mm1_jax.data.tokenizer import IMAGE

Row = dict[str, Any]
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
OCR_CAPTION = "Provide a one-sentence caption for the provided image, with the text that it shows."
ROLES = {"system": "system", "user": "human", "assistant": "gpt"}  # theirs -> LLaVA's
BINS = 1000  # of a coordinate


def row(id: Any, images: str | list[str], *turns: tuple[str, str]) -> Row:
  """Returns a conversation whose pictures come before the first question."""
  images = [images] if isinstance(images, str) else images
  first = f"{IMAGE}\n" * len(images)
  said = [text for turn in turns for text in turn]
  said[0] = first + said[0]
  conversations = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
  return {"id": str(id), "image": images, "conversations": conversations}


def short(question: str) -> str:
  return f"{question.strip()}\n{SHORT}"


def choice(question: str, choices: list[str], answer: int) -> tuple[str, str]:
  """Returns a question with lettered choices, and the letter that is right."""
  lines = [f"{chr(65 + i)}. {text}" for i, text in enumerate(choices)]
  return "\n".join([question.strip(), *lines, LETTER]), chr(65 + answer)


def box(x1: float, y1: float, x2: float, y2: float, width: float, height: float) -> str:
  """Returns a box of pixels as text."""

  def scale(value: float, size: float) -> int:
    return min(max(int(value / size * BINS), 0), BINS - 1)

  return f"<{scale(x1, width)},{scale(y1, height)},{scale(x2, width)},{scale(y2, height)}>"


def most_frequent(answers: list[Any]) -> str:
  """Returns the most frequent of the annotators' answers; of several the first."""
  said = [a["answer"] if isinstance(a, dict) else a for a in answers]
  return collections.Counter(said).most_common(1)[0][0]
