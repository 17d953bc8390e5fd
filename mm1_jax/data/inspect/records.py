# SPDX-License-Identifier: Apache-2.0
"""Raw records of one source: what they hold, and how many positions that takes."""

import collections
import dataclasses
from typing import Any

import numpy as np

from mm1_jax.config import RunConfig, SourceConfig
from mm1_jax.data.examples import Encoder, make_encoder
from mm1_jax.data.image import ImageError, decode_image, read_header
from mm1_jax.data.index import TOO_LONG, TOO_MANY_IMAGES, UNREADABLE
from mm1_jax.data.sources import RecordError, Source
from mm1_jax.data.tokenizer import Tokenizer

LONGEST_SIDE = 320  # pixels of a picture that is kept to be shown


@dataclasses.dataclass(frozen=True)
class Text:
  text: str
  num_positions: int


@dataclasses.dataclass(frozen=True)
class ShownPicture:
  """A picture as it is in its record, small; or why training would drop it."""

  pixels: np.ndarray | None  # uint8[h, w, 3]
  about: str
  num_positions: int
  problem: str


@dataclasses.dataclass(frozen=True)
class Turn:
  """Items of one speaker; of a document, `role` is empty and there is one turn."""

  role: str
  items: tuple[Text | ShownPicture, ...]


@dataclasses.dataclass(frozen=True)
class ShownRecord:
  """One record, or what is wrong with it."""

  number: int
  id: str
  source: str
  license: str
  credit: str
  turns: tuple[Turn, ...]
  num_positions: int
  trained: int  # positions
  problems: tuple[str, ...]  # why training would leave it out; nothing if it would not

  @property
  def pictures(self) -> list[ShownPicture]:
    return [item for turn in self.turns for item in turn.items if isinstance(item, ShownPicture)]

  @property
  def text(self) -> str:
    return " ".join(i.text for turn in self.turns for i in turn.items if isinstance(i, Text))


@dataclasses.dataclass(frozen=True)
class Sample:
  """Records drawn at random from one source."""

  name: str
  num_records: int  # in the whole source
  num_shards: int
  seed: int
  seq_len: int
  records: list[ShownRecord]

  def to_dict(self) -> dict[str, Any]:
    """Returns the figures as plain JSON."""
    readable = [record for record in self.records if record.turns]
    positions = [record.num_positions for record in readable]
    return {
      "source": self.name,
      "records_in_source": self.num_records,
      "shards": self.num_shards,
      "records": [record.number for record in self.records],
      "kinds": _count("conversation" if r.turns[0].role else "document" for r in readable),
      "positions": {
        "sum": sum(positions),
        "median": int(np.median(positions)) if positions else 0,
        "max": max(positions, default=0),
        "longer_than_a_row": sum(p > self.seq_len for p in positions),
      },
      "trained": sum(record.trained for record in readable),
      "pictures": sum(len(record.pictures) for record in readable),
      "licenses": _count(record.license for record in readable),
      "sources": _count(record.source for record in readable),
      "left_out": _count(problem for record in self.records for problem in record.problems),
    }


def _count(values) -> dict[str, int]:
  return dict(collections.Counter(values).most_common())


def read_records(run: RunConfig, source: SourceConfig, *, num_records: int, seed: int) -> Sample:
  """Draws records of a source at random, and encodes them as the run would.

  Raises:
    DataError: files that are missing, damaged or empty.
  """
  opened = Source(source)
  tokenizer = Tokenizer(run.data.tokenizer)
  encoder = make_encoder(
    run.data,
    tokenizer,
    run.input_spec,
  )
  rng = np.random.default_rng(seed)
  drawn = rng.choice(len(opened), min(num_records, len(opened)), replace=False)
  return Sample(
    name=source.name,
    num_records=len(opened),
    num_shards=len(opened.paths),
    seed=seed,
    seq_len=run.data.seq_len,
    records=[_read(run, opened, encoder, int(number)) for number in sorted(drawn)],
  )


def _read(run: RunConfig, source: Source, encoder: Encoder, number: int) -> ShownRecord:
  try:
    record = source[number]
  except RecordError as e:
    return ShownRecord(number, str(e), "", "", "", (), 0, 0, (UNREADABLE,))
  example = encoder.encode_record(record)
  turns = record.get("turns") or [{"role": "", "content": record["content"]}]
  problems = []
  if "turns" in record and len(example) > run.data.seq_len:
    problems.append(TOO_LONG)
  if "turns" in record and len(example.images) > run.data.images_per_row:
    problems.append(TOO_MANY_IMAGES)
  limit = run.data.max_image_pixels
  shown = tuple(
    Turn(turn["role"], tuple(_item(item, encoder, limit) for item in turn["content"]))
    for turn in turns
  )
  pictures = [item for turn in shown for item in turn.items if isinstance(item, ShownPicture)]
  problems += [picture.problem for picture in pictures if picture.problem]
  return ShownRecord(
    number,
    record["id"],
    *(str(record.get(key, "")) for key in ("source", "license", "credit")),
    turns=shown,
    num_positions=len(example),
    trained=int(example.loss_mask.sum()),
    problems=tuple(problems),
  )


def _item(item: dict[str, Any], encoder: Encoder, max_pixels: int) -> Text | ShownPicture:
  if "text" in item:
    return Text(item["text"], len(encoder.tokenizer.encode(item["text"])))
  num_positions, data = len(encoder.image_ids), item["image"]
  about = f"{len(data) / 1000:,.1f} kB"
  (height, width), kind = read_header(data)
  scale = min(1.0, LONGEST_SIDE / max(height, width))
  size = max(1, round(height * scale)), max(1, round(width * scale))
  try:
    pixels = decode_image(data, size, max_pixels=max_pixels)
  except ImageError as e:
    return ShownPicture(None, about, num_positions, e.reason)
  return ShownPicture(pixels, f"{width} by {height} {kind}, {about}", num_positions, "")
