# SPDX-License-Identifier: Apache-2.0
"""A record becomes an `Example`: ids, what to predict, and the bytes of its pictures.

A record is first one sequence of ids t_0 ... t_n:

  document      <s> item item ... </s>
  conversation  <s> USER: item ...\\n ASSISTANT: item ... </s> USER: ..., as `template.py` says
  item          the ids of a text, or <image_start> <image> x T <image_end>

The example predicts each id from those before it: tokens t_0 ... t_{n-1}, targets t_1 ... t_n.
The loss is on text and `</s>`; in a conversation, on the assistant's words and their end. Ids of a
picture are never predicted. Each item is tokenised on its own, so a prompt has the same ids as in
training.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mm1_jax.config import DataConfig, InputSpec
from mm1_jax.data.sources import Record
from mm1_jax.data.template import ChatTemplate, load_template
from mm1_jax.data.tiling import Tile, Tiler
from mm1_jax.data.tokenizer import Tokenizer

Items = Sequence[Mapping[str, Any]]


class Span(NamedTuple):
  """Positions `start` to `stop` of one picture, its delimiters included."""

  start: int
  stop: int


@dataclasses.dataclass(frozen=True)
class Example:
  """What is packed as one segment; L positions."""

  tokens: np.ndarray  # int32[L]
  targets: np.ndarray  # int32[L]
  loss_mask: np.ndarray  # float32[L]
  images: tuple[bytes | Tile, ...]  # encoded pictures, or parts of them, in order
  spans: tuple[Span, ...]  # where each of them is in `tokens`

  def __len__(self) -> int:
    return len(self.tokens)


class Measure(NamedTuple):
  """How long a record's example is, and where its items begin."""

  num_positions: int
  image_starts: list[int]  # first positions of its pictures, delimiters included
  text_starts: list[int]  # of texts right after another text; of documents with pictures only


class Prompt(NamedTuple):
  """What a model is given to continue."""

  ids: list[int]
  images: list[bytes | Tile]  # one for each run of `<image>` ids


@dataclasses.dataclass(frozen=True)
class Encoder:
  """How text and pictures become ids, in training and in inference alike.

  Args:
    tokenizer: text to ids.
    tokens_per_image: positions that the connector's output takes (T).
    image_delimiters: puts `<image_start>` and `<image_end>` around a picture.
    template: the text around the turns of a conversation.
    tiler: cuts pictures of high resolution; None leaves all whole.
  """

  tokenizer: Tokenizer
  tokens_per_image: int
  image_delimiters: bool = True
  template: ChatTemplate = dataclasses.field(default_factory=load_template)
  tiler: Tiler | None = None

  @functools.cached_property
  def image_ids(self) -> tuple[int, ...]:
    """Ids of one picture: T placeholders, and the delimiters."""
    run = (self.tokenizer.image_id,) * self.tokens_per_image
    if not self.image_delimiters:
      return run
    return (self.tokenizer.image_start_id, *run, self.tokenizer.image_end_id)

  def encode_content(self, items: Items) -> list[int]:
    """Returns the ids of texts and pictures in order."""
    return list(itertools.chain.from_iterable(map(self._encode_item, items)))

  def _encode_item(self, item: Mapping[str, Any]) -> Sequence[int]:
    return self.tokenizer.encode(item["text"]) if "text" in item else self.image_ids

  def encode_prefix(self, items: Items) -> Prompt:
    """Returns the beginning of a document, for a pre-trained model to continue."""
    (items,) = self._cut([items])
    return Prompt([self.tokenizer.bos_id, *self.encode_content(items)], _images(items))

  def _cut(self, contents: Sequence[Items]) -> Sequence[Items]:
    """Returns the contents of an example with its pictures cut, if they are to be."""
    return contents if self.tiler is None else self.tiler.cut(contents)

  def encode_prompt(self, turns: Sequence[Mapping[str, Any]]) -> Prompt:
    """Returns a conversation that ends in the user's turn, up to where the answer begins.

    The answer's ids follow exactly as in training: `encode_answer` gives them.
    """
    ids, _, images = self._encode_turns([*turns, {"role": "assistant", "content": None}])
    return Prompt(ids, images)

  def encode_answer(self, items: Items) -> list[int]:
    """Returns the ids of an assistant's turn after `ASSISTANT:`, its end included."""
    space = self.template.assistant.before.endswith(" ")
    return [*self.encode_content(_after_space(items) if space else items), *self.answer_end]

  @property
  def answer_end(self) -> list[int]:
    """Ids that end an answer: one for a control symbol, several where the end is only text."""
    return self.tokenizer.encode_markup(self.template.assistant.end)

  def encode_record(self, record: Record) -> Example:
    """Returns a checked record as one example, of whatever length."""
    if "turns" in record:
      ids, predict, images = self._encode_turns(record["turns"])
    else:
      ids, images = self.encode_prefix(record["content"])
      ids.append(self.tokenizer.eos_id)
      predict = np.ones(len(ids), bool)
    return self._example(ids, predict, images)

  def measure_record(self, record: Record) -> Measure:
    """Returns how long `encode_record` makes a record, without making the arrays."""
    if "turns" in record:
      example = self.encode_record(record)
      return Measure(len(example), [span.start for span in example.spans], [])
    (items,) = self._cut([record["content"]])
    # After `<s>` at 0. `</s>` is a target and takes no position.
    starts = list(itertools.accumulate((len(self._encode_item(i)) for i in items), initial=1))
    images = [start for start, item in zip(starts, items, strict=False) if "image" in item]
    pairs = zip(starts[1:], items, items[1:], strict=False) if images else ()
    texts = [start for start, before, item in pairs if "text" in before and "text" in item]
    return Measure(starts[-1], images, texts)

  def _encode_turns(
    self, turns: Sequence[Mapping[str, Any]]
  ) -> tuple[list[int], list[bool], list[bytes | Tile]]:
    """Returns ids, whether each is to be predicted, and the pictures.

    A last turn without content is one that is still to be said.
    """
    template, encode = self.template, self.tokenizer.encode_markup
    if template.default_system and turns[0]["role"] != "system":
      turns = [{"role": "system", "content": [{"text": template.default_system}]}, *turns]
    contents = self._cut([turn["content"] or [] for turn in turns])
    ids = [self.tokenizer.bos_id] if template.bos else []
    predict, images = [False] * len(ids), []
    for number, (turn, items) in enumerate(zip(turns, contents, strict=True), start=1):
      markup, said = template.markup(turn["role"]), turn["content"] is not None
      parts = [(encode(markup.before.removesuffix(" ")), False)]
      if said and turn["role"] == "assistant":
        parts += [(self.encode_answer(items), True)]
        parts += [(encode(markup.after), False)] if number < len(turns) else []
      elif said:
        items = _after_space(items) if markup.before.endswith(" ") else items
        parts += [(self.encode_content(items), False), (encode(markup.after), False)]
      for part, trained in parts:
        ids += part
        predict += [trained] * len(part)
      images += _images(items)
    return ids, predict, images

  def _example(
    self, ids: list[int], predict: Sequence[bool] | np.ndarray, images: list[bytes | Tile]
  ) -> Example:
    sequence = np.array(ids, np.int32)
    tokens, targets = sequence[:-1], sequence[1:]
    specials = (
      self.tokenizer.image_id,
      self.tokenizer.image_start_id,
      self.tokenizer.image_end_id,
    )
    loss_mask = np.array(predict[1:], bool)
    for special in specials:
      loss_mask &= targets != special
    spans = self._spans(tokens)
    assert len(spans) == len(images), (len(spans), len(images))
    return Example(tokens, targets, loss_mask.astype(np.float32), tuple(images), spans)

  def _spans(self, tokens: np.ndarray) -> tuple[Span, ...]:
    """Finds each picture: every T-th placeholder is the first of one."""
    firsts = np.flatnonzero(tokens == self.tokenizer.image_id)[:: self.tokens_per_image]
    starts = firsts - 1 if self.image_delimiters else firsts
    length = len(self.image_ids)
    return tuple(Span(int(s), int(s) + length) for s in starts)


def cut(example: Example, start: int, stop: int) -> Example:
  """Returns positions `start` to `stop` as an example of their own.

  Each (token, target) pair is in exactly one of an example's parts, so cutting loses nothing. Parts
  after the first begin in mid-document, without `<s>`.

  Raises:
    ValueError: the cut goes through a picture.
  """
  if start == 0 and stop == len(example):
    return example
  inside = [i for i, s in enumerate(example.spans) if s.start < stop and start < s.stop]
  spans = [example.spans[i] for i in inside]
  if any(s.start < start or stop < s.stop for s in spans):
    raise ValueError(f"positions {start} to {stop} cut through a picture of {example.spans}")
  return Example(
    tokens=example.tokens[start:stop],
    targets=example.targets[start:stop],
    loss_mask=example.loss_mask[start:stop],
    images=tuple(example.images[i] for i in inside),
    spans=tuple(Span(s.start - start, s.stop - start) for s in spans),
  )


def make_encoder(data: DataConfig, tokenizer: Tokenizer, spec: InputSpec) -> Encoder:
  """Returns the encoder of a run.

  Args:
    data: the run's.
    tokenizer: text to ids.
    spec: the model's inputs.

  Raises:
    DataError: its chat template is missing or damaged.
  """
  return Encoder(
    tokenizer,
    spec.tokens_per_image,
    data.image_delimiters,
    load_template(data.chat_template),
    data.tiling and Tiler(data.tiling, spec.image_size, data.image_fit),
  )


def _after_space(items: Items) -> Items:
  """Puts a space before a turn's first text, where it follows the role directly."""
  if items and "text" in items[0]:
    return [{"text": " " + items[0]["text"]}, *items[1:]]
  return items


def _images(items: Items) -> list[bytes | Tile]:
  return [item["image"] for item in items if "image" in item]
