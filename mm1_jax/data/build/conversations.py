# SPDX-License-Identifier: Apache-2.0
"""Conversations in LLaVA's form.

  {"id": ..., "image": "a.jpg" or ["a.jpg", "b.jpg"], "conversations": [
    {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

The key may also be `images`, or be missing; a picture may also be a URL or `{"bytes", "path"}`.
Each `<image>` is the next of the pictures. The user's and the assistant's turns alternate, and end
with an answer; a system turn may come first. OpenAI's form is read as well, also turn by turn:

  {"images": ["a.jpg"], "messages": [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": "A cat."}]}

An item `image` or `image_url` may have the picture itself, or its `index` in `images`.
`--answer-prompt` adds a line after each question, as LLaVA-1.5 asks for short answers (arXiv
2310.03744, section 3.2).
"""

from collections.abc import Iterator
from typing import Any

from mm1_jax import untrusted
from mm1_jax.data.build.options import BuildOptions
from mm1_jax.data.build.rows import (
  Image,
  RowError,
  header,
  one_field,
  picture,
  text_of,
  whole_number,
)
from mm1_jax.data.sources import Record
from mm1_jax.data.tokenizer import IMAGE

TURNS = ("conversations", "messages", "conversation")
IMAGES = ("image", "images")
_ROLES = {
  **dict.fromkeys(("human", "user"), "user"),
  **dict.fromkeys(("gpt", "assistant", "model", "bot"), "assistant"),
  "system": "system",
}
_TEXT_TYPES = ("text", "input_text", "output_text")


def llava_records(row: Any, default_id: str, options: BuildOptions) -> Iterator[Record]:
  """Yields the record of a row."""
  turns = one_field(row, TURNS, list)
  system = ""
  if turns and _role(turns[0]) == "system":
    system, turns = _plain_text(_content(turns[0])), turns[1:]
  images = _Images(row)
  converted = [_turn(turn, i, images) for i, turn in enumerate(turns)]
  for turn in converted[::2] if options.answer_prompt else ():
    _ask_for(options.answer_prompt, turn["content"])
  if images.left():
    raise RowError(f"more images than {IMAGE} slots")
  if not converted or len(converted) % 2:
    raise RowError("conversation does not end with an answer")
  if system.strip():
    converted.insert(0, {"role": "system", "content": [{"text": system.strip()}]})
  yield {**header(row, default_id, options), "turns": converted}


class _Images:
  """The pictures of a row, taken one after another or by their index."""

  def __init__(self, row: Any):
    cell = next((v for name in IMAGES if (v := row.get(name)) not in (None, "", [])), [])
    self._images = [picture(v) for v in (cell if isinstance(cell, list) else [cell])]
    self._used: set[int] = set()
    self._next = 0

  def take(self) -> Image:
    """Returns the next picture.

    Raises:
      RowError: there is none.
    """
    self._next += 1
    return self.at(self._next - 1)

  def at(self, index: int) -> Image:
    if not 0 <= index < len(self._images):
      raise RowError(f"more {IMAGE} slots than images", f"{len(self._images)} images")
    self._used.add(index)
    return self._images[index]

  def named(self, value: Any) -> Image:
    """Returns the picture that an item of a turn names; `images` may list it once more."""
    image = picture(value)
    self._used |= {i for i, other in enumerate(self._images) if other == image}
    return image

  def left(self) -> bool:
    return len(self._used) < len(self._images)


def _role(turn: Any) -> str | None:
  said = one_field(turn, ("from", "role"), str)
  return _ROLES.get(said.strip().lower())


def _turn(turn: Any, number: int, images: _Images) -> dict[str, Any]:
  """Returns a turn in our form, with its pictures taken from `images`."""
  role = _role(turn)
  if role not in ("user", "assistant"):
    raise RowError("a turn is neither by human nor gpt", f"it is {untrusted.shown(turn)}")
  if role != ("user", "assistant")[number % 2]:
    raise RowError("human and gpt do not take turns", f"turn {number} is by {role}")
  content: list[dict[str, Any]] = []
  for item in _content(turn):
    content += _pieces(item["text"], images) if "text" in item else [_item_image(item, images)]
  # The line breaks that LLaVA puts around a picture are not text.
  pictured = any("image" in item for item in content)
  content = [{"text": i["text"].strip("\n")} if pictured and "text" in i else i for i in content]
  content = [item for item in content if item.get("text", True)]
  if not any("image" in item or item["text"].strip() for item in content):
    raise RowError("empty turn")
  return {"role": role, "content": content}


def _content(turn: Any) -> list[dict[str, Any]]:
  """Returns what a turn says as items: {"text": str}, or what tells of a picture."""
  value = one_field(turn, ("value", "content"), str | int | float | list | dict)
  if not isinstance(value, list | dict):
    return [{"text": text_of(value)}]
  items = []
  for item in value if isinstance(value, list) else [value]:
    if isinstance(item, str):
      items.append({"text": item})
    elif not isinstance(item, dict):
      raise RowError("an item of a turn is no object", untrusted.shown(item))
    elif isinstance(item.get("text"), str) and item.get("type", "text") in _TEXT_TYPES:
      items.append({"text": item["text"]})
    elif item.get("type", "image") in ("image", "image_url", "input_image"):
      items.append({"picture": item})
    else:
      raise RowError("an item of a turn is neither text nor image", untrusted.shown(item))
  return items


def _plain_text(items: list[dict[str, Any]]) -> str:
  if not all("text" in item for item in items):
    raise RowError("an image in a system turn")
  return "\n".join(item["text"] for item in items)


def _pieces(text: str, images: _Images) -> list[dict[str, Any]]:
  """Returns a text and the pictures in it."""
  first, *others = text.split(IMAGE)
  pieces: list[dict[str, Any]] = [{"text": first}]
  for other in others:
    pieces += [{"image": images.take()}, {"text": other}]
  return pieces


def _item_image(item: dict[str, Any], images: _Images) -> dict[str, Any]:
  told = item["picture"]
  index = whole_number(told.get("index"))
  if index is not None:
    return {"image": images.at(index)}
  if any(told.get(key) for key in ("bytes", "path", "file_name", "image", "url", "image_url")):
    return {"image": images.named(told)}
  return {"image": images.take()}


def _ask_for(answer_prompt: str, content: list[dict[str, Any]]) -> None:
  """Puts a prompt on a line of its own after a question."""
  if "text" in content[-1]:
    content[-1] = {"text": f"{content[-1]['text']}\n{answer_prompt}"}
  else:
    content.append({"text": answer_prompt})
