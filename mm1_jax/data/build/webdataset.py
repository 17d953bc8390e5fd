# SPDX-License-Identifier: Apache-2.0
"""Pictures with captions in tars, as WebDataset and img2dataset write them, or in Parquet.

A sample is the members of one key: the name up to the first dot of its last part. What follows is
the ending, whose last part tells what the member is: `a.jpg` and `a.input.jpg` are pictures.
Members of a sample are neighbours, or else they wait for each other.
"""

import collections
import dataclasses
import itertools
import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from mm1_jax import untrusted
from mm1_jax.data.build import containers, files, tables, tars
from mm1_jax.data.build.images import SUFFIXES
from mm1_jax.data.build.options import BuildOptions
from mm1_jax.data.build.rows import (
  HEADER_FIELDS,
  BrokenFile,
  FilePart,
  Image,
  Row,
  RowError,
  Skipped,
  clean,
  header,
  missing,
  optional,
  picture,
  text_of,
)
from mm1_jax.data.sources import Record

TWICE = "two members of one name"
NO_DATA = "member too large or no regular file"
NO_IMAGE, NO_CAPTION = "no image", "no caption"
FAR_APART = "picture and caption too far apart in a compressed tar"
# Of a row of Parquet, and of a sample's .json.
_IMAGES, _CAPTIONS = ("image", "jpg", "png", "webp"), ("caption", "text", "txt")
_TEXTS = ("txt", "text", "caption")  # endings
_NAME = re.compile(r"^((?:.*/)?[^.]+)\.([^/]*)$", re.DOTALL)  # as WebDataset splits names

Sample = dict[str, "Member"]  # by ending


class Member(NamedTuple):
  """A file of a tar; `data` is None if it is of no use here, too large, or to be read later."""

  name: str
  ending: str
  data: bytes | None
  place: tuple[int, int]  # in the tar: offset and size
  problem: str = ""

  @property
  def kind(self) -> str:
    """What it is, by the last part of its ending: "image", "text", "json" or ""."""
    last = self.ending.rpartition(".")[2]
    if f".{last}" in SUFFIXES:
      return "image"
    return "text" if last in _TEXTS else "json" if last == "json" else ""


def parts(file: FilePart, options: BuildOptions) -> list[FilePart]:
  """A tar is read whole, and becomes a shard; Parquet is cut between row groups."""
  kind = files.kind_of(file.path, options.bounds)
  if kind == containers.PARQUET:
    return tables.split_parquet(file, options.rows_per_shard)
  if kind not in (containers.TAR, ""):
    return [dataclasses.replace(file, error=containers.refusal(kind))]
  return [dataclasses.replace(file, rows=options.rows_per_shard)]


def rows(part: FilePart, options: BuildOptions) -> Iterator[Row | Skipped]:
  """Yields samples as dicts of their members by ending, in the order in which they are whole."""
  if part.layout == tables.PARQUET:
    yield from tables.parquet_rows(part, (*HEADER_FIELDS, *_IMAGES, *_CAPTIONS), options.bounds)
    return
  broken: list[BrokenFile] = []
  waiting = _Waiting(part.path, options)
  for key, members in itertools.groupby(_members(part.path, options, broken), key=_sample_key):
    if key is None:
      yield from (Skipped(containers.LITTER) for _ in members)
      continue
    sample = waiting.take(key, members)
    if _is_whole(sample):
      yield Row(part.path, clean(key), waiting.filled(sample))
    else:
      waiting.add(key, sample)
  for key, sample in waiting.left():
    yield Row(part.path, clean(key), sample)
  if broken:
    raise broken[0]


def records(row: Any, default_id: str, options: BuildOptions) -> Iterator[Record]:
  """Yields the record of a sample; its .json tells id, URL and licence, if there is one.

  A sample of several pictures whose endings have several parts is several: `a.1.jpg` with
  `a.1.txt`, and `a.2.jpg` with `a.2.txt`.
  """
  if not all(isinstance(member, Member) for member in row.values()):
    yield _of_table(row, default_id, options)
    return
  for name, sample in _split(row).items():
    yield _of_members(sample, f"{default_id}.{name}" if name else default_id, options)


def _of_members(sample: Sample, default_id: str, options: BuildOptions) -> Record:
  for member in sample.values():
    if member.problem:
      raise RowError(member.problem, member.name)
  images, texts, facts = (_one(sample, kind) for kind in ("image", "text", "json"))
  if images is None:
    raise RowError(NO_IMAGE, _found(sample, "a picture (.jpg, .png, ...)"))
  said = files.parse_json(facts.data or b"") if facts else {}
  if not isinstance(said, dict):
    raise RowError("not an object", untrusted.shown(said))
  url = said.get("url") if isinstance(said.get("url"), str) else ""
  if texts is not None:
    text = files.parse_text(texts.data or b"")
  else:
    text = _caption(said)
    if text is None:
      raise RowError(NO_CAPTION, _found(sample, "a .txt, or 'caption' in a .json"))
  said = {**said, "id": default_id}  # img2dataset's keys are those of other sets too
  image = Image(data=images.data, url=url or "")
  return {**header(said, default_id, options), "content": [{"image": image}, {"text": text}]}


def _of_table(row: dict[str, Any], default_id: str, options: BuildOptions) -> Record:
  """Returns the record of a row with a picture, and a caption beside it."""
  cell = next((row[name] for name in _IMAGES if row.get(name) is not None), None)
  if cell is None:
    raise RowError(NO_IMAGE, missing(row, _IMAGES[:1]))
  text = _caption(row)
  if text is None:
    raise RowError(NO_CAPTION, missing(row, _CAPTIONS))
  content = [{"image": picture(cell)}, {"text": text}]
  return {**header(row, default_id, options), "content": content}


def _caption(facts: Any) -> str | None:
  """Returns the caption among facts; None of one that is null or missing."""
  names = [name for name in _CAPTIONS if optional(facts, name, str | int | float) is not None]
  return text_of(facts[names[0]]) if names else None


def _one(sample: Sample, kind: str) -> Member | None:
  """Returns the member of a kind: if there are several, the one with an ending of one part.

  Raises:
    RowError: that leaves several.
  """
  found = [member for member in sample.values() if member.kind == kind]
  plain = [member for member in found if "." not in member.ending]
  found = plain or found
  if len(found) > 1:
    names = {"image": "several images", "text": "several texts", "json": "several .json"}
    raise RowError(names[kind], ", ".join(clean(member.name)[:100] for member in found[:8]))
  return found[0] if found else None


def _split(sample: Sample) -> dict[str, Sample]:
  """Returns the samples in one, by what their endings begin with; '' if it is one."""
  stems: dict[str, Sample] = {}
  for ending, member in sample.items():
    stems.setdefault(ending.rpartition(".")[0], {})[ending] = member
  kinds = [{member.kind for member in part.values()} for part in stems.values()]
  return stems if len(stems) > 1 and all({"image", "text"} <= k for k in kinds) else {"": sample}


def _found(sample: Sample, wanted: str) -> str:
  endings = ", ".join(f".{clean(ending)[:40]}" for ending in list(sample)[:8])
  return f"its members are {endings}; looked for {wanted}"


# --- members, and samples whose members are apart


def _members(path: str, options: BuildOptions, broken: list[BrokenFile]) -> Iterator[Member]:
  """Yields the files of a tar; where it breaks off they end, and `broken` has the reason."""
  max_image = int(options.max_image_mb * 1e6)

  def wanted(info: tarfile.TarInfo) -> bool:
    if containers.is_litter(info.name):
      return False
    kind = Member(info.name, _split_name(info.name)[1], None, (0, 0)).kind
    return bool(kind) and info.size <= (max_image if kind == "image" else options.bounds.row)

  try:
    for info, data in tars.tar_members(path, wanted, options.bounds):
      place = info.offset_data, info.size
      member = Member(info.name, _split_name(info.name)[1], data, place)
      useful = member.kind and not containers.is_litter(info.name)
      yield member._replace(problem=NO_DATA) if useful and data is None else member
  except BrokenFile as e:
    broken.append(e)


def _split_name(name: str) -> tuple[str, str]:
  match = _NAME.match(name)
  return (match[1], match[2].lower()) if match else (name, "")


def _sample_key(member: Member) -> str | None:
  """Returns the key of a member's sample; None of what an operating system added."""
  return None if containers.is_litter(member.name) else _split_name(member.name)[0]


def _is_whole(sample: Sample) -> bool:
  kinds = {member.kind for member in sample.values()}
  return "image" in kinds and ("text" in kinds or any(map(_has_caption, sample.values())))


def _has_caption(member: Member) -> bool:
  """Returns whether a .json tells the caption; if not, a .txt may follow."""
  if member.kind != "json":
    return False
  try:
    return _caption(files.parse_json(member.data or b"")) is not None
  except RowError:
    return False


class _Waiting:
  """Samples that lack a picture or a caption, which may follow in a tar that is not sorted.

  Above `bounds.held` bytes the data of the first ones is dropped, and read again from its place;
  that of a compressed tar cannot be.
  """

  def __init__(self, path: str, options: BuildOptions):
    self._path = path
    self._bounds = options.bounds
    self._samples: dict[str, Sample] = {}
    self._with_data: collections.deque[Sample] = collections.deque()
    self._held = 0

  def take(self, key: str, members: Iterable[Member]) -> Sample:
    """Returns a sample of what waits for it, and of its members."""
    sample = self._samples.pop(key, {})
    self._held -= _size(sample)
    for member in members:
      twice = member.ending in sample
      sample[member.ending] = member._replace(problem=TWICE) if twice else member
    return sample

  def add(self, key: str, sample: Sample) -> None:
    self._samples[key] = sample
    self._held += _size(sample)
    self._with_data.append(sample)
    while self._held > self._bounds.held:
      first = self._with_data.popleft()
      if first is not self._samples.get(_sample_key(next(iter(first.values()))) or ""):
        continue  # it is whole by now, or is further back with more members
      self._held -= _size(first)
      first.update({ending: member._replace(data=None) for ending, member in first.items()})

  def left(self) -> Iterator[tuple[str, Sample]]:
    for key, sample in self._samples.items():
      yield key, self.filled(sample)

  def filled(self, sample: Sample) -> Sample:
    """Returns a sample with the data that was dropped."""
    dropped = {
      ending: member
      for ending, member in sample.items()
      if member.data is None and member.kind and not member.problem
    }
    if not dropped:
      return sample
    if files.is_compressed(self._path):
      return {**sample, **{e: m._replace(problem=FAR_APART) for e, m in dropped.items()}}
    with files.open_raw(self._path) as stream:
      for ending, member in dropped.items():
        stream.seek(member.place[0])
        sample[ending] = member._replace(data=stream.read(member.place[1]))
    return sample


def _size(sample: Sample) -> int:
  return sum(len(member.data or b"") for member in sample.values())
