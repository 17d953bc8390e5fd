# SPDX-License-Identifier: Apache-2.0
"""Texts and pictures to ids and pixels, as MM1 was trained on them.

  processor.apply_chat_template(
    [{"role": "user", "content": [
      {"type": "image", "path": "a.jpg"}, {"type": "text", "text": "What is this?"}]}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")

Every text of a turn is tokenised by itself, and never gives ids of control symbols.
`processor(text=..., images=...)` makes the beginning of a document, for a model to continue.
"""

import base64
import itertools
import re
from fractions import Fraction

import numpy as np
from transformers import BatchFeature, ProcessorMixin

from .configuration_mm1 import MM1Config  # noqa: F401, it refuses a transformers that is too old
from .pictures_mm1 import Picture

IMAGE = "<image>"
PIXEL_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
PIXEL_STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)
SPACE_MARK = "\u2581"  # SentencePiece writes a space so
WHOLE = (1, 1)
ROLES = ("system", "user", "assistant")


def choose_grid(size, tile_size, tiling):
  """Returns the rows and columns of sub-images that a picture of a size is cut into.

  Of the grids that hold it without making it smaller, the one with the least padding; else the one
  that loses the fewest pixels (MM1.5, section 4.5).
  """
  if tiling["grid"] is not None:
    return tuple(tiling["grid"])
  sides = range(1, tiling["max_tiles"] + 1)
  best, best_key = WHOLE, None
  for rows, columns in itertools.product(sides, sides):
    if not tiling["min_tiles"] <= rows * columns <= tiling["max_tiles"]:
      continue
    room = rows * tile_size[0], columns * tile_size[1]
    scale = min(Fraction(room[0], size[0]), Fraction(room[1], size[1]))
    area = scale * scale * size[0] * size[1]
    loss = room[0] * room[1] - area if scale >= 1 else size[0] * size[1] - area
    key = (scale < 1, loss, rows * columns, rows)
    if best_key is None or key < best_key:
      best, best_key = (rows, columns), key
  return best


class MM1Processor(ProcessorMixin):
  """The tokenizer with the other settings of training: `settings`, which exporting writes."""

  def __init__(self, tokenizer=None, settings=None, chat_template=None):
    self.settings = settings
    super().__init__(tokenizer, chat_template=chat_template)

  @property
  def model_input_names(self):
    return ["input_ids", "attention_mask", "pixel_values"]

  def apply_chat_template(
    self,
    conversation,
    chat_template=None,
    add_generation_prompt=False,
    tokenize=False,
    return_dict=False,
    return_tensors=None,
    **kwargs,
  ):
    """Returns ids and pixels of one conversation or of several; without `tokenize`, a text.

    The last turn is the user's with `add_generation_prompt`, and the assistant's without.
    """
    if not tokenize or chat_template is not None:
      return super().apply_chat_template(
        conversation,
        chat_template=chat_template,
        add_generation_prompt=add_generation_prompt,
        tokenize=tokenize,
        return_dict=return_dict,
        return_tensors=return_tensors,
        **kwargs,
      )
    several = not isinstance(conversation[0], dict)
    conversations = conversation if several else [conversation]
    rows = [self._encode_turns(turns, add_generation_prompt) for turns in conversations]
    if not return_dict and return_tensors is None:
      ids = [row for row, _ in rows]
      return ids if several else ids[0]
    batch = self._batch(rows, return_tensors)
    return batch if return_dict else batch["input_ids"]

  def __call__(self, images=None, text=None, return_tensors=None, **kwargs):
    """Returns ids and pixels of documents' beginnings, or of what a chat template has rendered.

    Args:
      images: a picture, a list of them for one text, or a list for each text.
      text: one or several; pictures are put at each `<image>` in it, or else before it.
      return_tensors: "pt", or None for lists.
      kwargs: not used; there to be called like other processors.
    """
    texts = [text or ""] if text is None or isinstance(text, str) else list(text)
    if images is None:
      groups = [[] for _ in texts]
    elif not isinstance(images, list | tuple):
      groups = [[images]]
    elif images and isinstance(images[0], list | tuple):
      groups = [list(group) for group in images]
    else:
      groups = [list(images)] if len(texts) == 1 else [[image] for image in images]
    if len(groups) != len(texts):
      raise ValueError(f"{len(texts)} texts have pictures for {len(groups)}.")
    rows = [self._encode_text(*pair) for pair in zip(texts, groups, strict=True)]
    return self._batch(rows, return_tensors)

  def _encode_text(self, text, images):
    rendered = any(text.startswith(symbol) for symbol in self.symbols)
    encode = self._encode_markup if rendered else self._encode
    first, *others = text.split(IMAGE)
    if not others and images:
      items = [*({"image": image} for image in images), {"text": text}]
    else:
      if len(others) != len(images):
        raise ValueError(
          f"the text has {len(others)} of {IMAGE}, but there are {len(images)} images."
        )
      strip = (lambda part: part) if rendered else (lambda part: part.strip("\n"))
      items = [{"text": strip(first)}]
      for image, following in zip(images, others, strict=True):
        items += [{"image": image}, {"text": strip(following)}]
    items = [item for item in items if item.get("text") != ""]
    (items,) = self._cut([items])
    ids = [] if rendered else [self.tokenizer.bos_token_id]
    return ids + self._encode_items(items, encode), _pixels(items)

  def _encode_turns(self, turns, open_answer):
    template = self.settings["template"]
    turns = [_turn(turn) for turn in turns]
    if open_answer and turns[-1][0] != "user":
      raise ValueError("the conversation ends with an answer; its last turn must be the user's.")
    if template["default_system"] and turns[0][0] != "system":
      turns = [("system", [{"text": template["default_system"]}]), *turns]
    contents = self._cut([items for _, items in turns])
    ids, pixels = [self.tokenizer.bos_token_id] if template["bos"] else [], []
    for number, ((role, _), items) in enumerate(zip(turns, contents, strict=True), start=1):
      before, end, after = self._markup(role)
      ids += self._encode_markup(before.removesuffix(" "))
      if before.endswith(" ") and items and "text" in items[0]:
        items = [{"text": " " + items[0]["text"]}, *items[1:]]
      ids += self._encode_items(items, self._encode) + self._encode_markup(end)
      if role != "assistant" or number < len(turns):
        ids += self._encode_markup(after)
      pixels += _pixels(items)
    if open_answer:
      ids += self._encode_markup(self._markup("assistant")[0].removesuffix(" "))
    return ids, pixels

  def _markup(self, role):
    markup = self.settings["template"][role]
    return tuple(markup.get(key, "") for key in ("before", "end", "after"))

  def _encode_items(self, items, encode):
    ids = []
    for item in items:
      ids += encode(item["text"]) if "text" in item else self._image_ids()
    return ids

  def _image_ids(self):
    settings = self.settings
    run = [settings["image_token_id"]] * settings["tokens_per_image"]
    if not settings["image_delimiters"]:
      return run
    return [settings["image_start_id"], *run, settings["image_end_id"]]

  def _encode(self, text):
    """Returns ids of a text; never a special one."""
    first, *others = text.split(SPACE_MARK) if self.settings["space_mark_ids"] else [text]
    ids = self._tokens(first)
    for part in others:
      ids += self.settings["space_mark_ids"] + self._tokens(part)
    return ids

  def _tokens(self, text):
    if not text:
      return []
    encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return list(encoded["input_ids"])

  def _encode_markup(self, text):
    """Returns ids of a template's text: control symbols take their own."""
    symbols = self.symbols
    ids = []
    for part in re.split("(" + "|".join(map(re.escape, symbols)) + ")", text):
      ids += [symbols[part]] if part in symbols else self._encode(part)
    return ids

  @property
  def symbols(self):
    """Ids of control symbols by name, the longest first; without those of pictures."""
    return dict(sorted(self.settings["symbols"].items(), key=lambda pair: -len(pair[0])))

  def _cut(self, contents):
    """Returns the contents of an example with pictures made of parts: (picture, grid, number)."""
    settings, tiling = self.settings, self.settings["tiling"]
    size, fit = tuple(settings["image_size"]), settings["image_fit"]
    num = sum("image" in item for items in contents for item in items)
    first = num
    if tiling is not None:
      first = 0 if num <= tiling["max_images"] else num
      first = first if tiling["last"] is None else max(0, num - tiling["last"])
    numbers = itertools.count()

    def cut(item):
      if "text" in item:
        return [item]
      number, picture = next(numbers), Picture(item["image"], settings["max_pixels"])
      if number < first:
        return [{"pixels": picture.decode(size, fit)}]
      return self._cut_picture(picture, number)

    return [[part for item in items for part in cut(item)] for items in contents]

  def _cut_picture(self, picture, number):
    settings, tiling = self.settings, self.settings["tiling"]
    size = tuple(settings["image_size"])
    grid = choose_grid(picture.size, size, tiling)
    fit = settings["image_fit"] if tiling["grid"] is not None else "pad"
    whole = [({"pixels": picture.decode(size, fit)}, (0, 0))]
    if grid == WHOLE:
      parts = whole
    else:
      large = picture.decode((grid[0] * size[0], grid[1] * size[1]), fit)
      tiles = large.reshape(grid[0], size[0], grid[1], size[1], 3).swapaxes(1, 2)
      places = itertools.product(range(1, grid[0] + 1), range(1, grid[1] + 1))
      parts = [
        ({"pixels": tile}, at) for tile, at in zip(tiles.reshape(-1, *size, 3), places, strict=True)
      ]
      if tiling["overview"] != "none":
        parts = parts + whole if tiling["overview"] == "last" else whole + parts
    if tiling["marks"] == "none":
      return [part for part, _ in parts]
    marked, before = [], None
    for part, at in parts:
      text = _index(number, at) if tiling["marks"] == "index" else _separator(at, before)
      marked += [{"text": text}, part] if text else [part]
      before = at
    return marked

  def _batch(self, rows, return_tensors):
    length = max(len(ids) for ids, _ in rows)
    pad = self.tokenizer.pad_token_id
    data = {
      "input_ids": [[pad] * (length - len(ids)) + ids for ids, _ in rows],
      "attention_mask": [[0] * (length - len(ids)) + [1] * len(ids) for ids, _ in rows],
    }
    pixels = [picture for _, pictures in rows for picture in pictures]
    if pixels:
      x = (np.stack(pixels).astype(np.float32) / 255 - PIXEL_MEAN) / PIXEL_STD
      data["pixel_values"] = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return BatchFeature(data, tensor_type=return_tensors)


def _turn(turn):
  """Returns role and items of a turn."""
  role, content = turn["role"], turn["content"]
  if role not in ROLES:
    raise ValueError(f"a turn has the role {role!r}; it must be one of {ROLES}.")
  content = [{"type": "text", "text": content}] if isinstance(content, str) else content
  return role, [_item(item) for item in content]


def _item(item):
  kind = item["type"]
  if kind == "text":
    return {"text": item["text"]}
  if kind not in ("image", "image_url"):
    raise ValueError(f"an item has the type {kind!r}; MM1 takes text and image.")
  if "base64" in item:
    return {"image": base64.b64decode(item["base64"])}
  for key in ("image", "path", "url", "image_url"):
    if item.get(key) is not None:
      image = item[key]
      return {"image": image["url"] if isinstance(image, dict) else image}
  raise ValueError("an image needs one of image, path, url, base64.")


def _pixels(items):
  return [item["pixels"] for item in items if "pixels" in item]


def _index(number, at):
  """Returns (picture, row, column) from 0, 1, 1 on; rows and columns of the overview are 0."""
  return f"({number},{at[0]},{at[1]})"


def _separator(at, before):
  """Returns the separator between a sub-image and the one before: of column, row or overview."""
  if before is None:
    return ""
  if (0, 0) in (at, before):
    return ":"
  return "," if at[0] == before[0] else "\n"
