# SPDX-License-Identifier: Apache-2.0
"""Counts of a shard, that add up to those of a build."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from mm1_jax.data.sources import Record

MAX_KINDS = 1_000  # of sources and of licences that are counted apart
OTHERS = "(others)"
PERCENTILES = (1, 10, 50, 90, 99)
_STEP = math.log(1.02)  # of a histogram's bins: percentiles are right to a hundredth


class Histogram:
  """Counts of whole numbers, in bins that widen with them."""

  def __init__(self, bins: dict[str, int] | None = None, total: int = 0):
    self.bins = Counter({int(k): v for k, v in (bins or {}).items()})
    self.total = total

  def add(self, value: int) -> None:
    self.bins[1 + round(math.log(value) / _STEP) if value else 0] += 1
    self.total += value

  def merge(self, other: "Histogram") -> None:
    self.bins.update(other.bins)
    self.total += other.total

  def to_dict(self) -> dict[str, Any]:
    return {"bins": {str(k): v for k, v in sorted(self.bins.items())}, "total": self.total}

  def summary(self) -> dict[str, int]:
    """Returns the total and percentiles."""
    return {"total": self.total, **{f"p{p}": self._percentile(p) for p in PERCENTILES}}

  def _percentile(self, percent: int) -> int:
    rank, seen = percent / 100 * self.bins.total(), 0
    for bin, count in sorted(self.bins.items()):
      seen += count
      if seen >= rank:
        return round(math.exp((bin - 1) * _STEP)) if bin else 0
    return 0


@dataclasses.dataclass
class Stats:
  """What a shard holds, and what was left out of it; `rows` is their sum."""

  rows: int = 0
  documents: int = 0
  conversations: int = 0
  images: int = 0
  image_bytes: int = 0
  repeated_ids: int = 0  # of different records; both are kept
  bad: Counter = dataclasses.field(default_factory=Counter)  # rows by reason
  filtered: Counter = dataclasses.field(default_factory=Counter)
  lost_images: Counter = dataclasses.field(default_factory=Counter)  # out of documents, kept or not
  skipped: Counter = dataclasses.field(default_factory=Counter)  # parts of rows, files of tars
  first_bad: dict[str, str] = dataclasses.field(default_factory=dict)  # by reason: place, found
  damaged_files: list[str] = dataclasses.field(default_factory=list)
  sources: Counter = dataclasses.field(default_factory=Counter)
  licenses: Counter = dataclasses.field(default_factory=Counter)
  images_per_record: Counter = dataclasses.field(default_factory=Counter)
  characters: Histogram = dataclasses.field(default_factory=Histogram)
  tokens: Histogram = dataclasses.field(default_factory=Histogram)  # of texts, if asked for

  @property
  def records(self) -> int:
    return self.documents + self.conversations

  def add(self, record: Record, num_tokens: int | None) -> None:
    """Counts a record that is kept."""
    items = content(record)
    images = [item["image"] for item in items if "image" in item]
    self.documents += "content" in record
    self.conversations += "turns" in record
    self.images += len(images)
    self.image_bytes += sum(map(len, images))
    self.images_per_record[str(len(images))] += 1
    _count(self.sources, record["source"])
    _count(self.licenses, record["license"])
    self.characters.add(sum(len(item.get("text", "")) for item in items))
    if num_tokens is not None:
      self.tokens.add(num_tokens)

  def merge(self, other: "Stats") -> None:
    """Adds the counts of another shard."""
    for f in dataclasses.fields(self):
      mine, theirs = getattr(self, f.name), getattr(other, f.name)
      if isinstance(mine, Histogram):
        mine.merge(theirs)
      elif isinstance(mine, Counter):
        for key, count in theirs.items():
          _count(mine, key, count)
      elif isinstance(mine, dict):
        setattr(self, f.name, {**theirs, **mine})
      elif isinstance(mine, list):
        mine += [path for path in theirs if path not in mine]
      else:
        setattr(self, f.name, mine + theirs)

  def to_dict(self) -> dict[str, Any]:
    values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return {k: v.to_dict() if isinstance(v, Histogram) else v for k, v in values.items()}

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> "Stats":
    """Returns what `to_dict` was made of."""
    stats = cls(**values)
    for name, value in values.items():
      if isinstance(value, dict) and name != "first_bad":
        made = Histogram(**value) if name in ("characters", "tokens") else Counter(value)
        setattr(stats, name, made)
    return stats


def content(record: Record) -> list[dict[str, Any]]:
  """Returns the items of a document, or of all turns."""
  if "content" in record:
    return record["content"]
  return [item for turn in record["turns"] for item in turn["content"]]


def texts(record: Record) -> Iterable[str]:
  return (item["text"] for item in content(record) if "text" in item)


def _count(counter: Counter, key: str, count: int = 1) -> None:
  """Counts in bounded memory: licences may be free text."""
  counter[key if key in counter or len(counter) < MAX_KINDS else OTHERS] += count
