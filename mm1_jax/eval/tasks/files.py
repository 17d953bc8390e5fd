# SPDX-License-Identifier: Apache-2.0
"""Official files: found by name, read whole, and turned into items with one error for each fault.

Pictures beside a file are only named here; `read_picture` reads one when a prompt is made.
"""

import base64
import codecs
import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from etils import epath

from mm1_jax import extras, parquet, untrusted
from mm1_jax.eval.task import EvalError, Item, Picture

T = TypeVar("T")
Row = Mapping[str, Any]

MAX_FILE_BYTES = 8 << 30  # files are read whole; SEED's TSV, the largest, is about 2 GiB
MAX_PICTURE_BYTES = 64 << 20
MAX_PAGE_BYTES = 1 << 30  # of Parquet, decompressed
MAX_TEXT = 1_000_000  # characters of a question, an answer or a choice
MAX_FIELD = 4 * MAX_PICTURE_BYTES // 3 * 8  # of a TSV: several pictures as base64


# --- Finding ---


def choose(table: Mapping[str, T], split: str) -> T:
  """Returns what a table has for a split.

  Raises:
    EvalError: there is no such split.
  """
  if split not in table:
    raise EvalError(f"there is no split '{split}'; there are: {', '.join(table)}.")
  return table[split]


def find_all(folder: epath.Path, names: Sequence[str], source: str) -> list[epath.Path]:
  """Returns the files of the first of `names` that is there; a name may be a glob.

  Raises:
    EvalError: none is, with the official names and where the files come from.
  """
  try:
    for name in names:
      if found := sorted(epath.Path(folder).glob(name)):
        return found
  except OSError as e:
    raise EvalError(f"'{folder}' cannot be listed ({e}).") from e
  raise EvalError(
    f"'{folder}' has no {' or '.join(names)}. Download it from {source}, unpack it there, and keep "
    f"its official name."
  )


def find(folder: epath.Path, names: Sequence[str], source: str) -> epath.Path:
  """Returns the first file of `find_all`."""
  return find_all(folder, names, source)[0]


def below(folder: epath.Path, *names: str) -> epath.Path:
  """Returns the first subfolder that is there, else the folder: where pictures are unpacked."""
  return next((folder / name for name in names if (folder / name).is_dir()), folder)


def coco_pictures(folder: epath.Path, part: str) -> epath.Path:
  """Returns where COCO's pictures are: several benchmarks may share those beside their folders."""
  places = (epath.Path(folder), epath.Path(folder).parent)
  found = (place / name for place in places for name in (part, f"images/{part}"))
  return next((place for place in found if place.is_dir()), folder)


# --- Reading ---


def read_json(path: epath.Path) -> Any:
  """Returns the value of a JSON file.

  Raises:
    EvalError: it cannot be read, is no JSON, is cut off, or an object has a key twice.
  """
  return untrusted.parse_json(read_bytes(path), f"'{path}'", EvalError, unique=True)


def read_list(path: epath.Path, key: str) -> list[Any]:
  """Returns the list at the key of a JSON file's object."""
  value = read_json(path)
  if not isinstance(value, dict) or not isinstance(value.get(key), list):
    raise EvalError(f"'{path}' is not of the form of its benchmark: it has no list '{key}'.")
  return value[key]


def read_rows(path: epath.Path) -> list[Any]:
  """Returns the rows of a file: JSON lines, a JSON list, Parquet, TSV or CSV, by its suffix."""
  suffix = path.suffix.lower()
  if suffix == ".parquet":
    return list(_parquet(path))
  if suffix in (".tsv", ".csv"):
    return _table(path, "\t" if suffix == ".tsv" else ",")
  data = read_bytes(path)
  if data.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
    return untrusted.parse_json(data, f"'{path}'", EvalError, unique=True)
  lines = [(n, line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]
  return [
    untrusted.parse_json(line, f"'{path}', line {n},", EvalError, unique=True) for n, line in lines
  ]


def read_text(path: epath.Path) -> str:
  return _decode(read_bytes(path), f"'{path}'")


def read_pickle(path: epath.Path) -> Any:
  """Returns the value of a pickle of lists, dicts, texts and numbers.

  Raises:
    EvalError: it is none, or asks for anything else: a pickle may ask for any program to be run.
  """
  return untrusted.load_pickle(read_bytes(path), f"'{path}'", EvalError)


def read_bytes(path: epath.Path) -> bytes:
  return untrusted.read_bytes(path, EvalError, most=MAX_FILE_BYTES)


def _decode(data: bytes, what: str) -> str:
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as e:
    raise EvalError(f"{what} is not UTF-8 (byte {e.start}).") from e


def _table(path: epath.Path, delimiter: str) -> list[dict[str, str]]:
  text = _decode(read_bytes(path), f"'{path}'")
  csv.field_size_limit(MAX_FIELD)
  reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
  try:
    header = next(reader, [])
    rows = [row for row in reader if row]
  except csv.Error as e:
    raise EvalError(f"'{path}', line {reader.line_num}: {e}.") from e
  for number, row in enumerate(rows, 1):
    if len(row) != len(header):
      raise EvalError(f"'{path}', row {number} has {len(row)} fields; the header, {len(header)}.")
  return [dict(zip(header, row, strict=True)) for row in rows]


def _parquet(path: epath.Path) -> Iterator[dict[str, Any]]:
  extras.require("eval")
  import pyarrow as pa
  import pyarrow.parquet as pq

  try:
    parquet.check(path, MAX_PAGE_BYTES)
    with path.open("rb") as file, pq.ParquetFile(file) as table:
      for batch in table.iter_batches(batch_size=64):  # with their pictures
        yield from batch.to_pylist()
  except (pa.ArrowException, OSError, ValueError) as e:
    raise EvalError(f"'{path}' cannot be read as Parquet ({e}).") from e


# --- Items ---


def items(path: epath.Path, rows: Iterable[T], make: Callable[[T], Iterable[Item]]) -> list[Item]:
  """Returns what `make` yields for each row of a file: none, one or several items.

  Raises:
    EvalError: a row is not of the benchmark's form, two items have one id, or there is no item.
  """
  found: dict[str, Item] = {}
  for number, row in enumerate(rows, 1):
    try:
      for item in make(row):
        _check(item)
        if item.id in found:
          raise EvalError(f"the id '{item.id}' is there twice")
        found[item.id] = item
    except EvalError as e:
      raise EvalError(f"'{path}', entry {number}: {str(e).rstrip('.')}.") from e
    except untrusted.STRAY as e:
      raise EvalError(
        f"'{path}', entry {number} is not of the form of its benchmark ({untrusted.why(e)})."
      ) from e
  if not found:
    raise EvalError(f"'{path}' has no item of this split.")
  return list(found.values())


def all_items(
  paths: Iterable[epath.Path],
  rows: Callable[[epath.Path], Iterable[T]],
  make: Callable[[T], Iterable[Item]],
) -> list[Item]:
  """Returns the items of several files, whose ids must differ too."""
  found: dict[str, Item] = {}
  for path in paths:
    for item in items(path, rows(path), make):
      if item.id in found:
        raise EvalError(f"'{path}': the id '{item.id}' is in another file, too.")
      found[item.id] = item
  return list(found.values())


def _check(item: Item) -> None:
  texts = [item.id, item.question, *item.answers, *item.choices]
  if wrong := [text for text in texts if not untrusted.is_text(text)]:
    wrong_text = untrusted.shown(wrong[0])
    raise EvalError(f"id, question, answers and choices are texts, and this is not: {wrong_text}")
  if any(len(text) > MAX_TEXT for text in texts):
    raise EvalError(f"a text is longer than {MAX_TEXT:,} characters")
  if not item.id:
    raise EvalError("it has no id")
  if item.choices and item.answers and not 0 <= item.right < len(item.choices):
    raise EvalError(f"the right choice is number {item.right} of {len(item.choices)}")


def grouped(path: epath.Path, rows: Iterable[Any], key: str) -> dict[Any, list[Any]]:
  """Returns the rows of a file by their value of `key`.

  Raises:
    EvalError: a row has none.
  """
  found: dict[Any, list[Any]] = {}
  for number, row in enumerate(rows, 1):
    try:
      found.setdefault(row[key], []).append(row)
    except untrusted.STRAY as e:
      raise EvalError(
        f"'{path}', entry {number} is not of the form of its benchmark ({untrusted.why(e)})."
      ) from e
  return found


def letter_index(letter: str, choices: Sequence[str]) -> int:
  """Returns the index of a choice by its letter.

  Raises:
    EvalError: it is none of the choices' letters.
  """
  index = ord(letter) - ord("A") if len(letter) == 1 else -1
  if not 0 <= index < len(choices):
    raise EvalError(f"the answer {letter!r} is none of the letters of {len(choices)} choices")
  return index


# --- Pictures ---


def picture(folder: epath.Path, name: str) -> epath.Path:
  """Returns the path of a picture, which need not be there yet.

  Raises:
    EvalError: the name leaves the folder.
  """
  parts = epath.Path(name).parts if name else ()
  if not parts or name.startswith(("/", "\\")) or "://" in name or ".." in parts or "\0" in name:
    raise EvalError(f"the picture '{name}' is not in the folder '{folder}'; put it there")
  return folder / name


def decode(text: str) -> bytes:
  """Returns a picture from base64.

  Raises:
    EvalError: it is none, or too large.
  """
  if len(text) > MAX_PICTURE_BYTES * 4 // 3 + 4:
    raise EvalError(f"a picture has more than {MAX_PICTURE_BYTES:,} bytes")
  try:
    return base64.b64decode("".join(text.split()), validate=True)
  except ValueError as e:
    raise EvalError("its picture is not base64") from e


def embedded(value: Any) -> bytes:
  """Returns a picture in a Parquet file: {"bytes": ..., "path": ...}."""
  data = value["bytes"]
  if not isinstance(data, bytes):
    raise EvalError("its picture is not in the file")
  if len(data) > MAX_PICTURE_BYTES:
    raise EvalError(f"a picture has more than {MAX_PICTURE_BYTES:,} bytes")
  return data


def read_picture(picture: Picture, item: Item) -> bytes:
  """Returns an encoded picture's bytes.

  Raises:
    EvalError: its file is missing, cannot be read or is too large.
  """
  if isinstance(picture, bytes):
    return picture
  try:
    if picture.stat().length > MAX_PICTURE_BYTES:
      raise EvalError(f"'{picture}' of item '{item.id}' has more than {MAX_PICTURE_BYTES:,} bytes.")
    return picture.read_bytes()
  except FileNotFoundError as e:
    raise EvalError(
      f"the picture '{picture}' of item '{item.id}' is missing: download the benchmark's pictures "
      f"too, and unpack them beside its questions."
    ) from e
  except OSError as e:
    raise EvalError(f"'{picture}' of item '{item.id}' cannot be read ({e}).") from e
