# SPDX-License-Identifier: Apache-2.0
"""Batches of documents drawn at random: batch n of a seed is a function of both, so it resumes."""

from collections.abc import Sequence

import numpy as np

from lab.documents import Document, Given, Stream
from mm1_jax.batch import Batch
from mm1_jax.config import RunConfig
from mm1_jax.data.examples import Encoder, Example, cut, make_encoder
from mm1_jax.data.packing import Segment, assemble, stack
from mm1_jax.data.tokenizer import Tokenizer

SHORTEST = 16  # positions that a text is cut to at a row's end
Mixture = tuple[tuple[float, Stream], ...]  # shares of positions


class Batches:
  """Rows filled with documents, of each stream its share of the positions.

  Documents are whole, unless they are text alone.

  Args:
    run: row shape, tokenizer and size of pictures.
    mixture: streams and their shares.
    seed: of all that is drawn.
    shuffled: whether a batch's pictures are put in an order that has nothing to do with its texts.
  """

  def __init__(self, run: RunConfig, mixture: Mixture, seed: int, *, shuffled: bool = False):
    self._run, self._mixture, self._seed, self._shuffled = run, mixture, seed, shuffled
    self._encoder = encoder_of(run)

  def __getitem__(self, step: int) -> Batch:
    rng = np.random.default_rng([self._seed, step])
    drawn = np.zeros(len(self._mixture))
    batch = stack([self._row(rng, drawn) for _ in range(self._run.data.batch_size)])
    if self._shuffled:
      shown = batch.images[batch.image_mask]
      batch.images[batch.image_mask] = shown[rng.permutation(len(shown))]
    return batch

  def _row(self, rng: np.random.Generator, drawn: np.ndarray) -> Batch:
    """Returns a row; `drawn` counts the positions of each stream."""
    data, segments, pictures = self._run.data, [], []
    room = data.seq_len
    shares = np.array([share for share, _ in self._mixture])
    while True:
      # The stream that is furthest from its share, with a random start in each batch.
      lag = (drawn + rng.random(len(shares))) / np.maximum(shares, 1e-9)
      which = int(np.argmin(lag))
      example = self._example(rng, self._mixture[which][1])
      slots = data.images_per_row - len(pictures)
      if not example.images and room >= SHORTEST:
        example = cut(example, 0, min(room, len(example)))
      if len(example) > room or len(example.images) > slots:
        if not segments:
          raise ValueError(f"{self._mixture[which][1]}: a document is longer than a row.")
        break
      segments.append(Segment(0, example))
      pictures += example.images
      room -= len(example)
      drawn[which] += len(example)
    return assemble(
      segments,
      stacked(pictures, self._run),
      seq_len=data.seq_len,
      images_per_row=data.images_per_row,
      pad_id=self._encoder.tokenizer.pad_id,
    )

  def _example(self, rng: np.random.Generator, stream: Stream) -> Example:
    pixels = self._run.model.vision.image_size[0]
    document = stream.draw(rng, pixels, "train")
    example = self._encoder.encode_record({"content": items(document)})
    start = 0  # targets are one ahead: that of `<s>` is the first id of the first part
    for part in document:
      size = len(self._encoder.encode_content(items([part])))
      if isinstance(part, Given):
        example.loss_mask[start : start + size] = 0
      start += size
    return example


def encoder_of(run: RunConfig) -> Encoder:
  return make_encoder(run.data, Tokenizer(run.data.tokenizer), run.input_spec)


def items(document: Document) -> list[dict]:
  """Returns a document as a record has it, but for pictures, which are arrays."""
  return [{"text": part} if isinstance(part, str) else {"image": part} for part in document]


def stacked(pictures: Sequence[np.ndarray], run: RunConfig) -> np.ndarray:
  """Returns a row's pictures as uint8[1, n, H, W, 3]."""
  if not pictures:
    return np.zeros((1, 0, *run.model.vision.image_size, 3), np.uint8)
  return np.stack(pictures)[None]
