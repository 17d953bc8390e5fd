# SPDX-License-Identifier: Apache-2.0
"""Conversations in LLaVA's form.

  {"id": ..., "image": "a.jpg" or ["a.jpg", "b.jpg"], "conversations": [
    {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

The key may also be `images`, or be missing. Each `<image>` is the next of the pictures. The user's
and the assistant's turns alternate, and end with an answer; a system turn may come first.
`--answer-prompt` adds a line after each question, as LLaVA-1.5 asks for short answers (arXiv
2310.03744, section 3.2).
"""

from collections.abc import Iterator
from typing import Any

from mm1_jax.data.build.options import BuildOptions
from mm1_jax.data.build.rows import Image, RowError, field, header, optional
from mm1_jax.data.sources import Record
from mm1_jax.data.tokenizer import IMAGE

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def llava_records(row: Any, default_id: str, options: BuildOptions) -> Iterator[Record]:
  """Yields the record of a row."""
  turns = field(row, "conversations", list)
  system = ""
  if turns and optional(turns[0], "from", str) == "system":
    system, turns = field(turns[0], "value", str), turns[1:]
  images = _images(row)
  converted = [_turn(turn, i, images) for i, turn in enumerate(turns)]
  for turn in converted[::2] if options.answer_prompt else ():
    _ask_for(options.answer_prompt, turn["content"])
  if images:
    raise RowError(f"more images than {IMAGE} slots")
  if not converted or len(converted) % 2:
    raise RowError("conversation does not end with an answer")
  if system.strip():
    converted.insert(0, {"role": "system", "content": [{"text": system.strip()}]})
  yield {**header(row, default_id, options), "turns": converted}


def _images(row: Any) -> list[Image]:
  """Returns the pictures of a row in order."""
  names = optional(row, "image", str | list) or optional(row, "images", str | list) or []
  names = [names] if isinstance(names, str) else names
  if not all(isinstance(name, str) for name in names):
    raise RowError("an image name is not a text")
  return [Image(url=n) if "://" in n else Image(name=n) for n in names]


def _turn(turn: Any, number: int, images: list[Image]) -> dict[str, Any]:
  """Returns a turn in our form; takes its pictures off the front of `images`."""
  role = _ROLES.get(field(turn, "from", str))
  if role is None:
    raise RowError("a turn is neither by human nor gpt")
  if role != ("user", "assistant")[number % 2]:
    raise RowError("human and gpt do not take turns")
  first, *others = field(turn, "value", str).split(IMAGE)
  if len(others) > len(images):
    raise RowError(f"more {IMAGE} slots than images")
  content: list[dict[str, Any]] = [{"text": first}]
  for text in others:
    content += [{"image": images.pop(0)}, {"text": text}]
  # The line breaks that LLaVA puts around a picture are not text.
  content = [{"text": i["text"].strip("\n")} if others and "text" in i else i for i in content]
  content = [item for item in content if item.get("text", True)]
  if not content or not any("image" in i or i["text"].strip() for i in content):
    raise RowError("empty turn")
  return {"role": role, "content": content}


def _ask_for(answer_prompt: str, content: list[dict[str, Any]]) -> None:
  """Puts a prompt on a line of its own after a question."""
  if "text" in content[-1]:
    content[-1] = {"text": f"{content[-1]['text']}\n{answer_prompt}"}
  else:
    content.append({"text": answer_prompt})
