# SPDX-License-Identifier: Apache-2.0
"""Documents: OBELICS' and MMC4's web pages with pictures, and plain text."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from mm1_jax.config import ConfigError
from mm1_jax.data.build import files, tables
from mm1_jax.data.build.options import BuildOptions
from mm1_jax.data.build.rows import FilePart, Image, Row, RowError, field, header, optional
from mm1_jax.data.sources import Record

HEADER_FIELDS = ("id", "source", "license", "credit", "url")

# --- OBELICS

_OBELICS = (*HEADER_FIELDS, "texts", "images", "metadata", "general_metadata")


def obelics_parts(file: FilePart, options: BuildOptions) -> list[FilePart]:
  return tables.split_parquet(file, options.rows_per_shard)


def obelics_rows(part: FilePart, options: BuildOptions) -> Iterator[Row]:
  return tables.parquet_rows(part, _OBELICS, options.bounds)


def obelics_records(row: Any, default_id: str, options: BuildOptions) -> Iterator[Record]:
  """Yields the record of a page: at each place of the parallel lists a text or a picture."""
  texts, images = field(row, "texts", list), field(row, "images", list)
  if len(texts) != len(images):
    raise RowError("'texts' and 'images' are not of one length")
  content = []
  for text, image in zip(texts, images, strict=True):
    if (text is None) == (image is None):
      raise RowError("a place with both a text and an image, or neither")
    content.append({"text": text} if image is None else {"image": _obelics_image(image)})
  facts = {**_page(row.get("general_metadata")), **{k: v for k, v in row.items() if v is not None}}
  yield {**header(facts, default_id, options), "content": content}


def _obelics_image(value: Any) -> Image:
  """Returns a picture that is a URL, or, as Hugging Face embeds them, a dict of bytes and path."""
  if isinstance(value, str):
    return Image(url=value)
  if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
    return Image(data=value["bytes"], name=value.get("path") or "")
  raise RowError("an image is neither a URL nor bytes")


def _page(metadata: Any) -> dict[str, Any]:
  """Returns the page's URL from OBELICS' JSON; it is only credit, so damage is ignored."""
  try:
    value = files.parse_json(metadata.encode()) if isinstance(metadata, str) else {}
  except (RowError, UnicodeEncodeError):
    return {}
  return {"url": value.get("url")} if isinstance(value, dict) else {}


# --- MMC4


def json_parts(file: FilePart, options: BuildOptions) -> list[FilePart]:
  return files.split_json(file, options.rows_per_shard, options.bounds)


def json_rows(part: FilePart, options: BuildOptions) -> Iterator[Row]:
  return files.json_rows(part, options.bounds)


def mmc4_records(row: Any, default_id: str, options: BuildOptions) -> Iterator[Record]:
  """Yields the record of a page: each picture before the sentence it was matched to."""
  sentences = field(row, "text_list", list)
  if not all(isinstance(s, str) for s in sentences):
    raise RowError("'text_list' is not of texts")
  places: dict[int, list[Image]] = {}
  for info in field(row, "image_info", list):
    index = field(info, "matched_text_index", int)
    if not 0 <= index < len(sentences):
      raise RowError("'matched_text_index' is not in 'text_list'")
    url = optional(info, "raw_url", str) or ""
    name = optional(info, "image_name", str) or ""
    if not name and not url:
      raise RowError("'image_name' and 'raw_url' are missing")
    places.setdefault(index, []).append(Image(name, url))
  content: list[dict[str, Any]] = []
  for i, sentence in enumerate(sentences):
    content += [{"image": image} for image in places.get(i, ())]
    if content and "text" in content[-1]:
      content[-1] = {"text": f"{content[-1]['text']} {sentence}"}
    else:
      content.append({"text": sentence})
  yield {**header(row, default_id, options), "content": content}


# --- text

_JSON = (".json", ".jsonl", ".ndjson")


def text_parts(file: FilePart, options: BuildOptions) -> list[FilePart]:
  """Parts by what the file's name says it is.

  Raises:
    ConfigError: it is of no known kind.
  """
  kind = files.suffix(file.path)
  if kind in _JSON:
    return files.split_json(file, options.rows_per_shard, options.bounds)
  if kind == ".parquet":
    return tables.split_parquet(file, options.rows_per_shard)
  if kind == ".txt":
    return [dataclasses.replace(file, rows=options.rows_per_shard if options.txt_split else 1)]
  raise ConfigError(
    f"{file.path}: text is read from .txt, .parquet, {', '.join(_JSON)} and those with .gz or "
    f".zst. Correct --input, or rename the file."
  )


def text_rows(part: FilePart, options: BuildOptions) -> Iterator[Row]:
  """Yields rows with the text under `--text-field`."""
  kind = files.suffix(part.path)
  if kind in _JSON:
    yield from files.json_rows(part, options.bounds)
  elif kind == ".parquet":
    columns = (*HEADER_FIELDS, options.text_field)
    yield from tables.parquet_rows(part, columns, options.bounds)
  else:
    split, name = options.txt_split, options.text_field
    yield from files.text_rows(part.path, split, name, options.bounds)


def text_records(row: Any, default_id: str, options: BuildOptions) -> Iterator[Record]:
  """Yields the record of a text."""
  text = field(row, options.text_field, str | bytes)
  content = [{"text": files.parse_text(text) if isinstance(text, bytes) else text}]
  yield {**header(row, default_id, options), "content": content}
