# SPDX-License-Identifier: Apache-2.0
"""Pictures with captions: COCO's JSON, TFDS sets. A record is `[image, text]`."""

import dataclasses
import functools
import io
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from mm1_jax.config import ConfigError
from mm1_jax.data.build import files
from mm1_jax.data.build.bounds import Bounds
from mm1_jax.data.build.options import BuildOptions
from mm1_jax.data.build.rows import (
  BrokenFile,
  FilePart,
  Image,
  Row,
  RowError,
  field,
  header,
  missing,
  optional,
  text_of,
)
from mm1_jax.data.sources import DataError, Record

# --- COCO


class Coco(NamedTuple):
  """A captions file, looked up."""

  annotations: list
  images: dict  # by id
  licenses: dict  # names by id
  uncaptioned: list  # ids


def coco_parts(file: FilePart, options: BuildOptions) -> list[FilePart]:
  """Ranges of annotations; the file is a join, and read whole."""
  try:
    coco = _read_coco(file, options)
  except BrokenFile as e:
    return [dataclasses.replace(file, error=e.reason, cause=e.cause)]
  return _ranges(file, len(coco.annotations), options)


def coco_rows(part: FilePart, options: BuildOptions) -> Iterator[Row]:
  """Yields annotations with their image's entry; in the first part, images without any too."""
  coco = _read_coco(part, options)
  for i in range(part.start, part.stop):
    annotation = coco.annotations[i]
    image = _look_up(coco.images, annotation, "image_id")
    license = _look_up(coco.licenses, image, "license")
    value = {"annotation": annotation, "image": image, "license": license}
    yield Row(part.path, f"annotation {i}", value)
  if part.start == 0:
    for image_id in coco.uncaptioned:
      yield Row(part.path, f"image {image_id}", None, error="image without a caption")


def coco_records(row: Any, default_id: str, options: BuildOptions) -> Iterator[Record]:
  """Yields the record of one caption; an image with five captions has five."""
  text = text_of(optional(row["annotation"], "caption", str | int | float))
  if text is None:
    raise RowError("no caption", missing(row["annotation"], ("caption",)))
  if row["image"] is None:
    raise RowError("caption of an image that is not listed")
  name = field(row["image"], "file_name", str)
  url = optional(row["image"], "coco_url", str) or ""
  facts = {
    "id": row["annotation"].get("id"),
    "license": row["license"],
    "credit": row["image"].get("flickr_url") or url,
  }
  image = Image(name=name, url=url)
  yield {**header(facts, default_id, options), "content": [{"image": image}, {"text": text}]}


def _read_coco(file: FilePart, options: BuildOptions) -> Coco:
  """Returns a parsed file; the last one is kept, for the next range of it."""
  return _read_coco_once(file.path, file.size, file.mtime, options.bounds)


@functools.lru_cache(1)
def _read_coco_once(path: str, _size: int, _mtime: float, bounds: Bounds) -> Coco:
  raw = files.read_whole(path, bounds)
  try:
    value = files.parse_json(raw)
    annotations, listed = field(value, "annotations", list), field(value, "images", list)
    licenses = optional(value, "licenses", list) or []
  except RowError as e:
    raise BrokenFile(e.reason, e.found) from e
  images = _by_id(listed)
  captioned = {
    a["image_id"] for a in annotations if isinstance(a, dict) and _is_id(a.get("image_id"))
  }
  names = {id: license.get("name", "") for id, license in _by_id(licenses).items()}
  return Coco(annotations, images, names, [i for i in images if i not in captioned])


def _by_id(entries: list) -> dict:
  return {e["id"]: e for e in entries if isinstance(e, dict) and _is_id(e.get("id"))}


def _look_up(table: dict, row: Any, name: str) -> Any:
  """Returns what `row[name]` is the id of; None if there is no such thing."""
  id = row.get(name) if isinstance(row, dict) else None
  return table.get(id) if _is_id(id) else None


def _is_id(value: Any) -> bool:
  return isinstance(value, int | float | str)  # 1 and 1.0 are one key


# --- TFDS


def tfds_parts(options: BuildOptions) -> list[FilePart]:
  """Ranges of a set's examples.

  Raises:
    DataError: there is no such set, or not in a form that can be read at random.
    ConfigError: it lacks a feature.
  """
  data = _tfds(options.input, options.split, options.data_dir, options.image_feature)
  for flag in ("image_feature", "text_feature"):
    path = getattr(options, flag)
    feature: Any = data.dataset_info.features
    for name in path.split(".") if path else ():
      feature = getattr(feature, "feature", feature)  # of a sequence
      if not hasattr(feature, "keys") or name not in feature:
        raise ConfigError(f"--{flag}={path}: {options.input} has {data.dataset_info.features}.")
      feature = feature[name]
  info, size = data.dataset_info, len(data)
  name = f"{info.full_name.replace('/', '-')}-{options.split}"
  whole = FilePart(name, int(info.splits[options.split].num_bytes), mtime=0)
  return _ranges(whole, size, options)


def tfds_rows(part: FilePart, options: BuildOptions) -> Iterator[Row]:
  """Yields examples as TFDS decodes them, pictures left as they are."""
  data = _tfds(options.input, options.split, options.data_dir, options.image_feature)
  for i in range(part.start, part.stop):
    place = f"example {i}"
    try:
      yield Row(part.path, place, data[i])
    except Exception as e:  # whatever TFDS, its features or its files raise at one example
      yield Row(part.path, place, None, error=f"TFDS cannot read it ({type(e).__name__})")


def tfds_records(row: Any, default_id: str, options: BuildOptions) -> Iterator[Record]:
  """Yields a record for each text of an example, all with the same pictures."""
  images = [{"image": Image(data=_bytes(v))} for v in _values(row, options.image_feature)]
  if options.image_feature and not images:
    raise RowError("no image")
  texts = [files.parse_text(v) for v in _values(row, options.text_feature)]
  if options.text_feature and not texts:
    raise RowError("no text")
  facts = header({}, default_id, options)
  for i, text in enumerate(texts or [""]):
    content = [*images, {"text": text}] if text else images
    id = f"{facts['id']}/{i}" if len(texts) > 1 else facts["id"]
    yield {**facts, "id": id, "content": content}


@functools.lru_cache(1)
def _tfds(name: str, split: str, data_dir: str, image_feature: str) -> Any:
  import tensorflow_datasets as tfds  # seconds, and only this format needs it
  from tensorflow_datasets.core import read_only_builder

  decoders: Any = tfds.decode.SkipDecoding() if image_feature else None
  for part in reversed(image_feature.split(".") if image_feature else []):
    decoders = {part: decoders}
  where: Any = {"data_dir": data_dir} if data_dir else {}
  try:
    try:  # what is prepared needs none of the code that prepared it, which may need TensorFlow
      builder = read_only_builder.builder_from_files(name, **where)
    except tfds.core.DatasetNotFoundError:
      builder = tfds.builder(name, **where)
    return builder.as_data_source(split, decoders=decoders)  # pyright: ignore[reportCallIssue]
  except Exception as e:  # TFDS raises its own, ValueError, NotImplementedError, ...
    first_line = str(e).strip().partition("\n")[0] or type(e).__name__
    raise DataError(
      f"--input={name}: TFDS has no split '{split}' of it that can be read at random "
      f"({first_line}). Prepare it with "
      f"tfds.builder('{name}', file_format='array_record').download_and_prepare(), and give "
      f"--data-dir if it is not in ~/tensorflow_datasets."
    ) from e


def _ranges(whole: FilePart, num_rows: int, options: BuildOptions) -> list[FilePart]:
  """Returns parts of `rows_per_shard` rows; one if there are none."""
  cuts = [*range(0, num_rows, options.rows_per_shard), num_rows] if num_rows else [0, 0]
  return [
    dataclasses.replace(whole, start=start, stop=stop, rows=stop - start)
    for start, stop in itertools.pairwise(cuts)
  ]


def _values(row: Any, path: str) -> list:
  """Returns the value at a dotted path; all of its elements if it is a list."""
  if not path:
    return []
  value = row
  for name in path.split("."):
    value = [v[name] for v in value] if isinstance(value, list) else value[name]
  return list(value) if isinstance(value, list | tuple) or hasattr(value, "shape") else [value]


def _bytes(value: Any) -> bytes:
  if isinstance(value, io.BytesIO):
    return value.getvalue()
  if not isinstance(value, bytes):
    raise RowError("image feature is not encoded")
  return value
