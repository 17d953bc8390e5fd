# SPDX-License-Identifier: Apache-2.0
"""Collections of sets in Parquet files: The Cauldron, Mantis-Instruct, SynthDoG.

Pictures in the files are written into a folder, as they are, for `data.build llava --images=`.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.parquet

from mm1_jax import parquet, untrusted
from mm1_jax.data.build.official_documents import READ
from mm1_jax.data.build.official_rows import ROLES, Row, row
from mm1_jax.data.image import read_header
from mm1_jax.data.sources import DataError

MAX_PAGE_BYTES = 1 << 30  # decompressed
ROWS_AT_ONCE = 64  # in memory, with their pictures


def cauldron(*paths: pathlib.Path, pictures: str) -> Iterator[Row]:
  """Parquet files of one subset: `images`, and `texts` with `user` and `assistant`.

  All pictures come first. Subsets of MM1.5's sets are chart2text, datikz, finqa, geomverse,
  hitab, intergps, raven, rendered_text, robut_wikisql, robut_wtq, spot_the_diff, st_vqa, tabmwp,
  tat_qa, vistext, visualmrc, websight and more.
  """
  folder = _empty_folder(pictures)
  for name, value in rows_of(paths):
    images = [_write(folder, f"{name}-{i}", image) for i, image in enumerate(value["images"])]
    yield row(name, images, *((text["user"], text["assistant"]) for text in value["texts"]))


def mantis(*paths: pathlib.Path) -> Iterator[Row]:
  """Mantis-Instruct: `images` by path, and a `conversation` with `<image>` slots.

  MM1.5's sets of several pictures: birds-to-words, coinstruct, dreamsim, iconqa, multi_vqa, nextqa,
  nlvr2, spot-the-diff, star.
  """
  for name, value in rows_of(paths):
    said = [{"from": ROLES[t["role"]], "value": t["content"]} for t in value["conversation"]]
    images = [image["path"] for image in value["images"] or ()]
    yield {"id": str(value.get("id") or name), "image": images, "conversations": said}


def synthdog_parquet(*paths: pathlib.Path, pictures: str) -> Iterator[Row]:
  """SynthDoG's published files: `image`, and `ground_truth` as in `metadata.jsonl`."""
  folder = _empty_folder(pictures)
  for name, value in rows_of(paths):
    text = untrusted.loads(value["ground_truth"])["gt_parse"]["text_sequence"]
    yield row(name, _write(folder, name, value["image"]), (READ, text.strip()))


def rows_of(paths: tuple[pathlib.Path, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields a name that no other row has, and the row.

  Raises:
    DataError: a file is not Parquet, or is damaged.
  """
  for i, path in enumerate(paths):
    count = 0
    try:
      parquet.check(path, MAX_PAGE_BYTES)
      for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=ROWS_AT_ONCE):
        for value in batch.to_pylist():
          yield f"{i:04d}-{count:07d}", value
          count += 1
    except (OSError, ValueError) as e:  # pyarrow's errors are either
      raise DataError(f"'{path}' cannot be read as Parquet after {count} rows: {e}.") from e


def _empty_folder(name: str) -> pathlib.Path:
  """Returns a folder for pictures; one with something in it may be another set's.

  Raises:
    DataError: it is not empty.
  """
  folder = pathlib.Path(name)
  folder.mkdir(parents=True, exist_ok=True)
  if next(folder.iterdir(), None) is not None:
    raise DataError(f"'{folder}' is not empty; give --pictures a new folder.")
  return folder


def _write(folder: pathlib.Path, name: str, image: Mapping[str, Any]) -> str:
  """Writes a picture, and returns its name."""
  kind = read_header(image["bytes"])[1].lower() or "damaged"  # the build counts those
  file = f"{name}.{kind}"
  (folder / file).write_bytes(image["bytes"])
  return file
