# SPDX-License-Identifier: Apache-2.0
"""Documents: OBELICS' and MMC4's web pages with pictures, and plain text."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from mm1_jax.config import ConfigError
from mm1_jax.data.build import containers, conversations, files, tables
from mm1_jax.data.build.options import BuildOptions
from mm1_jax.data.build.rows import (
  HEADER_FIELDS,
  NAMELESS,
  FilePart,
  Image,
  Row,
  RowError,
  Skipped,
  field,
  header,
  optional,
  picture,
  whole_number,
)
from mm1_jax.data.sources import Record

NO_TEXT = "text that is null or of another type"
NEITHER = "place with neither a text nor an image"
BOTH = "place with both a text and an image"

# --- files of rows: JSON or Parquet, whatever they are called


def row_parts(file: FilePart, options: BuildOptions) -> list[FilePart]:
  """Returns the parts of a file by its content and not by its name."""
  kind = files.kind_of(file.path, options.bounds)
  if kind == containers.PARQUET:
    return tables.split_parquet(file, options.rows_per_shard)
  if kind:
    return [dataclasses.replace(file, error=containers.refusal(kind))]
  if files.suffix(file.path) == ".parquet" and not files.looks_like_json(file.path):
    return tables.split_parquet(file, options.rows_per_shard)  # damaged: it tells how
  marks = fields(options)[0]
  return files.split_json(file, options.rows_per_shard, options.bounds, marks)


def rows(part: FilePart, options: BuildOptions) -> Iterator[Row]:
  if part.layout != tables.PARQUET:
    return files.json_rows(part, options.bounds)
  marks, others = fields(options)
  return tables.parquet_rows(part, (*HEADER_FIELDS, *marks, *others), options.bounds)


def fields(options: BuildOptions) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Returns the fields of which each row of a format has one, and its others."""
  return {
    "llava": (conversations.TURNS, conversations.IMAGES),
    "obelics": (("texts",), ("images", "metadata", "general_metadata")),
    "mmc4": (("text_list",), ("image_info",)),
    "text": ((options.text_field,), ()),
  }[options.format]


# --- OBELICS


def obelics_records(row: Any, default_id: str, options: BuildOptions) -> Iterator[Record | Skipped]:
  """Yields the record of a page: at each place of the parallel lists a text or a picture.

  An odd place is left out alone.
  """
  texts, images = field(row, "texts", list), field(row, "images", list)
  if len(texts) != len(images):
    raise RowError("'texts' and 'images' are not of one length")
  content: list[dict[str, Any]] = []
  for text, image in zip(texts, images, strict=True):
    if image is not None:
      content.append({"image": _fetchable(image) if text is None else Image(problem=BOTH)})
    if text is not None:
      if isinstance(text, str):
        content.append({"text": text})
      else:
        yield Skipped(NO_TEXT)
    elif image is None:
      yield Skipped(NEITHER)
  facts = {**_page(row.get("general_metadata")), **{k: v for k, v in row.items() if v is not None}}
  yield {**header(facts, default_id, options), "content": content}


def _fetchable(value: Any) -> Image:
  """Returns the picture of a cell; an odd cell is a picture that is lost."""
  try:
    return picture(value)
  except RowError as e:
    return Image(problem=e.reason)


def _page(metadata: Any) -> dict[str, Any]:
  """Returns the page's URL from OBELICS' JSON; it is only credit, so damage is ignored."""
  try:
    value = files.parse_json(metadata.encode()) if isinstance(metadata, str) else {}
  except (RowError, UnicodeEncodeError):
    return {}
  return {"url": value.get("url")} if isinstance(value, dict) else {}


# --- MMC4


def mmc4_records(row: Any, default_id: str, options: BuildOptions) -> Iterator[Record | Skipped]:
  """Yields the record of a page: each picture before the sentence it was matched to.

  A picture that is matched to none is lost, and a sentence that is no text left out.
  """
  sentences = field(row, "text_list", list)
  places: dict[int, list[Image]] = {}
  for info in optional(row, "image_info", list) or []:
    index, image = _matched(info, len(sentences))
    places.setdefault(index, []).append(image)
  content: list[dict[str, Any]] = []
  for i, sentence in enumerate([*sentences, ""]):
    content += [{"image": image} for image in places.get(i, ())]
    if not isinstance(sentence, str):
      yield Skipped(NO_TEXT)
    elif content and "text" in content[-1]:
      content[-1] = {"text": f"{content[-1]['text']} {sentence}"}
    else:
      content.append({"text": sentence})
  yield {**header(row, default_id, options), "content": content}


def _matched(info: Any, num_sentences: int) -> tuple[int, Image]:
  """Returns the sentence of a picture, and the picture; after all of them one that is lost."""
  if not isinstance(info, dict):
    return num_sentences, Image(problem="an entry of 'image_info' is no object")
  index = whole_number(info.get("matched_text_index"))
  if index is None or not 0 <= index < num_sentences:
    return num_sentences, Image(problem="'matched_text_index' is not in 'text_list'")
  url, name = (v if isinstance(v := info.get(k), str) else "" for k in ("raw_url", "image_name"))
  if not name and not url:
    return num_sentences, Image(problem=NAMELESS)
  return index, Image(name, url)


# --- text

_JSON = (".json", ".jsonl", ".ndjson")
_ROWS = (*_JSON, ".parquet")


def text_parts(file: FilePart, options: BuildOptions) -> list[FilePart]:
  """Parts by what the file is: of rows, or of text, which only a name ending in .txt tells.

  Raises:
    ConfigError: it is of no known kind.
  """
  kind = files.suffix(file.path)
  found = files.kind_of(file.path, options.bounds)
  if found or kind in _ROWS or (kind != ".txt" and files.looks_like_json(file.path)):
    return row_parts(file, options)
  if kind == ".txt":
    return [dataclasses.replace(file, rows=options.rows_per_shard if options.txt_split else 1)]
  raise ConfigError(
    f"{file.path}: text is read from .txt, .parquet, {', '.join(_JSON)} and those with .gz, .zst, "
    f".bz2 or .xz. Correct --input, or rename the file."
  )


def text_rows(part: FilePart, options: BuildOptions) -> Iterator[Row]:
  """Yields rows with the text under `--text-field`."""
  if part.layout:
    return rows(part, options)
  return files.text_rows(part.path, options.txt_split, options.text_field, options.bounds)


def text_records(row: Any, default_id: str, options: BuildOptions) -> Iterator[Record]:
  """Yields the record of a text."""
  text = field(row, options.text_field, str | bytes)
  content = [{"text": files.parse_text(text) if isinstance(text, bytes) else text}]
  yield {**header(row, default_id, options), "content": content}
